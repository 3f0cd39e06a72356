"""Ends a run that is told to go, so that the same command goes on with it as if nothing had happened.

SLURM says that a job's time is up by a signal: the one of `--signal` before a time limit, SIGTERM or the same one when
another job takes its place. What happens then, in this order:

1. The handler remembers the signal's number. It does nothing else: communication or files inside a handler would meet
   those that it interrupted, and ranks that wait for each other in different places wait for ever.
2. After each batch, of training, of validation, and of images that are generated to judge the model, the ranks agree on
   the largest number that any of them remembers. They see it one batch later, all in the same place, and leave there.
   Where batches take milliseconds they do so after some of them, twice a second or so.
3. What is left undone is undone as by any error, so that the weights are the raw ones again; then one checkpoint is
   written, of the last optimizer step. A validation that was left is repeated from its first batch by the next start.
4. Loggers are closed, and rank 0 has the job started again: by the handler that was there before, submitit's, or by
   `scontrol requeue`. The exit status is 128 + the signal's number, on every rank.

A second signal, two seconds after the first or later, ends the process at once, with what is on the disk; SIGTERM after
another one does not: it comes at the time limit, and leaves a save the seconds until SIGKILL. Processes
that were forked inherit the handler and ignore the signals: SLURM sends them to all processes of a step.

Lightning's own handlers communicate inside the handler, and its loop asks the device about them in each step. While
this callback is used they are not installed.
"""

import logging
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, TypeVar

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from ldm_train.callbacks.checkpoints import CheckpointWriter
from ldm_train.callbacks.idle_hooks import take_over
from ldm_train.callbacks.progress import is_amid_step
from ldm_train.callbacks.requeue import Handler, ask_for_another_start, gets_further
from ldm_train.callbacks.tracking import log_trained_batch
from ldm_train.distributed import PacedAgreement

_log = logging.getLogger(__name__)

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
_ONE_EVENT = 2.0  # seconds in which signals have one cause: SLURM sends some of them twice
_OFTEN, _MOST_STEPS = 0.5, 128  # how often ranks look for signals: seconds, and steps where steps are short
_HOOK = "on_train_batch_end"

Item = TypeVar("Item")


