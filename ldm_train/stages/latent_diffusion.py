"""Stage 2: train the denoiser in the latent space of a frozen autoencoder (Rombach et al. 2022, eq. 3).

    L = E_{x, c, t, noise} [ w(t) || target - network(x_t, t, condition(c)) ||^2 ],   x_t = alpha_t E(x) + sigma_t noise

The stage conducts: latents, condition, objective. What the network predicts is the denoiser's affair, how images are
made the sampler's and the guidance's; averaging, pictures and FID belong to callbacks.
"""

from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ldm_train.batch import ImageTextBatch
from ldm_train.checkpoint import check_digest, digest, drop_prefixes, strict_load
from ldm_train.conditioning import Conditioner
from ldm_train.diffusion import ClassifierFreeGuidance, DDIMSampler, Denoiser, DiffusionObjective
from ldm_train.nn import Autoencoder
from ldm_train.randomness import Stream, normal
from ldm_train.stages.moments import Moments
from ldm_train.stages.optimization import OptimizerFactory, SchedulerFactory, optimizers, trainable

_FROZEN = ("autoencoder.",)


class LatentDiffusion(L.LightningModule):
    """Trains a denoiser, and a conditioner with trainable parameters, on the latents of images.

    Args:
        denoiser: network, schedule and prediction.
        autoencoder: trained and calibrated; frozen here and left out of checkpoints, which keep its digest.
        conditioner: batch -> conditioning.
        objective: the training loss.
        sampler: how images are generated.
        guidance: wraps the denoiser for sampling.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> learning rate curve, or `None`.
        moments: where the moments of the images' posterior come from, see `ldm_train.stages.moments`.
        posterior: take the latents as a `sample` of the autoencoder's posterior, as published, or its `mode`, which a
            small model learns faster where the posterior is wide.
        seed: the run's seed, keys every random draw.

    Raises:
        ValueError: for an unknown `posterior`.
        RuntimeError: if the autoencoder is not calibrated.
        ValueError: if the conditioner's context is not as wide as the network's cross-attention.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: Autoencoder,
        conditioner: Conditioner,
        objective: DiffusionObjective,
        sampler: DDIMSampler,
        guidance: ClassifierFreeGuidance,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        moments: Moments,
        posterior: Literal["sample", "mode"],
        seed: int,
    ) -> None:
        super().__init__()
        autoencoder.require_calibration()
        if posterior not in ("sample", "mode"):
            raise ValueError(f"posterior is {posterior!r}; allowed are sample and mode; change `stage.posterior`")
        if conditioner.context_dim != denoiser.network.context_dim:
            raise ValueError(
                f"the conditioner gives context of width {conditioner.context_dim}, the network attends to width "
                f"{denoiser.network.context_dim}; allowed are equal widths; change `conditioner.context_dim` or "
                "`unet.context_dim`"
            )
        self.denoiser = denoiser
        self.autoencoder = autoencoder.requires_grad_(False).eval()
        self.conditioner = conditioner
        self.objective = objective
        self.sampler = sampler
        self.guidance = guidance
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.moments = moments
        self.posterior = posterior
        self.seed = seed
        self.autoencoder_digest = digest(autoencoder)
        # Lightning would refuse checkpoints without the frozen parts; `on_load_checkpoint` is stricter than it.
        self.strict_loading = False

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """One noising, one prediction, one loss."""
        drop = self.conditioner.draw_drop(self.seed, batch["epoch"], batch["sample_id"])
        loss = self._loss(batch, drop)
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> None:
        """The loss on images never trained on, with noise and times that never change."""
        self.log("val/loss", self._loss(batch, None), batch_size=len(batch["image"]), sync_dist=True)

    @torch.no_grad()
    def latents(self, batch: ImageTextBatch) -> Tensor:
        """Normalised latents of a batch's images, a draw with the samples' own noise or the mode: (B, C, h, w)."""
        moments, regularizer = self.moments(self.autoencoder, batch), self.autoencoder.regularizer
        if self.posterior == "mode":
            return self.autoencoder.normalise(regularizer.mode(moments)).float()
        noise = self._keyed_normal(batch, batch["epoch"], batch["sample_id"], Stream.POSTERIOR)
        return self.autoencoder.normalise(regularizer.draw(moments, noise)).float()

    @torch.no_grad()
    def generate(self, batch: ImageTextBatch, seeds: Tensor) -> Tensor:
        """Sample one image per condition of a batch, of the size of its images.

        Args:
            batch: the conditions; the pixels of its images are used by no text-conditional model.
            seeds: (B,) int64, one for each image; equal seeds give equal noise.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        denoiser = self.guidance(self.denoiser, self.conditioner.null(batch))
        x_T = self._keyed_normal(batch, 0, seeds, Stream.SAMPLING)
        latents = self.sampler(denoiser, x_T, self.conditioner(batch), self.seed, seeds)
        return self.autoencoder.decode(latents).clamp(-1.0, 1.0)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over all trainable parameters."""
        return optimizers(trainable(self), self.optimizer, self.lr_scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen autoencoder out; keep its identity."""
        checkpoint["state_dict"] = drop_prefixes(checkpoint["state_dict"], _FROZEN)
        checkpoint["frozen"] = {"autoencoder": self.autoencoder_digest}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other parameters, or one trained on another autoencoder."""
        found = checkpoint.get("frozen", {}).get("autoencoder")
        check_digest("autoencoder", self.autoencoder_digest, found, "stage.autoencoder.checkpoint")
        strict_load(self, checkpoint["state_dict"], allowed_missing=_FROZEN)

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Switch everything but the frozen autoencoder, which stays in evaluation mode."""
        super().train(mode)
        self.autoencoder.eval()
        return self

    def parts(self) -> dict[str, nn.Module]:
        """The named parts of the start-up summary."""
        return {"unet": self.denoiser.network, "conditioner": self.conditioner, "autoencoder": self.autoencoder}

    def _loss(self, batch: ImageTextBatch, drop: Tensor | None) -> Tensor:
        conditioning = self.conditioner(batch, drop)
        draws = (self.seed, batch["epoch"], batch["sample_id"])
        return self.objective(self.denoiser, self.latents(batch), conditioning, *draws).per_example.mean()

    def _keyed_normal(self, batch: ImageTextBatch, epoch: int, ids: Tensor, stream: Stream) -> Tensor:
        height, width = batch["image"].shape[-2:]
        factor = self.autoencoder.downsampling_factor
        shape = (self.autoencoder.latent_channels, height // factor, width // factor)
        return normal(self.seed, epoch, ids, stream, shape)
