"""How far the run is: one bar for the whole of training in a terminal, a readable line now and then in a log file.

Lightning's bars start anew each epoch, so their remaining time is that of an epoch, seconds on a small data set. Here
the unit is the optimizer step and the end is the end of training. The figures beside it are read only when they are
shown, because reading one waits for the device.
"""

import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import TimeRemainingColumn as RemainingColumn

_FIGURES = {"train/loss": "loss", "train/images_per_second": "images/s"}  # key -> what the bar calls it
_SHORT = 5.0  # seconds of work inside the run that a log file need not mention

Advance = Callable[[int], None]


def progress_bar(every_n_steps: int = 50) -> "RunProgress":
    """A moving bar if the output is a terminal, otherwise a line each `every_n_steps` optimizer steps."""
    return BarProgress() if sys.stdout.isatty() else LineProgress(every_n_steps)


def subtask(trainer: L.Trainer, description: str, total: int) -> AbstractContextManager[Advance]:
    """Shows a piece of work inside the run; the context gives a function to call with each amount that is done."""
    bar = trainer.progress_bar_callback
    if not isinstance(bar, RunProgress) or not trainer.is_global_zero:
        return nullcontext(lambda amount: None)
    return bar.subtask(description, total)


class RunProgress(ProgressBar, ABC):
    """Follows the run by optimizer steps; the subclasses show it.

    Args:
        every_n_steps: optimizer steps between two displays.
    """

    def __init__(self, every_n_steps: int) -> None:
        super().__init__()
        self.every_n_steps = every_n_steps
        self._enabled = True
        self._shown_step = -1
        self._validation: AbstractContextManager[Advance] = nullcontext(lambda amount: None)
        self._advance_validation: Advance = lambda amount: None

    def disable(self) -> None:
        """Called by Lightning on all ranks but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Called by Lightning to undo `disable`."""
        self._enabled = True

    @abstractmethod
    def start(self, first_step: int, total_steps: int) -> None:
        """Training starts at `first_step`, not 0 in a resumed run."""

    @abstractmethod
    def show(self, step: int, figures: str) -> None:
        """`step` optimizer steps are done."""

    @abstractmethod
    def subtask(self, description: str, total: int) -> AbstractContextManager[Advance]:
        """Shows work of `total` parts inside the run."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts the bar of the whole run."""
        self._shown_step = trainer.global_step
        if self._enabled:
            self.start(trainer.global_step, total_steps(trainer))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Shows the state every few optimizer steps, and at the last one."""
        step = trainer.global_step
        if not self._enabled or step == self._shown_step:
            return
        if step % self.every_n_steps == 0 or step == total_steps(trainer):
            self._shown_step = step
            metrics = trainer.callback_metrics
            figures = [f"{label} {float(metrics[key]):.4g}" for key, label in _FIGURES.items() if key in metrics]
            self.show(step, "  ".join(figures))

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Shows the validation as work inside the run."""
        if self._enabled and not trainer.sanity_checking:
            self._validation = self.subtask("validation", int(sum(trainer.num_val_batches)))
            self._advance_validation = self._validation.__enter__()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """One batch more."""
        self._advance_validation(1)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The validation is over."""
        self._validation.__exit__(None, None, None)
        self._validation, self._advance_validation = nullcontext(lambda amount: None), lambda amount: None


class BarProgress(RunProgress):
    """A bar for the run, and one below it while something happens inside it."""

    def __init__(self) -> None:
        super().__init__(every_n_steps=5)
        self._progress: Progress | None = None
        self._training: TaskID | None = None

    def start(self, first_step: int, total_steps: int) -> None:
        """Adds the run's bar."""
        self._training = self._bars().add_task("training", total=total_steps, completed=first_step, figures="")

    def show(self, step: int, figures: str) -> None:
        """Moves the run's bar."""
        assert self._training is not None
        self._bars().update(self._training, completed=step, figures=figures)

    @contextmanager
    def subtask(self, description: str, total: int) -> Iterator[Advance]:
        """A bar that vanishes when the work is done."""
        bars = self._bars()
        task = bars.add_task(description, total=total, figures="")
        try:
            yield lambda amount: bars.advance(task, amount)
        finally:
            bars.remove_task(task)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Leaves the terminal to others."""
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """The same after a validation alone."""
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """The same before an error is printed."""
        self._stop()

    def _bars(self) -> Progress:
        if self._progress is None:
            text = TextColumn("[bold]{task.description}")
            columns = (text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), RemainingColumn())
            self._progress = Progress(*columns, TextColumn("{task.fields[figures]}"))
            self._progress.start()
        return self._progress

    def _stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


class LineProgress(RunProgress):
    """Lines for a log file: `step 150/1500 (10 %)  loss 0.41  images/s 88  0:02:31 left`."""

    def start(self, first_step: int, total_steps: int) -> None:
        """Remembers where and when training started."""
        self._first_step, self._total, self._began = first_step, total_steps, time.monotonic()

    def show(self, step: int, figures: str) -> None:
        """Prints one line; what is left is reckoned from the run's pace so far, its pauses included."""
        pace = (time.monotonic() - self._began) / (step - self._first_step)
        left = timedelta(seconds=round(pace * (self._total - step)))
        share = round(100 * step / self._total) if self._total else 0
        print(f"step {step}/{self._total} ({share} %)  {figures}  {left} left", flush=True)

    @contextmanager
    def subtask(self, description: str, total: int) -> Iterator[Advance]:
        """A line when the work is done, if it made anyone wait."""
        began = time.monotonic()
        yield lambda amount: None
        if (seconds := time.monotonic() - began) > _SHORT:
            print(f"{description}: {total} in {seconds:.1f} s", flush=True)


def is_amid_step(trainer: L.Trainer) -> bool:
    """Whether the gradients of the last training batch are only accumulated yet."""
    return trainer.fit_loop.epoch_loop._should_accumulate()


def total_steps(trainer: L.Trainer) -> int:
    """The optimizer steps of the whole run, from `max_steps` or `max_epochs`; 0 if neither ends it."""
    by_epochs = 0.0
    if trainer.max_epochs is not None and trainer.max_epochs > 0:
        by_epochs = trainer.max_epochs * -(-trainer.num_training_batches // trainer.accumulate_grad_batches)
    limits = [steps for steps in (trainer.max_steps, by_epochs) if 0 < steps < float("inf")]
    return int(min(limits, default=0))
