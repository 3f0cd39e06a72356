"""Degraded images: what is left of an image after blur and a loss of resolution, for super-resolution and deblurring.

    y = sqrt(1 - l^2) D(G_s * x) + l xi,   xi ~ N(0, I)

G_s is a Gaussian of s pixels, D takes away a factor of the resolution, l is the level of the noise augmentation: real
inputs, and the outputs of another model, never look exactly like the degraded images of the training, and a little
noise hides the difference (Ho et al. 2022, "Cascaded diffusion models", section 4.2, with l^2 the noise variance of
their time s). The model is told l. Blur, level and noise of a sample are functions of (seed, epoch, sample id); in
validation the epoch is 0, so they never change.

y is concatenated to the latents, either as pixels at their size (Rombach et al. 2022, section 4.4) or encoded by the
first stage. The null condition is zeros.
Letters: B batch, H and W image height and width, f the factor, h and w height and width of the latents.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.nn import FirstStage
from ldm_train.nn.embedding import sinusoidal_embedding
from ldm_train.randomness import Stream, normal, uniform

_IMAGE_CHANNELS = 3
_LEVEL_SCALE = 1000.0  # levels of 0 to 1 are embedded like times of 0 to 1000
_REACH = 3.0  # standard deviations to which a Gaussian is cut


class DegradedImageConditioner(Conditioner):
    """A degraded copy of the image beside the latents.

    Args:
        seed: the run's seed.
        factor: f, by which height and width become smaller; 1 keeps the resolution.
        blur: least and largest standard deviation of the Gaussian in pixels of the image; drawn uniformly in between.
        max_noise: largest level of the noise augmentation, below 1; drawn uniformly from 0. 0 adds none.
        sampling_noise: the level in evaluation mode; `None` draws it there too.
        concat_as: `pixels`: resampled to the size of the latents; `latents`: enlarged to H x W and encoded.
        concat_channels: channels beside the latents: 3 for pixels, those of the latents for latents.
        vector_dim: width of the sinusoids that tell the noise level, even; `None` if no noise is added.
        drop_rate: the share of training images whose condition is replaced by the null one.

    Raises:
        ValueError: if an argument is out of its range, or two contradict each other.
    """

    needs_pixels = True

    def __init__(
        self,
        seed: int,
        factor: int = 4,
        blur: Sequence[float] = (0.0, 0.0),
        max_noise: float = 0.0,
        sampling_noise: float | None = None,
        concat_as: Literal["pixels", "latents"] = "pixels",
        concat_channels: int = _IMAGE_CHANNELS,
        vector_dim: int | None = None,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(drop_rate)
        _check(factor >= 1, "factor", factor, "whole numbers from 1")
        in_order = len(blur) == 2 and 0.0 <= blur[0] <= blur[-1]
        _check(in_order, "blur", list(blur), "two numbers from 0, the smaller first")
        _check(0.0 <= max_noise < 1.0, "max_noise", max_noise, "0 to below 1")
        level = 0.0 if sampling_noise is None else sampling_noise
        _check(0.0 <= level <= max_noise, "sampling_noise", sampling_noise, f"0 to `max_noise`, {max_noise}, or null")
        _check(concat_as in ("pixels", "latents"), "concat_as", concat_as, "pixels and latents")
        is_right = concat_as == "latents" or concat_channels == _IMAGE_CHANNELS
        _check(is_right, "concat_channels", concat_channels, f"{_IMAGE_CHANNELS} where `concat_as` is pixels")
        is_told = (vector_dim is None) if max_noise == 0.0 else (vector_dim is not None and vector_dim % 2 == 0)
        allowed = "null where `max_noise` is 0" if max_noise == 0.0 else "even numbers where `max_noise` is above 0"
        _check(is_told, "vector_dim", vector_dim, allowed)
        self.seed, self.factor, self.blur = seed, factor, (float(blur[0]), float(blur[1]))
        self.max_noise, self.sampling_noise = max_noise, sampling_noise
        self.concat_as, self.concat_channels, self.vector_dim = concat_as, concat_channels, vector_dim

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """The degraded images and their noise levels; `drop` (B,) bool marks those replaced by zeros.

        Raises:
            ValueError: if the images cannot be made smaller by the factor, or the maps have other channels than stated.
        """
        self.check(first_stage)
        degraded = self.low_resolution(batch)  # (B, 3, H / f, W / f)
        height, width = batch["image"].shape[-2:]
        if self.concat_as == "latents":
            with torch.no_grad():
                concat = first_stage.encode(_resample(degraded, height, width)).to(degraded.dtype)
        else:
            size = first_stage.downsampling_factor
            concat = _resample(degraded, height // size, width // size)
        vector = None
        if self.vector_dim is not None:
            vector = sinusoidal_embedding(_LEVEL_SCALE * self.noise_level(batch), self.vector_dim)
        if drop is not None:
            concat = concat.masked_fill(drop[:, None, None, None], 0.0)
            vector = vector if vector is None else vector.masked_fill(drop[:, None], 0.0)
        return Conditioning(vector=vector, concat=concat)

    def check(self, first_stage: FirstStage) -> None:
        """Compare the channels that are made with those that were stated."""
        made = first_stage.latent_channels if self.concat_as == "latents" else _IMAGE_CHANNELS
        _check(made == self.concat_channels, "concat_channels", self.concat_channels, f"{made}, those of the latents")

    def low_resolution(self, batch: ImageTextBatch) -> Tensor:
        """The degraded images: (B, 3, H / f, W / f), in [-1, 1] but for the noise.

        Raises:
            ValueError: if the factor does not divide height and width.
        """
        images = batch["image"]
        height, width = images.shape[-2:]
        divides = height % self.factor == 0 and width % self.factor == 0
        _check(divides, "factor", self.factor, f"divisors of the images' height {height} and width {width}")
        sigma = self.blur[0] + (self.blur[1] - self.blur[0]) * self._draws(batch)[:, 0]
        with torch.autocast(images.device.type, enabled=False):  # bfloat16 has no room for 8 bits of an image
            blurred = gaussian_blur(images, sigma, self.blur[1])
            small = _resample(blurred, height // self.factor, width // self.factor).clamp(-1.0, 1.0)
        if self.max_noise == 0.0:
            return small
        level = self.noise_level(batch)[:, None, None, None]
        keys = (self.seed, batch["epoch"], batch["sample_id"])
        noise = normal(*keys, Stream.CONDITION_NOISE, tuple(small.shape[1:]))
        return torch.sqrt(1.0 - level.square()) * small + level * noise

    def noise_level(self, batch: ImageTextBatch) -> Tensor:
        """The level of the noise augmentation of each image: (B,) in [0, `max_noise`)."""
        drawn = self.max_noise * self._draws(batch)[:, 1]
        if self.training or self.sampling_noise is None:
            return drawn
        return torch.full_like(drawn, self.sampling_noise)

    def show(self, batch: ImageTextBatch, first_stage: FirstStage) -> Tensor:
        """The degraded images with their pixels enlarged: (B, 3, H, W) in [-1, 1]."""
        size = tuple(batch["image"].shape[-2:])
        return F.interpolate(self.low_resolution(batch), size=size, mode="nearest").clamp(-1.0, 1.0)

    def _draws(self, batch: ImageTextBatch) -> Tensor:
        """(B, 2) uniform numbers: blur and noise level."""
        return uniform(self.seed, batch["epoch"], batch["sample_id"], Stream.DEGRADATION, (2,))


def gaussian_blur(images: Tensor, sigma: Tensor, max_sigma: float) -> Tensor:
    """Blur each of (B, C, H, W) images with a Gaussian of its own.

    Args:
        images: the images.
        sigma: (B,) standard deviations in pixels; 0 changes nothing.
        max_sigma: what none of them exceeds; the kernels reach three times as far, but not across the image.

    Returns:
        (B, C, H, W); beyond the border the border's pixels are repeated.
    """
    radius = min(math.ceil(_REACH * max_sigma), max(images.shape[-2:]))
    if radius == 0:
        return images
    batch, channels, height, width = images.shape
    offsets = torch.arange(-radius, radius + 1, device=images.device, dtype=images.dtype)
    # At a deviation of zero all weights but the centre's underflow to exactly 0.
    weights = torch.exp(-0.5 * (offsets / sigma.clamp_min(1e-3)[:, None]).square())
    kernel = (weights / weights.sum(1, keepdim=True)).repeat_interleave(channels, 0)[:, None]  # (BC, 1, 2r + 1)
    flat = F.pad(images.reshape(1, batch * channels, height, width), [radius] * 4, mode="replicate")
    flat = F.conv2d(flat, kernel[..., None, :], groups=batch * channels)
    return F.conv2d(flat, kernel[..., None], groups=batch * channels).reshape(images.shape)


def _resample(images: Tensor, height: int, width: int) -> Tensor:
    """Images (B, C, H, W) at another size, bicubic and antialiased; unchanged at the same."""
    if images.shape[-2:] == (height, width):
        return images
    return F.interpolate(images, size=(height, width), mode="bicubic", antialias=True)


def _check(is_allowed: bool, key: str, found: object, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{key} is {found}; allowed are {allowed}; change `conditioner.{key}`")
