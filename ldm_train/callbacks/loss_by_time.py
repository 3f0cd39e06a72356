"""Where along the noise the model errs: the loss of each quarter of the times.

    loss_q = mean of || target - prediction ||^2 over examples with (q - 1) T / 4 <= t < q T / 4,   q = 1 .. 4

The first quarter is nearly clean, the last nearly noise, and their errors differ by orders of magnitude; their mean,
the training loss, says little (Nichol and Dhariwal 2021, section 3.3). The errors are unweighted, so that runs of
different weightings can be compared.
"""

from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torchmetrics import Metric

from ldm_train.batch import ImageTextBatch
from ldm_train.callbacks.throughput import is_logged

_QUARTERS = 4


class LossByQuarter(Metric):
    """Means of values by the quarter of their times, over all updates and processes."""

    sums: Tensor
    counts: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("sums", torch.zeros(_QUARTERS, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("counts", torch.zeros(_QUARTERS, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Tensor, t: Tensor, num_steps: int) -> None:
        """Add values (B,) at times t (B,) of T = `num_steps`."""
        quarter = t * _QUARTERS // num_steps
        self.sums.index_add_(0, quarter, values.to(self.sums.dtype))
        self.counts.index_add_(0, quarter, torch.ones_like(values, dtype=self.counts.dtype))

    def compute(self) -> tuple[Tensor, Tensor]:
        """The mean of each quarter, and of how many values it is the mean: (4,) each."""
        return self.sums / self.counts, self.counts


class LossByTime(L.Callback):
    """Logs `train/loss_q1` to `train/loss_q4` at logged steps, over the steps since the last one, and `val/loss_q*`."""

    def __init__(self) -> None:
        self.training, self.validation = LossByQuarter(), LossByQuarter()
        self._last_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count."""
        self.training.to(pl_module.device).reset()
        self._last_step = trainer.global_step

    def on_train_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: ImageTextBatch,
        batch_idx: int,
    ) -> None:
        """Adds a batch; logs at the end of a logged step."""
        _add(self.training, outputs, pl_module)
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        if stepped and is_logged(trainer, trainer.global_step):
            _log(pl_module, "train", self.training)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begins to count."""
        self.validation.to(pl_module.device).reset()

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: ImageTextBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Adds a batch."""
        _add(self.validation, outputs, pl_module)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Logs the whole validation."""
        _log(pl_module, "val", self.validation)


def _add(metric: LossByQuarter, outputs: Tensor | Mapping[str, Any] | None, pl_module: L.LightningModule) -> None:
    assert isinstance(outputs, Mapping)
    num_steps: int = pl_module.denoiser.schedule.num_steps  # type: ignore[assignment, union-attr]
    metric.update(outputs["square_error"], outputs["t"], num_steps)


def _log(pl_module: L.LightningModule, split: str, metric: LossByQuarter) -> None:
    means, counts = (found.tolist() for found in metric.compute())
    for number, (mean, count) in enumerate(zip(means, counts, strict=True), start=1):
        if count:  # a quarter that no time fell into has no figure; one with a loss of NaN has
            pl_module.log(f"{split}/loss_q{number}", mean)
    metric.reset()
