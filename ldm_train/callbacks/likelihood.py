"""Judges a diffusion model by its likelihood: the variational bound on validation images, term by term.

For models of pixels, 8-bit values in [-1, 1] behind the first stage `Pixels`, the bound is one on the probability of an
image, in bits per dimension: `val/bits_per_dim`, comparable with what the literature reports. For latent models it is
one on the differential log-likelihood of the latents, in bits per dimension of them: `val/latent_bound`, a curve to
watch for one autoencoder, which says nothing about the bits of an image. See `ldm_train.diffusion.likelihood`.

The noise of an image belongs to its sample id and the images are the first of the validation set, so two evaluations
differ by the weights alone, whatever the number of processes.
"""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import move_data_to_device
from torch import Tensor
from torchmetrics import Metric

from ldm_train.batch import ImageTextBatch
from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.callbacks.preemption import interruptible
from ldm_train.callbacks.progress import subtask
from ldm_train.callbacks.tracking import log_metrics
from ldm_train.diffusion import Bound, variational_bound
from ldm_train.diffusion.likelihood import strata
from ldm_train.distributed import global_rank
from ldm_train.stages import LatentDiffusion

_PARTS = ("total", "prior", "steps", "decoder")


class MeanBound(Metric):
    """Means of bounds over images, and of their terms by time, over all updates and processes.

    Args:
        num_steps: T of the noise schedule.
    """

    parts: Tensor
    count: Tensor
    terms: Tensor
    term_counts: Tensor

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.add_state("parts", torch.zeros(len(_PARTS), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("terms", torch.zeros(num_steps, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("term_counts", torch.zeros(num_steps, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, bound: Bound, taken: Tensor) -> None:
        """Add those of B examples that are `taken`, (B,) bool."""
        self.parts += torch.stack([getattr(bound, name)[taken].sum() for name in _PARTS])
        self.count += taken.sum()
        times, terms = bound.times[taken].flatten(), bound.terms[taken].flatten()
        self.terms.index_add_(0, times, terms)
        self.term_counts.index_add_(0, times, torch.ones_like(terms))

    def compute(self) -> tuple[dict[str, Tensor], Tensor]:
        """The mean of each part by its name, and (T,) the mean term of each time, NaN where none was measured."""
        return dict(zip(_PARTS, self.parts / self.count, strict=True)), self.terms / self.term_counts


class LikelihoodEvaluation(L.Callback):
    """Evaluates after the last step and in `task=validate`, with averaged weights if there are any.

    Logs `val/bits_per_dim`, or `val/latent_bound`, and under the same name with `_prior`, `_steps` and `_decoder` what
    it is made of; writes `likelihood/step_<step>.csv`, the mean L_t of each time that was looked at.

    Args:
        run_dir: the run's directory.
        num_images: the first so many of the validation images; null for all. `trainer.limit_val_batches` limits them.
        num_times: evaluations of the network for each image, spread over the times; null for all times.

    Raises:
        ValueError: if a number is not positive.
    """

    def __init__(self, run_dir: str, num_images: int | None = 256, num_times: int | None = 100) -> None:
        for key, value in {"num_images": num_images, "num_times": num_times}.items():
            if value is not None and value < 1:
                raise ValueError(
                    f"{key} is {value}; allowed are whole numbers from 1, or null for all; change "
                    f"`callbacks.likelihood.{key}`"
                )
        self.directory = Path(run_dir) / "likelihood"
        self.num_images, self.num_times = num_images, num_times
        self._loaded_step = 0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuses before the first step what could only fail after the last.

        Raises:
            ValueError: if there is no validation image, or the schedule has fewer times than are to be looked at.
        """
        if not self._count(trainer):
            raise ValueError(
                "no likelihood can be measured: found 0 validation images; allowed are 1 or more; change "
                "`data.val_fraction` or `data.val_shards`, or leave the measurement out: `callbacks.likelihood=null`"
            )
        assert isinstance(pl_module, LatentDiffusion)
        strata(pl_module.denoiser.schedule.num_steps - 1, self.num_times)

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The step that `task=validate` judges."""
        self._loaded_step = checkpoint["global_step"]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The trained model's bound."""
        self.evaluate(trainer, pl_module, trainer.global_step)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """In `task=validate`."""
        if trainer.state.fn == "validate":
            self.evaluate(trainer, pl_module, self._loaded_step)

    def evaluate(self, trainer: L.Trainer, pl_module: L.LightningModule, step: int) -> None:
        """Measures and logs; every rank must call it."""
        assert isinstance(pl_module, LatentDiffusion)
        of_pixels = pl_module.likelihood_decoder == "discrete"
        mean = MeanBound(pl_module.denoiser.schedule.num_steps).to(pl_module.device)
        count = self._count(trainer)
        with evaluation_weights(trainer, pl_module), subtask(trainer, "likelihoods bounded", count) as advance:
            for batch in interruptible(trainer, self._batches(trainer, count)):
                moved = move_data_to_device(batch, pl_module.device)
                on_device = trainer.datamodule.on_after_batch_transfer(moved, 0)  # type: ignore[attr-defined]
                with trainer.precision_plugin.forward_context():
                    bound = self._bound(pl_module, on_device, of_pixels)
                mean.update(bound, on_device["position"] < count)
                advance(len(batch["position"]) * trainer.world_size)
        parts, terms = mean.compute()
        key = "val/bits_per_dim" if of_pixels else "val/latent_bound"
        log_metrics(
            trainer, {key + ("" if name == "total" else f"_{name}"): value for name, value in parts.items()}, step
        )
        if trainer.is_global_zero:
            path = self.directory / f"step_{step:07d}.csv"
            _write(path, terms)
            shown = ", ".join(f"{name} {float(value):.4g}" for name, value in parts.items() if name != "total")
            unit = "bits per dimension" + ("" if of_pixels else " of the latents")
            print(f"step {step}: a bound of {float(parts['total']):.4g} {unit} ({shown}); {path}", flush=True)

    def _bound(self, pl_module: LatentDiffusion, batch: ImageTextBatch, of_pixels: bool) -> Bound:
        """The bound of a batch given its full conditions."""
        return variational_bound(
            pl_module.denoiser,
            pl_module.latents(batch),
            pl_module.condition(batch),
            pl_module.keys(batch),
            decoder=pl_module.likelihood_decoder,
            num_times=self.num_times,
            clip_x_0=1.0 if of_pixels else None,
        )

    def _count(self, trainer: L.Trainer) -> int:
        """Images to measure: no more than a limited validation sees; a limit of 0 only switches its loop off."""
        data, limit = trainer.datamodule, trainer.limit_val_batches  # type: ignore[attr-defined]
        found = len(data.val_index)
        if isinstance(limit, int) and limit:
            found = min(found, limit * data.val_batch_size * trainer.world_size)
        return found if self.num_images is None else min(found, self.num_images)

    def _batches(self, trainer: L.Trainer, count: int) -> Iterator[ImageTextBatch]:
        """This rank's batches of the first `count` validation images; the last may hold others as well."""
        for batch in trainer.datamodule.val_dataloader():  # type: ignore[attr-defined]
            # Where the step of all ranks begins: they end at the same one, with or without images of their own in it.
            if batch["position"].min() - global_rank() >= count:
                return
            yield batch


def _write(path: Path, terms: Tensor) -> None:
    """A row for each time t that was looked at: t and its mean L_t in bits per dimension."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["t", "bits_per_dim"])
        rows.writerows((t, f"{value:.6g}") for t, value in enumerate(terms.tolist()) if value == value)
