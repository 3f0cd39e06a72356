"""The convolutional pyramids of the autoencoder (Rombach et al. 2022, appendix G; first in Esser et al. 2021).

    encoder:  conv, level 1, level 2, ..., level f, middle, norm, SiLU, conv
    decoder:  conv, middle, level f, ..., level 2, level 1, norm, SiLU, conv

A level is called by its downsampling factor, 1, 2, 4, ..., f. It is a row of residual blocks of one resolution, each
followed by self-attention where the factor is listed, and ends in a change to the next resolution.

Activation checkpointing (Chen et al. 2016, arXiv 1604.06174) is chosen per level: such a level keeps only its input
for the backward pass and computes the rest again. It pays at the finest levels, which hold most of the memory and
little of the arithmetic. The middle belongs to the coarsest level.

Letters: B batch, C channels, H and W image height and width, h and w those of the latents.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_train.nn.attention import SpatialSelfAttention
from ldm_train.nn.resnet import Downsample, ResidualBlock, Upsample

_NORM_EPSILON = 1e-6


class LevelShape(NamedTuple):
    """What one level is: its downsampling factor and width, whether it attends, whether it is computed twice."""

    factor: int
    width: int
    attention: bool
    recompute: bool


@dataclass(frozen=True)
class Pyramid:
    """What encoder and decoder share; see `ldm_train.nn.Autoencoder` for its fields.

    Raises:
        ValueError: if the fields describe no network.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_factors: tuple[int, ...] = ()
    middle_attention: bool = True
    norm_groups: int = 32
    checkpoint_factors: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        multipliers = self.channel_multipliers
        if not multipliers or not all(isinstance(m, int) and m >= 1 for m in multipliers):
            raise ValueError(
                f"channel_multipliers are {list(multipliers)}; allowed is one whole number from 1 for each level; "
                "change `autoencoder.channel_multipliers`"
            )
        for key in ("channels", "norm_groups"):
            if getattr(self, key) < 1:
                raise ValueError(
                    f"{key} is {getattr(self, key)}; allowed are whole numbers from 1; change `autoencoder.{key}`"
                )
        if self.num_res_blocks < 1:
            raise ValueError(
                f"num_res_blocks is {self.num_res_blocks}; allowed are numbers from 1; change "
                "`autoencoder.num_res_blocks`"
            )
        if self.channels % self.norm_groups:
            raise ValueError(
                f"channels are {self.channels}, which {self.norm_groups} normalisation groups do not divide; allowed "
                "are multiples of the groups; change `autoencoder.channels` or `autoencoder.norm_groups`"
            )
        for key in ("attention_factors", "checkpoint_factors"):
            found, allowed = list(getattr(self, key)), [level.factor for level in self.levels]
            if not set(found) <= set(allowed):
                raise ValueError(
                    f"{key} are {found}; allowed are the downsampling factors of the levels, {allowed}; change "
                    f"`autoencoder.{key}` or `autoencoder.channel_multipliers`"
                )

    @property
    def levels(self) -> list[LevelShape]:
        """The levels, the finest first."""
        return [
            LevelShape(
                factor=2**i,
                width=self.channels * multiplier,
                attention=2**i in self.attention_factors,
                recompute=2**i in self.checkpoint_factors,
            )
            for i, multiplier in enumerate(self.channel_multipliers)
        ]

    @property
    def factor(self) -> int:
        """f, by which the whole pyramid divides height and width."""
        return self.levels[-1].factor


class Middle(nn.Module):
    """The innermost part: residual block, self-attention, residual block."""

    def __init__(self, shape: Pyramid) -> None:
        super().__init__()
        channels, groups = shape.levels[-1].width, shape.norm_groups
        self.recompute = shape.levels[-1].recompute
        self.block_in = ResidualBlock(channels, channels, None, groups, _NORM_EPSILON)
        self.attention = SpatialSelfAttention(channels, groups) if shape.middle_attention else nn.Identity()
        self.block_out = ResidualBlock(channels, channels, None, groups, _NORM_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) to (B, C, h, w)."""
        return self.block_out(self.attention(self.block_in(x)))


class Level(nn.Module):
    """Residual blocks of one resolution, then an optional change to the next.

    Args:
        shape: the level.
        widths: channels before, between and after its residual blocks.
        norm_groups: groups of the normalisations.
        resample: the change of resolution.
    """

    def __init__(self, shape: LevelShape, widths: Sequence[int], norm_groups: int, resample: nn.Module | None) -> None:
        super().__init__()
        self.recompute = shape.recompute
        layers: list[nn.Module] = []
        for c_in, c_out in pairwise(widths):
            layers.append(ResidualBlock(c_in, c_out, None, norm_groups, _NORM_EPSILON))
            if shape.attention:
                layers.append(SpatialSelfAttention(c_out, norm_groups))
        self.layers = nn.Sequential(*layers)
        self.resample = nn.Identity() if resample is None else resample

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the next level's shape."""
        return self.resample(self.layers(x))


class Encoder(nn.Module):
    """Image (B, `in_channels`, H, W) to features (B, `out_channels`, h, w)."""

    def __init__(self, in_channels: int, out_channels: int, shape: Pyramid) -> None:
        super().__init__()
        groups, previous = shape.norm_groups, shape.channels
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.down = nn.ModuleList()
        for level in shape.levels:
            resample = Downsample(level.width, symmetric=False) if level.factor < shape.factor else None
            self.down.append(Level(level, [previous, *[level.width] * shape.num_res_blocks], groups, resample))
            previous = level.width
        self.middle = Middle(shape)
        self.norm_out = nn.GroupNorm(groups, previous, eps=_NORM_EPSILON)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, C, H, W)."""
        h = self.conv_in(x)
        for level in self.down:
            h = _run(level, h)
        h = _run(self.middle, h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """Features (B, `in_channels`, h, w) to image (B, `out_channels`, H, W)."""

    def __init__(self, in_channels: int, out_channels: int, shape: Pyramid) -> None:
        super().__init__()
        groups, previous = shape.norm_groups, shape.levels[-1].width
        self.conv_in = nn.Conv2d(in_channels, previous, 3, padding=1)
        self.middle = Middle(shape)
        self.up = nn.ModuleList()
        for level in reversed(shape.levels):
            resample = Upsample(level.width) if level.factor > 1 else None
            widths = [previous, *[level.width] * (shape.num_res_blocks + 1)]
            self.up.append(Level(level, widths, groups, resample))
            previous = level.width
        self.norm_out = nn.GroupNorm(groups, previous, eps=_NORM_EPSILON)
        self.conv_out = nn.Conv2d(previous, out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w)."""
        h = _run(self.middle, self.conv_in(z))
        for level in self.up:
            h = _run(level, h)
        return self.conv_out(F.silu(self.norm_out(h)))


def _run(part: nn.Module, x: Tensor) -> Tensor:
    """`part(x)`; a part that is to be recomputed keeps only `x` for the backward pass."""
    if not (part.recompute and torch.is_grad_enabled()):
        return part(x)
    # Nothing is drawn in a pyramid, so the state of the random generators need not be kept and restored.
    return checkpoint(part, x, use_reentrant=False, preserve_rng_state=False)
