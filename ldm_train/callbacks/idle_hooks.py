"""A callback that does nothing at a step is not called at it.

Lightning calls seven hooks of every callback in each training step, overridden or not, which takes it two microseconds
each: with ten callbacks more than they work themselves. It passes over a hook that is not callable. So the hooks that a
callback has from `L.Callback`, where they do nothing, are hidden by None; its class, and what derives from it, keep
them. Of two callbacks that work one after the other, one can call the other's hook as well.
"""

from collections.abc import Callable, Iterable
from typing import Any

import lightning as L

BATCH_HOOKS = (
    "on_train_batch_start",
    "on_before_zero_grad",
    "on_before_backward",
    "on_after_backward",
    "on_before_optimizer_step",
    "on_train_batch_end",
    "on_validation_batch_start",
    "on_validation_batch_end",
)


def hide_idle_hooks(callbacks: Iterable[L.Callback]) -> None:
    """Hide those of `BATCH_HOOKS` that a callback does not override, for as long as the callback lives."""
    for callback in callbacks:
        for name in BATCH_HOOKS:
            if getattr(type(callback), name) is getattr(L.Callback, name) and name not in vars(callback):
                setattr(callback, name, None)


def take_over(callback: L.Callback, name: str) -> Callable[..., Any]:
    """A callback's hook, for another callback that calls it from now on; Lightning no longer does.

    It is given back by setting it.
    """
    hook: Callable[..., Any] = getattr(callback, name)
    setattr(callback, name, None)
    return hook
