import lightning as L
import pytest

from ldm_train.callbacks import CheckpointWriter, Preemption
from ldm_train.callbacks.idle_hooks import BATCH_HOOKS, hide_idle_hooks, take_over
from tests.callbacks.toy import ToyData, ToyStage, trainer_of


class Fails(L.Callback):
    def on_train_batch_start(self, *_):
        raise ZeroDivisionError


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
    taken, note = take_over(worker, hook), getattr(own, hook)
    setattr(own, hook, lambda *arguments: (note(*arguments), taken(*arguments)))
    trainer_of(tmp_path, [worker, own]).fit(ToyStage(), ToyData())
    assert worker.calls == own.calls > 0


@pytest.mark.parametrize("is_first", [False, True])
def test_what_is_due_is_saved_before_it_leaves_and_without_it_too(tmp_path, is_first):
    done = []

    class Writer(CheckpointWriter):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            done.append(("saves", batch_idx))

    class Looks(Preemption):
        def leave_if_told(self, trainer):
            done.append("looks")

    writer = Writer(str(tmp_path))
    callbacks = [Looks(), writer] if is_first else [writer, Looks()]
    for used in (callbacks, callbacks, [writer]):
        with pytest.raises(ZeroDivisionError):  # after which Lightning tears no callback down
            trainer_of(tmp_path, [*used, Fails()], enable_checkpointing=True).fit(ToyStage(), ToyData())
        done.clear()
        trainer_of(tmp_path, used, limit_val_batches=0, enable_checkpointing=True, max_steps=2).fit(
            ToyStage(), ToyData()
        )
        looks = ["looks"] if used is callbacks else []
        assert done == [("saves", 0), *looks, ("saves", 1), *looks]