class Preempted(SystemExit):
    """A signal ends the run, and its state is on the disk.

    Args:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.number = number


class Preemption(Checkpoint):
    """Leaves at a signal, after the batch; see the module. `listening` installs its handlers.

    It is a `Checkpoint` to Lightning, which calls these last, and calls the `CheckpointWriter` itself: what is due
    after a step is done before it leaves, and the two cost a short step one hook.

    Args:
        grace_seconds: from the signal to SLURM's SIGKILL, what `sbatch --signal=USR1@<seconds>` asks for. A warning
            says so if saving and the longest batch take longer.
        requeue: whether a SLURM job is started again, if it is told to go or one of its processes dies.
    """

    def __init__(self, grace_seconds: float = 120.0, requeue: bool = True) -> None:
        if grace_seconds <= 0:
            raise ValueError(
                f"grace_seconds is {grace_seconds}; allowed are seconds above 0; change "
                "`callbacks.preemption.grace_seconds`"
            )
        self.grace_seconds, self.requeue = grace_seconds, requeue
        self._owner = os.getpid()
        self._received, self._received_at = 0, 0.0
        self._last, self._last_at = 0, 0.0  # the signal that counts against the next one
        self._agreement: PacedAgreement | None = None
        self._writers: list[CheckpointWriter] = []
        self._taken: list[tuple[CheckpointWriter, Callable[..., Any]]] = []  # and their hooks at the end of a batch
        self._looked_at, self._longest_wait, self._saved = 0.0, 0.0, 0.0
        self._has_saved = self._is_warned = False
        self._began_at = math.inf  # batches that earlier starts have trained
        self._previous: dict[int, Handler] = {}

    def remember(self, number: int, frame: FrameType | None = None) -> None:
        """The handler of all three signals."""
        if os.getpid() != self._owner:
            return
        now = time.monotonic()
        is_announced = number == signal.SIGTERM != self._last  # at the time limit that the first one told of
        if not self._received:
            self._received, self._received_at = number, now
        elif now - self._last_at > _ONE_EVENT and not is_announced:
            os.write(2, b"ldm_train: a second signal: leaving with what is on the disk\n")
            os._exit(128 + number)
        self._last, self._last_at = max(number, self._last), max(now, self._last_at)  # SIGTERM is the largest

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Makes the group in which ranks agree, and keeps Lightning's handlers and their broadcasts out."""
        self._agreement = PacedAgreement(_OFTEN, _MOST_STEPS)
        self._writers = [c for c in trainer.callbacks if isinstance(c, CheckpointWriter)]  # type: ignore[attr-defined]
        self._taken = [(writer, take_over(writer, _HOOK)) for writer in self._writers]
        trainer._signal_connector = _NoHandlers(trainer)
        trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None  # type: ignore[method-assign]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A signal may have come while the run was starting."""
        assert self._agreement is not None
        self._leave(self._agreement.now(self._received))
        self.look_at_once()
        self._began_at = _batches(trainer).processed

    def on_train_batch_end(self, trainer: L.Trainer, *others: Any) -> None:  # noqa: ANN401
        """Leaves if the batch ended an optimizer step: gradients that were only accumulated would be lost."""
        for _, hook in self._taken:
            hook(trainer, *others)
        self.leave_if_told(trainer)

    def on_validation_start(self, *_: Any) -> None:  # noqa: ANN401
        """Its batches may take longer than those of the training."""
        self.look_at_once()

    def on_validation_end(self, *_: Any) -> None:  # noqa: ANN401
        """And those of the training longer than its."""
        self.look_at_once()

    def on_validation_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401
        """Leaves the validation; its averaged weights and its figures are dropped."""
        self.leave_if_told(trainer)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The next look compares how long it took."""
        self._has_saved = True

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """What it took over is called by Lightning again."""
        self._give_hooks_back()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Saves, when contexts have been left and the raw weights are back."""
        self._give_hooks_back()  # no teardown follows
        if not isinstance(exception, Preempted):
            return
        batches = _batches(trainer)
        # Its last hooks were left, and no start will train it again.
        if trainer.training and batches.processed > max(batches.completed, self._began_at):
            log_trained_batch(trainer)
        for writer in self._writers:
            writer.save_interrupted(trainer)
        if trainer.is_global_zero:
            name, seconds = signal.Signals(exception.number).name, time.monotonic() - self._received_at
            after = f", {seconds:.1f} s after the signal" if self._received else ""
            _log.info("%s: leaving at step %d%s", name, trainer.global_step, after)

    def leave_if_told(self, trainer: L.Trainer) -> None:
        """Every rank calls it at the same place, and all leave there or none does.

        Raises:
            Preempted: if any rank has received a signal.
        """
        assert self._agreement is not None
        if trainer.accumulate_grad_batches > 1 and trainer.state.fn == "fit" and is_amid_step(trainer):
            return
        if self._agreement.is_alone:
            agreed = self._received
        elif self._agreement.next_call_talks():
            agreed = self._agreement.exchange(self._received)
        else:
            return
        self._measure(trainer)
        self._leave(agreed)

    def look_at_once(self) -> None:
        """Every rank calls it at the same place: what follows may take longer than what went before."""
        if self._agreement is not None:
            self._agreement.talk_at_once()

    def hand_over(self, trainer: L.Trainer, number: int) -> None:
        """Rank 0 has the job started again; the others stay until it has, because SLURM ends a job with its first."""
        self._last_at = math.inf  # SLURM ends the old start of a requeued job by a signal: that is no second one
        if trainer.is_global_zero and self.requeue and gets_further(trainer.global_step):
            # Submitit requeues at its user signal; what it has for SIGTERM only says that it came.
            launchers = [(key, handler) for key in SIGNALS[:2] if callable(handler := self._previous.get(key))]
            ask_for_another_start(*(launchers[0] if launchers else (number, None)))
        if self._agreement is not None:
            try:
                self._agreement.wait(self.grace_seconds)
            except RuntimeError as error:
                _log.warning("leaving without waiting for the other ranks: %s", error)

    def install(self) -> None:
        """Listens from now on, in the main thread of this process."""
        if threading.current_thread() is threading.main_thread():
            self._owner, self._received, self._last = os.getpid(), 0, 0
            self._previous = {number: signal.signal(number, self.remember) for number in SIGNALS}

    def uninstall(self) -> None:
        """Gives the signals back to whom they belonged."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _give_hooks_back(self) -> None:
        for writer, hook in self._taken:
            setattr(writer, _HOOK, hook)
        self._taken = []

    def _leave(self, number: int) -> None:
        if number:
            raise Preempted(number)

    def _measure(self, trainer: L.Trainer) -> None:
        """Compares what leaving takes with the time there is, once a save was made."""
        now = time.monotonic()
        waited, self._looked_at = now - self._looked_at if self._looked_at else 0.0, now
        if waited <= self._longest_wait and not self._has_saved:
            return
        saved = sum(writer.seconds for writer in self._writers)
        saving, self._saved, self._has_saved = saved - self._saved, saved, False
        self._longest_wait = max(self._longest_wait, waited - saving)
        longest_save = max((writer.longest_save for writer in self._writers), default=0.0)
        # Two waits: the one during which the signal comes, and the one after which all ranks know of it.
        needed = longest_save + 2 * self._longest_wait
        if longest_save and needed > self.grace_seconds and not self._is_warned and trainer.is_global_zero:
            self._is_warned = True
            _log.warning(
                "a preempted run may lose steps: found %.0f s for a save and %.0f s between two looks for signals; "
                "allowed is %.0f s for one save and two such waits; ask SLURM for more (`sbatch --signal=USR1@%d`) and "
                "change `callbacks.preemption.grace_seconds`",
                *(longest_save, self._longest_wait, self.grace_seconds, int(2 * needed) + 1),
            )


class _NoHandlers(_SignalConnector):
    """In the place of Lightning's: installs nothing."""

    def register_signal_handlers(self) -> None:
        """The handlers of `Preemption` stay."""


def interruptible(trainer: L.Trainer, items: Iterable[Item]) -> Iterator[Item]:
    """The items, as long as no signal comes; every rank must take equally many.

    Raises:
        Preempted: between two items.
    """
    preemption = _of(trainer)
    if preemption is not None:
        preemption.look_at_once()
    for item in items:
        if preemption is not None:
            preemption.leave_if_told(trainer)
        yield item
    if preemption is not None:
        preemption.look_at_once()


@contextmanager
def listening(trainer: L.Trainer) -> Iterator[None]:
    """The context in which signals end the trainer's run; around everything that has to be closed before it is over."""
    preemption = _of(trainer)
    if preemption is None:
        yield
        return
    preemption.install()
    try:
        yield
    except Preempted as stop:
        preemption.hand_over(trainer, stop.number)
        raise
    finally:
        preemption.uninstall()


def _batches(trainer: L.Trainer) -> Any:  # noqa: ANN401
    """How many training batches the run has begun, trained and ended."""
    return trainer.fit_loop.epoch_loop.batch_progress.total


def _of(trainer: L.Trainer) -> Preemption | None:
    found = [c for c in trainer.callbacks if isinstance(c, Preemption)]  # type: ignore[attr-defined]
    return found[0] if found else None
