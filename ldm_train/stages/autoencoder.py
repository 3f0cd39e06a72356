"""Stage 1: train the autoencoder (Rombach et al. 2022, section 3.1).

One step encodes a batch, draws latents from the posterior with the samples' own noise, decodes, and compares.
Validation takes the posterior's mode, so its figures have no chance in them.
"""

from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm_train.batch import ImageTextBatch
from ldm_train.checkpoint import strict_load
from ldm_train.nn import Autoencoder, AutoencoderLoss
from ldm_train.randomness import Stream, normal
from ldm_train.stages.optimization import OptimizerFactory, SchedulerFactory, optimizers

_RANGE = (-1.0, 1.0)


class AutoencoderStage(L.LightningModule):
    """Trains an autoencoder on images.

    Args:
        autoencoder: the network.
        loss: compares images with reconstructions.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> learning rate curve, or `None`.
        seed: the run's seed, keys the posterior's noise.
    """

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: AutoencoderLoss,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        seed: int,
    ) -> None:
        super().__init__()
        self.autoencoder = autoencoder
        self.loss = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        # PSNR is the mean over images of each image's own value; both metrics take images in [-1, 1].
        self.psnr = PeakSignalNoiseRatio(data_range=_RANGE, dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=_RANGE)

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """One reconstruction and its loss."""
        image = batch["image"]  # (B, 3, H, W)
        reconstruction, regularized = self.autoencoder(image, self._posterior_noise(batch))
        terms = self.loss(image, reconstruction, regularized)
        logged = {"loss": terms.total, "loss_pixel": terms.pixel, "loss_regularizer": terms.regularizer}
        self.log_dict({f"train/{name}": value for name, value in (logged | regularized.log).items()})
        return terms.total

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        """Reconstruction quality on images never trained on."""
        image, size = batch["image"], len(batch["image"])
        reconstruction, regularized = self.autoencoder(image)
        terms = self.loss(image, reconstruction, regularized)
        self.log("val/loss", terms.total, batch_size=size, sync_dist=True)
        self.log("val/loss_pixel", terms.pixel, batch_size=size, sync_dist=True)
        for name, metric in (("psnr", self.psnr), ("ssim", self.ssim)):
            metric.update(reconstruction.float().clamp(*_RANGE), image)
            self.log(f"val/{name}", metric, batch_size=size)

    @torch.no_grad()
    def reconstruct(self, image: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] through the posterior's mode and back, clamped to that range."""
        return self.autoencoder(image)[0].float().clamp(*_RANGE)

    @torch.no_grad()
    def latent_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the posterior, each (B, C, h, w), before normalisation."""
        moments = self.autoencoder.moments(image).float()
        return self.autoencoder.regularizer.mode(moments), self.autoencoder.regularizer.variance(moments)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over the autoencoder."""
        return optimizers(self, self.optimizer, self.lr_scheduler)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other parameters."""
        strict_load(self, checkpoint["state_dict"])

    def parts(self) -> dict[str, nn.Module]:
        """The named parts of the start-up summary."""
        return {"encoder": self.autoencoder.encoder, "decoder": self.autoencoder.decoder}

    def _posterior_noise(self, batch: ImageTextBatch) -> Tensor:
        height, width = batch["image"].shape[-2:]
        factor = self.autoencoder.downsampling_factor
        shape = (self.autoencoder.latent_channels, height // factor, width // factor)
        return normal(self.seed, batch["epoch"], batch["sample_id"], Stream.POSTERIOR, shape)
