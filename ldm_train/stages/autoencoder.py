"""Stage 1: train the autoencoder (Rombach et al. 2022, section 3.1).

One step encodes a batch, draws latents from the posterior with the samples' own noise, decodes, and compares.
Validation takes the posterior's mode, so its figures have no chance in them.

With a discriminator there is still one optimizer and one backward pass, over two groups of parameters: each loss term
reaches one group only, so the gradients are those of two optimizers, `global_step` counts optimizer steps, and
accumulation, clipping (each group by its own norm), precision and DDP work as in every other stage. While the
discriminator waits for its start it has no gradients, and the optimizer leaves it and its moments alone.
"""

import logging
from typing import Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.optim import Optimizer
from torchmetrics import MeanMetric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure

from ldm_train.batch import ImageTextBatch, LatentFacts
from ldm_train.checkpoint import check_digest, digest, drop_prefixes, strict_load
from ldm_train.distributed import mean_figures, world_size
from ldm_train.metrics import CodebookUsage, LatentStatistics
from ldm_train.nn import Autoencoder, AutoencoderLoss, Clock, PatchDiscriminator
from ldm_train.randomness import Stream, normal
from ldm_train.stages.moments import refuse_cached
from ldm_train.stages.optimization import OptimizerFactory, SchedulerFactory, clip_groups, optimizers, trainable

_RANGE = (-1.0, 1.0)
_PERCEPTUAL = "loss.perceptual."
_log = logging.getLogger(__name__)


