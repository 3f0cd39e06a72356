"""Stops a run whose loss is no number any more, instead of training on for days.

The losses of all steps are kept on the device and looked at together every `trainer.log_every_n_steps` optimizer steps,
where logging waits for the device anyway, and before a checkpoint is written, so that no checkpoint holds the weights
that such a step made. All ranks look at the same step and agree, so all stop together.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.distributed import all_reduce_sum


class NonFiniteLossError(RuntimeError):
    """The loss of a training step is NaN or infinite."""


class NonFiniteGuard(L.Callback):
    """Raises `NonFiniteLossError` with the step and its samples' keys; list it before callbacks that save."""

    _NAMED_KEYS = 8

    def __init__(self) -> None:
        self._pending: list[tuple[int, list[str], Tensor]] = []

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: ImageTextBatch,
        batch_idx: int,
    ) -> None:
        """Keeps the batch's loss; on a logged step all ranks look at what they kept."""
        loss = outputs["loss"] if isinstance(outputs, Mapping) else outputs
        if loss is not None:
            self._pending.append((trainer.global_step, batch["key"], loss.detach()))
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
            raise error or NonFiniteLossError(f"{int(ranks)} other rank(s) found a loss that is not finite")

    def _look(self) -> NonFiniteLossError | None:
        """The error of the first bad loss since the last look, the only wait for the device."""
        pending, self._pending = self._pending, []
        if not pending:
            return None
        finite = torch.stack([loss for *_, loss in pending]).isfinite().tolist()
        for (step, keys, loss), good in zip(pending, finite, strict=True):
            if not good:
                return NonFiniteLossError(self._message(step, keys, float(loss)))
        return None

    def _message(self, step: int, keys: list[str], loss: float) -> str:
        named = ", ".join(keys[: self._NAMED_KEYS])
        more = f" and {len(keys) - self._NAMED_KEYS} more" if len(keys) > self._NAMED_KEYS else ""
        return (
            f"found train/loss = {loss} at step {step}, on the samples {named}{more}. Allowed are finite losses. "
            "Lower `optimizer.lr`, warm up longer (`lr_scheduler`), set `trainer.gradient_clip_val=1.0` or "
            "`trainer.precision=32-true`, or look at the samples; the last checkpoint was written before this step, "
            "so the same command continues from it."
        )
