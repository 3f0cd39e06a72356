"""Stops a run whose loss is no number any more, instead of training on for days.

The losses of all steps are kept on the device, with the sum of each image's pixels, which is no finite number if one of
them is none. They are looked at together every `trainer.log_every_n_steps` optimizer steps, where logging waits for the
device anyway, and before a checkpoint is written, so that no checkpoint holds the weights that such a step made. All
ranks look at the same step and agree, so all stop together.
"""

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.distributed import all_reduce_sum

_NAMED_KEYS = 8


class NonFiniteLossError(RuntimeError):
    """The loss of a training step, or a pixel of its images, is NaN or infinite."""


class _Step(NamedTuple):
    """What is kept of a batch: its loss (), and the sum of each image's pixels or moments (B,)."""

    step: int
    keys: list[str]
    loss: Tensor
    sums: Tensor


class NonFiniteGuard(L.Callback):
    """Raises `NonFiniteLossError` with the step and its samples' keys; list it before callbacks that save."""

    def __init__(self) -> None:
        self._pending: list[_Step] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: ImageTextBatch,
        batch_idx: int,
    ) -> None:
        """Keeps the batch's loss and sums; on a logged step all ranks look at what they kept."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            pixels = batch["moments"] if "moments" in batch else batch["image"]
            sums = pixels.flatten(1).sum(1, dtype=torch.float32)
            self._pending.append(_Step(trainer.global_step, batch["key"], loss.detach(), sums))
        every = max(1, trainer.log_every_n_steps)  # type: ignore[attr-defined]
        if trainer.global_step % every == 0 and self._pending:
            self._look_together(pl_module)

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Refuses to save weights that come out of such a step."""
        self._look_together(pl_module)

    def _look_together(self, pl_module: L.LightningModule) -> None:
        """All ranks look at what they kept and stop together; called where all of them are at the same step."""
        error = self._look()
        ranks = all_reduce_sum(torch.tensor(float(error is not None), device=pl_module.device))
        if ranks > 0:
            raise error or NonFiniteLossError(f"{int(ranks)} other rank(s) found a loss or pixels that are not finite")

    def _look(self) -> NonFiniteLossError | None:
        """The error of the first bad step since the last look, the only wait for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        kept = [values for step in pending for values in (step.loss.float().view(1), step.sums)]
        flags = iter(torch.cat(kept).isfinite().tolist())
        for step, keys, loss, sums in pending:
            loss_is_finite, *images_are_finite = islice(flags, 1 + len(sums))
            bad = [key for key, good in zip(keys, images_are_finite, strict=True) if not good]
            if bad:
                return NonFiniteLossError(_pixel_message(step, bad, float(loss)))
            if not loss_is_finite:
                return NonFiniteLossError(_loss_message(step, keys, float(loss)))
        return None


def _loss_message(step: int, keys: Sequence[str], loss: float) -> str:
    return (
        f"found train/loss = {loss} at step {step}, on the samples {_named(keys)}. Allowed are finite losses. "
        "Lower `optimizer.lr`, warm up longer (`lr_scheduler`), set `trainer.gradient_clip_val=1.0` or "
        "`trainer.precision=32-true`, or look at the samples; the last checkpoint was written before this step, "
        "so the same command continues from it."
    )


def _pixel_message(step: int, keys: Sequence[str], loss: float) -> str:
    return (
        f"found pixels that are NaN or infinite at step {step} (train/loss = {loss}), in the samples {_named(keys)}. "
        "Allowed are finite pixels in [-1, 1]. Mend these samples or leave them out (`data.filters`, `data.shards`); "
        "the last checkpoint was written before this step, so the same command continues from it."
    )


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return ", ".join(keys[:_NAMED_KEYS]) + more
