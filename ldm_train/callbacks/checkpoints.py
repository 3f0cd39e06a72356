"""What a run leaves behind to go on from: checkpoints, and adapter files.

`checkpoints/last.ckpt` is always complete: a save writes a temporary file, flushes it, reads it back, keeps the old one
as `previous.ckpt` and takes its name. Saves happen after an optimizer step, and raw weights are saved as raw and
averaged ones as averaged. Other names are of files that were `last.ckpt` once, and share its place on the disk.

    last.ckpt, previous.ckpt     what the next start goes on from, and what it falls back to
    best.ckpt                    the step with the best `best_metric`
    step_0005000.ckpt            kept for good, every `keep_every_n_steps` or `keep_every_images`
"""

import logging
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint

from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.callbacks.progress import is_amid_step, total_steps
from ldm_train.callbacks.tracking import log_trained_batch
from ldm_train.checkpoint import replace_durably, verify_checkpoint
from ldm_train.distributed import PacedAgreement, all_reduce_sum
from ldm_train.interchange import AdapterBase, AdapterMetadata, write_adapters
from ldm_train.stages import LoRAFineTuning, text_shape

_log = logging.getLogger(__name__)

# How often ranks compare their clocks: in a hundredth of the time that is to pass, or so many steps.
_SHARE_OF_CLOCK, _MOST_STEPS = 0.01, 512


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; the one before is whole."""


class CheckpointWriter(Checkpoint):
    """Writes `last.ckpt` every so many optimizer steps or minutes and at the end, and keeps some.

    The step before the last is saved too: after the last one come evaluation, calibration and export, and a run that is
    killed in the midst of these has one step to repeat, and then these.

    Args:
        directory: where checkpoints go.
        every_n_steps: optimizer steps between saves; null for none but those by the clock.
        every_minutes: minutes after a save at which the next one is due, whatever the steps; null for none.
        keep_every_n_steps: optimizer steps between checkpoints that are kept for good; null keeps none.
        keep_every_images: or images seen, whatever the batch size; null keeps none.
        best_metric: the figure, such as `val/loss`, whose best step is kept; judged after each validation but one
            amid the accumulation of a step. null: none.
        best_mode: whether the smallest or the largest figure is the best.

    Attributes:
        seconds: spent on saves so far.
        longest_save: seconds of the longest one.

    Raises:
        ValueError: if an interval is not positive.
    """

    def __init__(
        self,
        directory: str,
        every_n_steps: int | None = 500,
        every_minutes: float | None = None,
        keep_every_n_steps: int | None = None,
        keep_every_images: int | None = None,
        best_metric: str | None = None,
        best_mode: Literal["min", "max"] = "min",
    ) -> None:
        intervals = {
            "every_n_steps": every_n_steps,
            "every_minutes": every_minutes,
            "keep_every_n_steps": keep_every_n_steps,
            "keep_every_images": keep_every_images,
        }
        for key, value in intervals.items():
            if value is not None and not value > 0:
                raise ValueError(
                    f"{key} is {value}; allowed are positive numbers, or null; change `callbacks.checkpoint.{key}`"
                )
        self.directory = Path(directory)
        self.every_n_steps, self.every_minutes = every_n_steps, every_minutes
        self.keep_every_n_steps, self.keep_every_images = keep_every_n_steps, keep_every_images
        self.best_metric, self.best_mode = best_metric, best_mode
        self.seconds = self.longest_save = 0.0
        self._best: float | None = None
        self._saved_step = self._seen_step = -1
        self._late_at = math.inf
        self._last_step = 0
        self._batches_to_go = 1
        self._is_late = False
        self._agreement: PacedAgreement | None = None
        self._is_last_whole = False

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Clocks differ between ranks, and all save at the same step."""
        if self.every_minutes is not None:
            agreement = PacedAgreement(_SHARE_OF_CLOCK * 60 * self.every_minutes, _MOST_STEPS)
            self._agreement = None if agreement.is_alone else agreement

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The best figure so far is part of a run's state."""
        checkpoint["best_figure"] = self._best

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Go on with it."""
        self._best = checkpoint.get("best_figure")

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The state a run resumes from needs no second save."""
        self._saved_step = self._seen_step = trainer.global_step
        self._last_step, self._batches_to_go = total_steps(trainer), 1
        self._start_clock()

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401
        """Save when an optimizer step has just completed an interval.

        A batch ends no more than one step, so that most of them only have to be counted.
        """
        if self._agreement is None:
            self._is_late = time.monotonic() > self._late_at
        elif self._agreement.next_call_talks():
            self._is_late = bool(self._agreement.exchange(time.monotonic() > self._late_at))
        self._batches_to_go -= 1
        if self._batches_to_go <= 0 or self._is_late:
            self._save_if_due(trainer)

    def _save_if_due(self, trainer: L.Trainer) -> None:
        step = trainer.global_step
        if step == self._seen_step or is_amid_step(trainer):  # gradients that were only accumulated would be lost
            return
        self._seen_step, self._batches_to_go = step, self._steps_to_next(trainer, step)
        # The last step is saved at the very end, after calibration, evaluation and export.
        if step != self._last_step and (self._is_late or self._steps_to_next(trainer, step - 1) == 1):
            log_trained_batch(trainer)
            self._save(trainer, before_validation=True)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Keep the step if it is the best."""
        if self.best_metric is None or trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        figure = trainer.callback_metrics.get(self.best_metric)
        # Rank 0's figure: not all are computed on every rank.
        value = trainer.strategy.broadcast(None if figure is None else float(figure))
        if value is None or not self._is_better(value) or self._is_amid_step(trainer):
            return
        self._best = value
        self._save(trainer)
        if trainer.is_global_zero:
            _take_name(self.directory / "last.ckpt", self.directory / "best.ckpt")

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        self._save(trainer, again=True)

    def save_interrupted(self, trainer: L.Trainer) -> None:
        """Save the last optimizer step, for a run that leaves after it or in a validation that follows it.

        Before the first step there is nothing to save, and in the closing work nothing that is not saved: see above.
        """
        begun = self._saved_step >= 0
        if begun and trainer.global_step != total_steps(trainer):
            self._save(trainer, before_validation=True)

    def _steps_to_next(self, trainer: L.Trainer, step: int) -> int:
        """How many steps after this one the next is due, whatever the clock says."""
        due = [self._last_step - 1, *self._next_kept(trainer, step)]
        if self.every_n_steps is not None:
            due.append(_next_multiple(step, self.every_n_steps))
        return min((at - step for at in due if at > step), default=_MOST_STEPS)

    def _next_kept(self, trainer: L.Trainer, step: int) -> list[int]:
        """For each of the two intervals, the first step after this one that is kept for good."""
        kept = []
        if self.keep_every_n_steps is not None:
            kept.append(_next_multiple(step, self.keep_every_n_steps))
        if self.keep_every_images is not None:
            batch = trainer.datamodule.global_batch_size * trainer.accumulate_grad_batches  # type: ignore[attr-defined]
            kept.append(-(-_next_multiple(step * batch, self.keep_every_images) // batch))
        return kept

    def _is_amid_step(self, trainer: L.Trainer) -> bool:
        """Whether a save would lose gradients; says so."""
        if not is_amid_step(trainer):
            return False
        if trainer.is_global_zero:
            _log.warning(
                "the best %s so far is not kept: found a validation within step %d, whose gradients a save would lose; "
                "allowed are validations after a step: change `trainer.val_check_interval` to a multiple of "
                "`trainer.accumulate_grad_batches`, which is %d",
                *(self.best_metric, trainer.global_step + 1, trainer.accumulate_grad_batches),
            )
        return True

    def _is_better(self, value: float) -> bool:
        if value != value:
            return False
        return self._best is None or (value < self._best if self.best_mode == "min" else value > self._best)

    def _save(self, trainer: L.Trainer, again: bool = False, before_validation: bool = False) -> None:
        step = trainer.global_step
        if step == self._saved_step and not again:
            return
        began = time.monotonic()
        # Every rank takes part, rank 0 writes; `False` means: optimizers, loops and callbacks too. Lightning's own
        # `save_checkpoint` makes a second copy in memory, and its barrier waits for ever for a rank that fails.
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if before_validation and trainer.fit_loop.epoch_loop._should_check_val_fx(trainer.fit_loop._data_fetcher):  # type: ignore[arg-type]
            _validate_first(checkpoint)
        error = self._write(checkpoint, step) if trainer.is_global_zero else None
        if trainer.is_global_zero and error is None and step > 0 and step in self._next_kept(trainer, step - 1):
            _take_name(self.directory / "last.ckpt", self.directory / f"step_{step:07d}.ckpt")
        failed = all_reduce_sum(torch.tensor(float(error is not None), device=trainer.strategy.root_device))
        if failed > 0:
            raise error or CheckpointError("rank 0 could not write a checkpoint; see its message")
        self._saved_step, seconds = step, time.monotonic() - began
        self._start_clock()
        self.seconds += seconds
        self.longest_save = max(self.longest_save, seconds)

    def _start_clock(self) -> None:
        self._is_late = False
        if self._agreement is not None:
            self._agreement.forget()  # that it was late
        if self.every_minutes is not None:
            self._late_at = time.monotonic() + 60 * self.every_minutes

    def _write(self, checkpoint: dict[str, Any], step: int) -> CheckpointError | None:
        """Write, verify, and give names; what went wrong is returned, because the other ranks have to hear of it."""
        last, temporary = self.directory / "last.ckpt", self.directory / ".last.ckpt.tmp"
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            with temporary.open("wb") as file:
                torch.save(checkpoint, file)
            verify_checkpoint(temporary)
            if step != self._saved_step and self._may_become_previous(last):
                _take_name(last, self.directory / "previous.ckpt")
            replace_durably(temporary, last)
        except (OSError, RuntimeError, ValueError) as error:
            found = CheckpointError(_message(last, step, error, _num_bytes(checkpoint)))
            found.__cause__ = error
            return found
        finally:
            _remove(temporary)
        self._is_last_whole = True
        return None

    def _may_become_previous(self, last: Path) -> bool:
        """A file of an earlier start may be damaged, and must not take the place of the whole one beside it."""
        if not last.exists():
            return False
        if not self._is_last_whole:
            try:
                verify_checkpoint(last)
            except ValueError:
                return False
        return True


def _next_multiple(number: int, of: int) -> int:
    """The first one that is larger."""
    return (number // of + 1) * of


def _validate_first(checkpoint: dict[str, Any]) -> None:
    """Have the next start begin with the validation that is due after this step.

    Lightning goes on behind it otherwise. To its loops this is a run that was left in the validation's first batch.
    """
    loops = checkpoint["loops"]["fit_loop"]
    trained, validated = loops["epoch_loop.batch_progress"], loops["epoch_loop.val_loop.batch_progress"]
    for scope in ("total", "current"):
        trained[scope]["completed"] = trained[scope]["processed"]
        validated[scope] |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}


def _take_name(source: Path, name: Path) -> None:
    """Give a file a second name, whole at any moment; a copy where the file system has no links."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        shutil.copyfile(source, temporary)
    try:
        replace_durably(temporary, name)
    finally:
        _remove(temporary)  # a link that is renamed to a name of the same file stays


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:  # on a file system that became read-only
        return


