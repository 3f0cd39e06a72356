"""The autoencoder: images to latents f times smaller and back (Rombach et al. 2022, section 3.1 and appendix G).

    z = E(x),   x of (3, H, W) in [-1, 1],   z of (C, H/f, W/f),   f = 2^(levels - 1)

Diffusion wants latents of zero mean and unit variance. They are normalised here and nowhere else: `encode` returns
(z - latent_mean) / latent_std from buffers that are measured after training and travel in the checkpoint; until then
they hold NaN and `encode` refuses. With `conf/autoencoder/kl_f8.yaml` the network is Stable Diffusion 1's: 83,653,863
parameters in 248 tensors.

Letters: B batch, C latent channels, H and W image height and width, h and w those of the latents.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.nn.attention import SpatialSelfAttention
from ldm_train.nn.regularizer import KLRegularizer, Regularized
from ldm_train.nn.resnet import Downsample, ResidualBlock, Upsample

_NORM_EPSILON = 1e-6


class Middle(nn.Module):
    """The innermost stage: residual block, self-attention, residual block."""

    def __init__(self, channels: int, norm_groups: int, attention: bool) -> None:
        super().__init__()
        self.block_in = ResidualBlock(channels, channels, None, norm_groups, _NORM_EPSILON)
        self.attention = SpatialSelfAttention(channels, norm_groups) if attention else nn.Identity()
        self.block_out = ResidualBlock(channels, channels, None, norm_groups, _NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return self.block_out(self.attention(self.block_in(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then an optional change to the next."""

    def __init__(self, widths: Sequence[int], norm_groups: int, attention: bool, resample: nn.Module | None) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            layers.append(ResidualBlock(c_in, c_out, None, norm_groups, _NORM_EPSILON))
            if attention:
                layers.append(SpatialSelfAttention(c_out, norm_groups))
        self.layers = nn.Sequential(*layers)
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the next level's shape."""
        return self.resample(self.layers(x))


@dataclass(frozen=True)
class Pyramid:
    """What encoder and decoder share; see `Autoencoder` for its fields."""

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_factors: tuple[int, ...]
    middle_attention: bool
    norm_groups: int

    @property
    def levels(self) -> list[tuple[int, int, bool]]:
        """Number, width and attention of each level, the finest first."""
        widths = [self.channels * multiplier for multiplier in self.channel_multipliers]
        return [(level, width, 2**level in self.attention_factors) for level, width in enumerate(widths)]


