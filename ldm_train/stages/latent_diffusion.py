"""Stage 2: train the denoiser in the latent space of a frozen autoencoder (Rombach et al. 2022, eq. 3).

    L = E_{x, c, t, noise} [ w(t) || target - network(x_t, t, condition(c)) ||^2 ],   x_t = alpha_t E(x) + sigma_t noise

The stage conducts: latents, condition, objective. What the network predicts is the denoiser's affair, how images are
made the sampler's and the guidance's; averaging, pictures and FID belong to callbacks.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch, LatentFacts
from ldm_train.checkpoint import check_digest, digest, drop_prefixes, strict_load
from ldm_train.conditioning import Conditioner
from ldm_train.diffusion import (
    ClassifierFreeGuidance,
    Decoder,
    Denoiser,
    DiffusionLoss,
    DiffusionObjective,
    InpaintingDenoiser,
    Sampler,
    SamplerState,
    add_noise,
)
from ldm_train.distributed import global_rank, mean_figures, world_size
from ldm_train.nn import FirstStage, Pixels
from ldm_train.randomness import SampleKeys, Stream, normal, random_words
from ldm_train.stages.moments import Moments
from ldm_train.stages.optimization import OptimizerFactory, SchedulerFactory, optimizers, trainable


class Original(NamedTuple):
    """An image that generation begins with instead of with noise alone.

    Attributes:
        image: (B, 3, H, W) in [-1, 1].
        strength: the share of the sampler's steps to be made, in (0, 1]: how much of the image is given up.
        known: (B, 1, H, W) float, 1 where the image must stay and 0 where something new is wanted; `None`: nowhere must
            it stay.
    """

    image: Tensor
    strength: float = 1.0
    known: Tensor | None = None

    def put_into(self, batch: ImageTextBatch) -> ImageTextBatch:
        """A batch with these images, and with their holes for conditioners that were trained on holes."""
        batch = batch | {"image": self.image}
        return batch if self.known is None else batch | {"hole": 1.0 - self.known}


class LatentDiffusion(L.LightningModule):
    """Trains a denoiser, and a conditioner with trainable parameters, on the latents of images.

    Args:
        denoiser: network, schedule and prediction.
        autoencoder: the first stage, trained and calibrated; frozen here and left out of checkpoints, which keep its
            digest. So are the conditioner's frozen parts.
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
        compile_network: compile the network at its first use; in place, so that the names of its weights stay.

    Raises:
        ValueError: for an unknown `posterior`, or for parts that contradict each other: what the conditioner gives is
            not what the network takes, the sampler or the objective does not fit the schedule or the variance, there is
            nothing that guidance could leave out.
        RuntimeError: if the autoencoder is not calibrated.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        autoencoder: FirstStage,
        conditioner: Conditioner,
        objective: DiffusionObjective,
        sampler: Sampler,
        guidance: ClassifierFreeGuidance,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        moments: Moments,
        posterior: Literal["sample", "mode"],
        seed: int,
        compile_network: bool = False,
    ) -> None:
        super().__init__()
        autoencoder.require_calibration()
        if posterior not in ("sample", "mode"):
            raise ValueError(f"posterior is {posterior!r}; allowed are sample and mode; change `stage.posterior`")
        _check_widths(denoiser.network, autoencoder, conditioner)
        _check_sampling(denoiser, conditioner, sampler, guidance)
        objective.check(denoiser)
        if compile_network:
            denoiser.network.compile()
        self.denoiser = denoiser
        self.autoencoder = autoencoder.requires_grad_(False).eval()  # type: ignore[attr-defined]
        self.conditioner = conditioner
        self.objective = objective
        self.sampler = sampler
        self.guidance = guidance
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.moments = moments
        self.posterior = posterior
        self.seed = seed
        _check_decoder(objective, denoiser, self.likelihood_decoder)
        self._has_dropout = any(isinstance(part, nn.Dropout) and part.p > 0 for part in self.modules())
        self.frozen = {"autoencoder": self.autoencoder}
        self.frozen |= {f"conditioner.{name}": conditioner.get_submodule(name) for name in conditioner.frozen_parts}
        self.digests = {name: digest(part) for name, part in self.frozen.items()}
        # Lightning would refuse checkpoints without the frozen parts; `on_load_checkpoint` is stricter than it.
        self.strict_loading = False

    def training_step(self, batch: ImageTextBatch, batch_idx: int) -> dict[str, Tensor]:
        """One noising, one prediction, one loss; with the times and their errors, for those who watch."""
        if self._has_dropout:
            self._seed_dropout(batch["epoch"], batch_idx)
        loss = self._loss(batch, self.conditioner.draw_drop(self.seed, batch["epoch"], batch["sample_id"]))
        self.log_dict(mean_figures({"train/loss": loss["loss"]}))
        return loss

    def validation_step(self, batch: ImageTextBatch, batch_idx: int) -> dict[str, Tensor]:
        """The loss on images never trained on, with noise and times that never change."""
        loss = self._loss(batch, None)
        self.log("val/loss", loss["loss"], batch_size=len(batch["sample_id"]), sync_dist=True)
        return loss

    def check_data(self, facts: LatentFacts | None) -> None:
        """Refuse, with ValueError, data that do not fit: cached latents of another encoder, or none where some must be.

        Args:
            facts: of the cached latents; `None`: the data are images.
        """
        self.moments.check(self.autoencoder, facts)
        if facts is not None and self.conditioner.needs_pixels:
            raise ValueError(
                f"{type(self.conditioner).__name__} looks at the pixels of images, and {facts.folder} holds latents "
                "alone; allowed are conditioners of captions and labels; change `conditioner`, or take images: "
                "`data=webdataset` and `stage.moments._target_=ldm_train.stages.EncodedMoments`"
            )

    def condition(self, batch: ImageTextBatch, drop: Tensor | None = None) -> Conditioning:
        """What the network is conditioned on, for the B examples of a batch; `drop` (B,) marks null conditions."""
        return self.conditioner(batch, self.autoencoder, drop)

    @property
    def likelihood_decoder(self) -> Decoder:
        """What the last step of the chain ends in: 8-bit pixels, or latents."""
        return "discrete" if isinstance(self.autoencoder, Pixels) else "gaussian"

    def keys(self, batch: ImageTextBatch) -> SampleKeys:
        """What keys every draw made for a batch."""
        return SampleKeys(self.seed, batch["epoch"], batch["sample_id"], batch["position"])

    @torch.no_grad()
    def latents(self, batch: ImageTextBatch) -> Tensor:
        """Normalised latents of a batch's images, a draw with the samples' own noise or the mode: (B, C, h, w)."""
        moments, regularizer = self.moments(self.autoencoder, batch), self.autoencoder.regularizer
        if self.posterior == "mode":
            return self.autoencoder.normalise(regularizer.mode(moments)).float()
        noise = self._keyed_normal(moments.shape[-2:], batch["epoch"], batch["sample_id"], Stream.POSTERIOR)
        return self.autoencoder.normalise(regularizer.draw(moments, noise)).float()

    @torch.no_grad()
    def generate(
        self,
        batch: ImageTextBatch,
        seeds: Tensor,
        negative: ImageTextBatch | None = None,
        original: Original | None = None,
        watch: Callable[[SamplerState], None] | None = None,
    ) -> Tensor:
        """Sample one image per condition of a batch, of the size of its images.

        Args:
            batch: the conditions; its pixels matter to conditioners that look at images alone.
            seeds: (B,) int64, one for each image; equal seeds give equal noise.
            negative: conditions to be guided away from, in the place of the null condition.
            original: images to begin with, and what of them must stay.
            watch: is shown the sampler's state after each step.

        Returns:
            (B, 3, H, W) in [-1, 1].
        """
        if negative is not None and self.guidance.scale == 1.0:
            raise ValueError(
                "a negative condition is given and the guidance scale is 1; allowed are scales other than 1, without "
                "which nothing is guided away from it; change `guidance.scale`"
            )
        if original is not None:
            batch, negative = original.put_into(batch), negative and original.put_into(negative)
        away = self.conditioner.null(batch, self.autoencoder) if negative is None else self.condition(negative)
        denoiser, start = self.guidance(self.denoiser, away), 0
        factor = self.autoencoder.downsampling_factor
        size = [pixels // factor for pixels in batch["image"].shape[-2:]]
        x = self._keyed_normal(size, 0, seeds, Stream.SAMPLING)
        if original is not None:
            x_0 = self.autoencoder.encode(original.image).float()
            start = self.sampler.start_of(original.strength)
            if start > 0:
                t = torch.full_like(seeds, self.sampler.start_time(denoiser.schedule, start))
                x = add_noise(denoiser.schedule, x_0, x, t)
            if original.known is not None:
                denoiser = InpaintingDenoiser(denoiser, x_0, _wholly_known(original.known, x_0))
        for state in self.sampler.trajectory(denoiser, x, self.condition(batch), self.seed, seeds, start):
            x = state.x_t
            if watch is not None:
                watch(state)
        images = self.autoencoder.decode(x).clamp(-1.0, 1.0)
        if original is None or original.known is None:
            return images
        # What the autoencoder makes of the known pixels is not quite what they were.
        return torch.where(original.known > 0, original.image, images)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """One optimizer over all trainable parameters."""
        return optimizers(trainable(self), self.optimizer, self.lr_scheduler)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave the frozen parts out; keep their identity."""
        checkpoint["state_dict"] = drop_prefixes(checkpoint["state_dict"], self._frozen_prefixes)
        checkpoint["frozen"] = dict(self.digests)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of other parameters, or one trained with other frozen parts."""
        found = checkpoint.get("frozen", {})
        for name, own in self.digests.items():
            key = "stage.autoencoder.checkpoint" if name == "autoencoder" else f"{name}.weights"
            check_digest(name, own, found.get(name), key)
        strict_load(self, checkpoint["state_dict"], allowed_missing=self._frozen_prefixes)

    def train(self, mode: bool = True) -> "LatentDiffusion":
        """Switch everything but the frozen parts, which stay in evaluation mode."""
        super().train(mode)
        for part in self.frozen.values():
            part.eval()
        return self

    @property
    def _frozen_prefixes(self) -> tuple[str, ...]:
        return tuple(f"{name}." for name in self.frozen)

    def parts(self) -> dict[str, nn.Module]:
        """The named parts of the start-up summary."""
        return {"unet": self.denoiser.network, "conditioner": self.conditioner, "autoencoder": self.autoencoder}

    def _loss(self, batch: ImageTextBatch, drop: Tensor | None) -> dict[str, Tensor]:
        found: DiffusionLoss = self.objective(
            self.denoiser, self.latents(batch), self.condition(batch, drop), self.keys(batch)
        )
        return {"loss": found.per_example.mean(), "t": found.t, "square_error": found.square_error}

    def _seed_dropout(self, epoch: int, batch_idx: int) -> None:
        """Let the masks, which torch draws, be a function of (seed, epoch, step, rank)."""
        step = torch.tensor([batch_idx * world_size() + global_rank()])
        low, high = random_words(self.seed, epoch, step, Stream.DROPOUT, 2)[0].tolist()
        torch.manual_seed(low | high << 32)

    def _keyed_normal(self, size: Sequence[int], epoch: int, ids: Tensor, stream: Stream) -> Tensor:
        return normal(self.seed, epoch, ids, stream, (self.autoencoder.latent_channels, *size))


def _wholly_known(known: Tensor, x_0: Tensor) -> Tensor:
    """The mask (B, 1, H, W) for latents (B, C, h, w): a latent is known if all its pixels are: (B, 1, h, w)."""
    return 1.0 - F.adaptive_max_pool2d(1.0 - known, x_0.shape[-2:])


def _check_sampling(
    denoiser: Denoiser, conditioner: Conditioner, sampler: Sampler, guidance: ClassifierFreeGuidance
) -> None:
    """Refuse, with ValueError, what would fail or mean nothing only when the first images are made."""
    sampler.steps(denoiser.schedule)
    conditions = (conditioner.context_dim, conditioner.vector_dim, conditioner.concat_channels)
    if guidance.scale != 1.0 and not any(conditions):
        raise ValueError(
            f"the guidance scale is {guidance.scale} and the conditioner gives no condition to leave out; allowed is "
            "1; set `guidance=none`"
        )


def _check_decoder(objective: DiffusionObjective, denoiser: Denoiser, needed: Decoder) -> None:
    """Refuse, with ValueError, to learn a variance from the likelihood of another kind of data."""
    if denoiser.variance == "learned" and objective.decoder != needed:
        raise ValueError(
            f"decoder is {objective.decoder}; allowed is {needed}: discrete for 8-bit pixels (`autoencoder=pixels`), "
            "gaussian for latents; change `objective.decoder`"
        )


def _check_widths(network: nn.Module, first_stage: FirstStage, conditioner: Conditioner) -> None:
    """Refuse, with ValueError, a network that takes something else than it will get."""
    conditioner.check(first_stage)
    given = {
        "in_channels": (first_stage.latent_channels, "the first stage", "autoencoder.latent_channels"),
        "context_dim": (conditioner.context_dim, "the conditioner", "conditioner.context_dim"),
        "concat_channels": (conditioner.concat_channels, "the conditioner", "conditioner.concat_channels"),
    }
    if network.vector_dim is not None:  # a network may well ignore a vector
        given["vector_dim"] = (conditioner.vector_dim, "the conditioner", "conditioner.vector_dim")
    for name, (found, owner, key) in given.items():
        if found != getattr(network, name):
            raise ValueError(
                f"{owner} gives {key.split('.')[1]} {found}, the network takes {name} {getattr(network, name)}; "
                f"allowed are equal ones; change `{key}` or `unet.{name}`"
            )
