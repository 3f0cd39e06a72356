import lightning as L
import pytest

from ldm_train.callbacks.idle_hooks import BATCH_HOOKS, hide_idle_hooks, take_over
from tests.callbacks.toy import ToyData, ToyStage, trainer_of


class Idle(L.Callback):
    """Overrides nothing."""


def writes(hook):
    """A callback that notes the calls of one hook."""

    def note(self, *_):
        self.calls += 1

    return type("Writes", (L.Callback,), {"calls": 0, hook: note})()


@pytest.mark.parametrize("hook", BATCH_HOOKS)
def test_every_hook_that_does_something_is_called_as_often_as_without(tmp_path, hook):
    calls = []
    for hide in (hide_idle_hooks, list):
        callback = writes(hook)
        hide([callback])
        trainer_of(tmp_path, [callback]).fit(ToyStage(), ToyData())
        calls.append(callback.calls)
    assert calls[0] == calls[1] > 0


def test_those_that_do_nothing_are_not_called_and_a_subclass_keeps_them(tmp_path, monkeypatch):
    called = []
    for name in BATCH_HOOKS:
        monkeypatch.setattr(L.Callback, name, lambda self, *_, name=name: called.append((type(self).__name__, name)))

    class Derived(Idle):
        def on_after_backward(self, *arguments):
            super().on_after_backward(*arguments)

    own = Idle()
    own.on_train_batch_start = lambda *_: called.append(("own", "on_train_batch_start"))
    callbacks = [Idle(), Derived(), own]
    hide_idle_hooks(callbacks)
    trainer_of(tmp_path, callbacks).fit(ToyStage(), ToyData())
    assert set(called) == {("Derived", "on_after_backward"), ("own", "on_train_batch_start")}


@pytest.mark.parametrize("hook", BATCH_HOOKS)
def test_a_hook_that_was_taken_over_is_called_by_whoever_took_it(tmp_path, hook):
    worker, own = writes(hook), writes(hook)
    for _ in range(2):  # of a second run of the same trainer
        taken = take_over(worker, hook)
    note = getattr(own, hook)
    setattr(own, hook, lambda *arguments: (note(*arguments), taken(*arguments)))
    trainer_of(tmp_path, [worker, own]).fit(ToyStage(), ToyData())
    assert worker.calls == own.calls > 0