def _num_bytes(content: object) -> int:
    """The size of all tensors in it."""
    if isinstance(content, torch.Tensor):
        return content.numel() * content.element_size()
    parts = content.values() if isinstance(content, dict) else content if isinstance(content, list | tuple) else ()
    return sum(map(_num_bytes, parts))


def _of_system(error: BaseException) -> BaseException:
    """What the system said first: torch, when a write fails, says in its place where its archive broke off."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or error


def _message(path: Path, step: int, error: Exception, needed: int) -> str:
    try:
        free = f"{needed / 2**20:,.1f} MiB are needed and {shutil.disk_usage(path.parent).free / 2**20:,.1f} MiB free"
    except OSError:
        free = "its directory cannot be read"
    reason = next(iter(str(_of_system(error)).splitlines()), type(error).__name__)
    return (
        f"step {step} could not be saved as {path} ({reason}; {free}); the checkpoint before it is untouched. Allowed "
        "is a directory that can be written and has room for one checkpoint more than it keeps: make room, or change "
        "`paths.root`, `callbacks.checkpoint.keep_every_n_steps`, `callbacks.checkpoint.keep_every_images`"
    )


class AdapterExport(L.Callback):
    """Writes the adapters alone, averaged if they are averaged, as safetensors at the end of training.

    The file says which architecture and which weights the adapters belong to (`ldm_train.interchange.AdapterMetadata`);
    `tools/lora.py convert` gives it the layout of another program.

    Args:
        path: the file to write.
        unet: config node of the U-Net.
        trigger_words: words of the captions that call for what was learned, for people.
    """

    def __init__(self, path: str, unet: Mapping[str, Any], trigger_words: Sequence[str | None] = ()) -> None:
        self.path, self.unet = Path(path), unet
        self.trigger_words = tuple(word for word in trigger_words if word is not None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file on rank 0."""
        if not trainer.is_global_zero or not isinstance(pl_module, LoRAFineTuning):
            return
        base = AdapterBase(self.unet, text_shape(pl_module))
        with evaluation_weights(trainer, pl_module):
            write_adapters(
                self.path, pl_module.adapters(), AdapterMetadata(base, pl_module.unet_digest, self.trigger_words)
            )