class AutoencoderStage(L.LightningModule):
    """Trains an autoencoder on images.

    Args:
        autoencoder: the network.
        loss: compares images with reconstructions.
        optimizer: parameters -> optimizer.
        lr_scheduler: optimizer -> learning rate curve, or `None`.
        seed: the run's seed, keys the posterior's noise.
        image_size: height and width of the images, pixels.
        trains: `all`, or the `decoder` alone: latents, and what was trained on them, stay valid then.
        discriminator_lr: learning rate of the discriminator; `None` for the autoencoder's.
    """

    not_averaged = ("loss.",)

    def __init__(
        self,
        autoencoder: Autoencoder,
        loss: AutoencoderLoss,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        seed: int,
        image_size: int,
        trains: Literal["all", "decoder"] = "all",
        discriminator_lr: float | None = None,
    ) -> None:
        super().__init__()
        _check(autoencoder, loss, image_size, trains, discriminator_lr)
        self.autoencoder = autoencoder
        self.loss = loss
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.seed = seed
        self.image_size = image_size
        self.trains = trains
        self.discriminator_lr = discriminator_lr
        encoding = [autoencoder.encoder, autoencoder.to_moments, autoencoder.regularizer]
        self._frozen: list[nn.Module] = encoding if trains == "decoder" else []
        measured = loss.perceptual is not None and loss.perceptual.weight
        self._perceptual_digest = digest(loss.perceptual) if loss.perceptual is not None and measured else None
        for part in self._frozen:
            part.requires_grad_(False).eval()
        # PSNR is the mean over images of each image's own value; both metrics take images in [-1, 1].
        self.psnr = PeakSignalNoiseRatio(data_range=_RANGE, dim=(1, 2, 3), reduction="elementwise_mean")
        self.ssim = StructuralSimilarityIndexMeasure(data_range=_RANGE)
        self.lpips = MeanMetric()
        regularizer, channels = autoencoder.regularizer, autoencoder.latent_channels
        self.latent_statistics = LatentStatistics(channels, with_divergence=regularizer.codebook_size is None)
        self.codebook = CodebookUsage(regularizer.codebook_size) if regularizer.codebook_size else None
        self._images_seen = 0  # up to the present batch
        self._clock = Clock(step=-1, images=0)
        # Lightning would refuse checkpoints without the frozen parts; `on_load_checkpoint` is stricter than it.
        self.strict_loading = False

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """One reconstruction and its loss."""
        image = batch["image"]  # (B, 3, H, W)
        reconstruction, regularized = self.autoencoder(image, self._posterior_noise(batch))
        terms = self.loss(image, reconstruction, regularized, self.autoencoder.last_weight, self._advanced_clock(image))
        logged = {"loss": terms.total, "latent_std": regularized.z.detach().float().std()}
        logged |= terms.log | regularized.log
        self.log_dict({f"train/{name}": value for name, value in mean_figures(logged).items()})
        return terms.total

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> Tensor:
        """Reconstruction quality on images never trained on; returns the reconstructions (B, 3, H, W) in [-1, 1]."""
        image, size = batch["image"], len(batch["image"])
        moments, regularizer = self.autoencoder.moments(image), self.autoencoder.regularizer
        regularized = regularizer(moments, None)
        decoded = self.autoencoder.decode_raw(regularized.z)
        reconstruction = decoded.float().clamp(*_RANGE)
        terms = self.loss.without_adversary(image, decoded, regularized)
        for name, value in ({"loss": terms.total} | terms.log).items():
            self.log(f"val/{name}", value, batch_size=size, sync_dist=True)
        for name, metric in (("psnr", self.psnr), ("ssim", self.ssim)):
            metric.update(reconstruction, image)
            self.log(f"val/{name}", metric, batch_size=size)
        if self.loss.perceptual is not None and self.loss.perceptual.weight:
            self.lpips.update(self.loss.perceptual(image, reconstruction))
            self.log("val/lpips", self.lpips, batch_size=size)
        self.latent_statistics.update(regularizer.mode(moments), regularizer.variance(moments))
        if self.codebook is not None:
            self.codebook.update(regularized.indices)
        return reconstruction

    def check_data(self, facts: LatentFacts | None) -> None:
        """Refuse, with ValueError, cached latents; `facts` are theirs, `None` where the data are images."""
        refuse_cached(facts, "train stage 2 on it: `stage=latent_diffusion`")

    def on_validation_epoch_end(self) -> None:
        """Log what is known about the latents: mean, standard deviation and divergence of each channel."""
        for name, values in self.latent_statistics.compute()._asdict().items():
            for channel, value in enumerate([] if values is None else values.float().reshape(-1)):
                # Of all ranks already; saying so spares Lightning's warning.
                self.log(f"val/latent_{name}/{channel:02d}", value, sync_dist=True)
        self.latent_statistics.reset()
        if self.codebook is not None:
            for name, value in self.codebook.compute()._asdict().items():
                self.log(f"val/codebook_{name}", value.float(), sync_dist=True)
            self.codebook.reset()

    def on_fit_start(self) -> None:
        """Say aloud that a discriminator will never begin."""
        adversarial, steps = self.loss.adversarial, self.trainer.max_steps
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if adversarial is None or data is None or steps < 0 or not self.trainer.is_global_zero:
            return
        images = data.global_batch_size * self.trainer.accumulate_grad_batches  # a step
        # The last step's clock: what came before it.
        if not adversarial.reaches_generator(Clock(steps - 1, (steps - 1) * images)):
            _log.warning(
                "the discriminator learns from %d %s on and would reach the autoencoder at %d, but this run of %d "
                "steps (%d images) ends before; change `adversarial.start`, `adversarial.warmup` or "
                "`trainer.max_steps`",
                *(adversarial.start, adversarial.unit, adversarial.start + adversarial.warmup, steps, steps * images),
            )

    @torch.no_grad()
    def latent_moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and variance of the posterior, each (B, C, h, w), before normalisation."""
        moments = self.autoencoder.moments(image).float()
        return self.autoencoder.regularizer.mode(moments), self.autoencoder.regularizer.variance(moments)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer: the autoencoder's parameters, and the discriminator's at their own rate."""
        groups: list[dict[str, Any]] = [{"params": trainable(self.autoencoder)}]
        if self.loss.adversarial is not None:
            rate = {} if self.discriminator_lr is None else {"lr": self.discriminator_lr}
            groups.append({"params": list(self.loss.adversarial.discriminator.parameters()), **rate})
        return optimizers(groups, self.optimizer, self.lr_scheduler)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """A discriminator that has not started must not be stepped: decay and moments would run on zeros."""
        adversarial = self.loss.adversarial
        if adversarial is not None and not adversarial.is_active(self._clock):
            for parameter in adversarial.discriminator.parameters():
                parameter.grad = None

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each group by its own norm, so that neither player scales the other's gradients."""
        clip_groups(optimizer, gradient_clip_val, gradient_clip_algorithm)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen backbone of LPIPS out, keep its identity; keep the count of images."""
        checkpoint["state_dict"] = drop_prefixes(checkpoint["state_dict"], (_PERCEPTUAL,))
        checkpoint["images_seen"] = self._images_seen
        checkpoint["frozen"] = {} if self._perceptual_digest is None else {"perceptual": self._perceptual_digest}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other parameters, or one trained with another perceptual backbone."""
        found = checkpoint.get("frozen", {}).get("perceptual")
        if self._perceptual_digest is not None and found is not None:
            check_digest("perceptual backbone", self._perceptual_digest, found, "perceptual.backbone")
        strict_load(self, checkpoint["state_dict"], allowed_missing=(_PERCEPTUAL,))
        self._images_seen = checkpoint.get("images_seen", 0)

    def train(self, mode: bool = True) -> "AutoencoderStage":
        """Switch everything but the frozen parts, which stay in evaluation mode: a codebook is not maintained then."""
        super().train(mode)
        for part in self._frozen:
            part.eval()
        return self

    def parts(self) -> dict[str, nn.Module]:
        """The named parts of the start-up summary."""
        parts: dict[str, nn.Module] = {"encoder": self.autoencoder.encoder, "decoder": self.autoencoder.decoder}
        if self.autoencoder.regularizer.codebook_size is not None:
            parts["codebook"] = self.autoencoder.regularizer
        if self.loss.adversarial is not None:
            parts["discriminator"] = self.loss.adversarial.discriminator
        if self.loss.perceptual is not None:
            parts["perceptual"] = self.loss.perceptual
        return parts

    def facts(self) -> dict[str, object]:
        """What the start-up summary tells besides sizes: the regularizer's weight under both reductions, the phases."""
        regularizer, adversarial = self.autoencoder.regularizer, self.loss.adversarial
        pixels = self.autoencoder.in_channels * self.image_size**2
        latents = self.autoencoder.latent_channels * (self.image_size // self.autoencoder.downsampling_factor) ** 2
        other = "mean" if regularizer.reduction == "sum" else "sum"
        facts: dict[str, object] = {
            "regularizer": f"{type(regularizer).__name__}, weight {regularizer.weight:.4g} with reduction "
            f"{regularizer.reduction}, which is {regularizer.equivalent_weight(pixels, latents):.4g} with {other} "
            f"({pixels:,} pixel values, {latents:,} latents an image)"
        }
        if adversarial is not None:
            begins, reaches = adversarial.start, adversarial.start + adversarial.warmup
            facts["discriminator"] = f"learns from {begins:,} {adversarial.unit}, reaches the decoder from {reaches:,}"
        return facts

    def _advanced_clock(self, image: Tensor) -> Clock:
        # All batches that are accumulated into one step see one clock.
        if self.global_step != self._clock.step:
            self._clock = Clock(self.global_step, self._images_seen)
        self._images_seen += len(image) * world_size()
        return self._clock

    def _posterior_noise(self, batch: ImageTextBatch) -> Tensor:
        height, width = batch["image"].shape[-2:]
        factor = self.autoencoder.downsampling_factor
        shape = (self.autoencoder.latent_channels, height // factor, width // factor)
        return normal(self.seed, batch["epoch"], batch["sample_id"], Stream.POSTERIOR, shape)


def _check(
    autoencoder: Autoencoder, loss: AutoencoderLoss, image_size: int, trains: str, discriminator_lr: float | None
) -> None:
    """Refuse, with ValueError, what would fail only after many steps, or never and be wrong."""
    factor = autoencoder.downsampling_factor
    if image_size % factor:
        raise ValueError(
            f"images are {image_size} x {image_size}; allowed are multiples of {factor}, the autoencoder's "
            "downsampling factor f; change `image_size`, or choose another `autoencoder`"
        )
    if loss.adversarial is not None and isinstance(loss.adversarial.discriminator, PatchDiscriminator):
        loss.adversarial.discriminator.require_size(image_size, image_size)
    if loss.perceptual is not None and loss.perceptual.weight:
        loss.perceptual.require_size(image_size, image_size)
    if trains not in ("all", "decoder"):
        raise ValueError(f"trains is {trains!r}; allowed are all and decoder; change `stage.trains`")
    if trains == "decoder" and not autoencoder.is_calibrated:
        raise ValueError(
            "the decoder alone is to be trained, of an autoencoder whose latents were never measured; allowed is a "
            "finished one: of stage 1, or made by tools/convert.py or tools/calibrate_latents.py; set "
            "`stage.autoencoder.checkpoint` to it, or `stage.trains=all`"
        )
    if discriminator_lr is not None and discriminator_lr <= 0:
        raise ValueError(
            f"discriminator_lr is {discriminator_lr}; allowed are numbers above 0, and null for the autoencoder's; "
            "change `stage.discriminator_lr`"
        )