class Encoder(nn.Module):
    """Image (B, 3, H, W) to features (B, `out_channels`, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, shape: Pyramid) -> None:
        super().__init__()
        groups, previous = shape.norm_groups, shape.channels
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.down = nn.ModuleList()
        for level, width, attention in shape.levels:
            resample = Downsample(width, symmetric=False) if level < len(shape.levels) - 1 else None
            self.down.append(Level([previous, *[width] * shape.num_res_blocks], groups, attention, resample))
            previous = width
        self.middle = Middle(previous, groups, shape.middle_attention)
        self.norm_out = nn.GroupNorm(groups, previous, eps=_NORM_EPSILON)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W)."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(self.middle(h))))


class Decoder(nn.Module):
    """Features (B, `in_channels`, h, w) to image (B, 3, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, shape: Pyramid) -> None:
        super().__init__()
        groups, previous = shape.norm_groups, shape.levels[-1][1]
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.middle = Middle(previous, groups, shape.middle_attention)
        self.up = nn.ModuleList()
        for level, width, attention in reversed(shape.levels):
            resample = Upsample(width) if level else None
            self.up.append(Level([previous, *[width] * (shape.num_res_blocks + 1)], groups, attention, resample))
            previous = width
        self.norm_out = nn.GroupNorm(groups, previous, eps=_NORM_EPSILON)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w)."""
        h = self.middle(self.conv_in(z))
        for level in self.up:
            h = level(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Autoencoder(nn.Module):
    """Encoder, regularizer and decoder around normalised latents.

    Args:
        regularizer: turns the encoder's output into latents, see `ldm_train.nn.regularizer`.
        latent_channels: C.
        channels: width of the first level.
        channel_multipliers: width of each level in units of `channels`; f = 2^(levels - 1).
        num_res_blocks: residual blocks a level (one more in the decoder).
        attention_factors: downsampling factors at which self-attention stands, besides the middle.
        middle_attention: self-attention in the middle.
        norm_groups: groups of the normalisations; must divide every width.
        in_channels: channels of an image.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(
        self,
        regularizer: KLRegularizer,
        latent_channels: int,
        channels: int = 128,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_factors: Sequence[int] = (),
        middle_attention: bool = True,
        norm_groups: int = 32,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        if channels % norm_groups:
            raise ValueError(
                f"channels are {channels}, which {norm_groups} normalisation groups do not divide; allowed are "
                "multiples of the groups; change `autoencoder.channels` or `autoencoder.norm_groups`"
            )
        moments = regularizer.moments_per_channel * latent_channels
        multipliers, factors = tuple(channel_multipliers), tuple(attention_factors)
        shape = Pyramid(channels, multipliers, num_res_blocks, factors, middle_attention, norm_groups)
        self.latent_channels = latent_channels
        self.downsampling_factor = 2 ** (len(channel_multipliers) - 1)
        self.encoder = Encoder(in_channels, moments, shape)
        self.to_moments = nn.Conv2d(moments, moments, 1)
        self.regularizer = regularizer
        self.from_latents = nn.Conv2d(latent_channels, latent_channels, 1)
        self.decoder = Decoder(latent_channels, in_channels, shape)
        self._known_calibrated = False
        statistics = torch.full((1, latent_channels, 1, 1), math.nan)
        self.register_buffer("latent_mean", statistics.clone())
        self.register_buffer("latent_std", statistics)

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Regularized]:
        """Reconstruct images (B, 3, H, W); with the latents' regularizer result. `noise` as in `encode`."""
        regularized = self.regularizer(self.moments(x), noise)
        return self.decoder(self.from_latents(regularized.z)), regularized

    def moments(self, x: Tensor) -> Tensor:
        """The encoder's output for images (B, 3, H, W): what the regularizer reads, (B, k C, h, w)."""
        height, width = x.shape[-2:]
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(
                f"images are {height} x {width}; allowed are multiples of {self.downsampling_factor}, the "
                "autoencoder's downsampling factor f; change `image_size`, or choose another `autoencoder`"
            )
        return self.to_moments(self.encoder(x))

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images to normalised latents.

        Args:
            x: (B, 3, H, W) in [-1, 1].
            noise: (B, C, h, w) for a draw from the posterior; `None` for its mode.

        Returns:
            (B, C, h, w) of about zero mean and unit variance.

        Raises:
            RuntimeError: if the latents were never calibrated.
        """
        moments = self.moments(x)
        z = self.regularizer.mode(moments) if noise is None else self.regularizer(moments, noise).z
        return self.normalise(z)

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, H, W), unclamped; in float32 even under autocast."""
        self.require_calibration()
        with torch.autocast(latents.device.type, enabled=False):
            z = latents.float() * self.latent_std + self.latent_mean
            return self.decoder(self.from_latents(z))

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents to zero mean and unit variance."""
        self.require_calibration()
        return (z - self.latent_mean) / self.latent_std

    @property
    def is_calibrated(self) -> bool:
        """Whether the latents' mean and standard deviation have been measured."""
        # Reading a buffer waits for the GPU: once true, the answer is remembered.
        self._known_calibrated = self._known_calibrated or bool(torch.isfinite(self.latent_std).all())
        return self._known_calibrated

    def calibrate(self, mean: Tensor, std: Tensor) -> None:
        """Set the statistics of the raw latents; each (C,) or (1, C, 1, 1), `std` positive."""
        if not bool((std > 0).all()):
            raise ValueError(
                f"latent standard deviations are {std.flatten().tolist()}; allowed are positive numbers; a channel "
                "without variance has collapsed: lower `stage.loss.kl_weight` or train longer"
            )
        self.latent_mean.copy_(mean.view_as(self.latent_mean))
        self.latent_std.copy_(std.view_as(self.latent_std))

    def forget_calibration(self) -> None:
        """Back to the state before `calibrate`: latents are refused."""
        self.latent_mean.fill_(math.nan)
        self.latent_std.fill_(math.nan)
        self._known_calibrated = False

    def require_calibration(self) -> None:
        """Refuse, with RuntimeError, to go on with latents of unknown scale."""
        if not self.is_calibrated:
            raise RuntimeError(
                "the autoencoder's latents are not calibrated (latent_std is NaN); a calibrated checkpoint is needed, "
                "which stage 1 writes at its end; set `stage.autoencoder.checkpoint` to one"
            )
