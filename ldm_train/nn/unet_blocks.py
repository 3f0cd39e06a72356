"""What the U-Net is made of: its shape, its blocks, and the rows of blocks of one resolution.

    contracting level:  block, block, ..., halve        every result is kept
    expanding level:    block, block, ..., double       every block takes in a kept result, the last first
    block:              residual block, then attention where the level has it

A level is called by its downsampling factor, 1, 2, 4, ... Activation checkpointing (Chen et al. 2016, arXiv 1604.06174)
is chosen per level and done per block: such a block keeps only its inputs for the backward pass and computes the rest
again. When contracting this costs no memory at all, because what goes into a block is what came out of the one before,
which is kept anyway. The middle belongs to the coarsest level.

Letters: B batch, C channels, h and w height and width of the latents, M context tokens of width D, E time embedding.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ldm_train.nn.attention import PlainAttention, SpatialTransformer
from ldm_train.nn.resnet import Downsample, ResidualBlock, Upsample

AttentionKind = Literal["transformer", "plain"]
TimeModulation = Literal["add", "scale_shift"]
Resampling = Literal["convolution", "residual"]
_CHOICES = {
    "attention": ("transformer", "plain"),
    "time_modulation": ("add", "scale_shift"),
    "resample": ("convolution", "residual"),
}


class UNetLevel(NamedTuple):
    """One level: its factor and width, whether it attends, by how many transformer blocks, whether it is recomputed."""

    factor: int
    width: int
    attend: bool
    depth: int
    recompute: bool


class UNetBlock(nn.Module):
    """A residual block, and attention where the resolution has it.

    Args:
        residual: the residual block.
        transformer: attends to the positions and to the context; or
        attention: attends to the positions alone.
        recompute: keep only the inputs for the backward pass.
    """

    def __init__(
        self,
        residual: ResidualBlock,
        transformer: SpatialTransformer | None = None,
        attention: PlainAttention | None = None,
        recompute: bool = False,
    ) -> None:
        super().__init__()
        self.residual, self.transformer, self.attention = residual, transformer, attention
        self.recompute = recompute

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None, skip: Tensor | None = None) -> Tensor:
        """`x` (B, C, h, w), `embedding` (B, E), `context` (B, M, D) or None, `skip` (B, C', h, w) to join `x`."""
        return _run(self._layers, self.recompute, x, embedding, context, skip)

    def _layers(self, x: Tensor, embedding: Tensor, context: Tensor | None, skip: Tensor | None) -> Tensor:
        x = self.residual(x if skip is None else torch.cat([x, skip], dim=1), embedding)
        if self.transformer is not None:
            return self.transformer(x, context)
        return x if self.attention is None else self.attention(x)


class ContractingLevel(nn.Module):
    """Blocks of one resolution, then an optional halving; every result is kept for the expanding path."""

    def __init__(self, blocks: Iterable[UNetBlock], downsample: nn.Module | None, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample
        self.recompute = recompute

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> list[Tensor]:
        """`x` (B, C, h, w) to the results of its layers, the last for the next level."""
        results = []
        for block in self.blocks:
            x = block(x, embedding, context)
            results.append(x)
        if self.downsample is not None:
            results.append(_run(self.downsample, self.recompute, x, embedding))
        return results


class ExpandingLevel(nn.Module):
    """Blocks of one resolution that each take in a kept result, then an optional doubling."""

    def __init__(self, blocks: Iterable[UNetBlock], upsample: nn.Module | None, recompute: bool = False) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample
        self.recompute = recompute

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, context: Tensor | None) -> Tensor:
        """`x` (B, C, h, w) to the next level's shape; takes one of `skips` from the end for each block."""
        for block in self.blocks:
            x = block(x, embedding, context, skips.pop())
        return x if self.upsample is None else _run(self.upsample, self.recompute, x, embedding)


@dataclass(frozen=True)
class UNetShape:
    """Everything that decides which blocks a U-Net has; see `ldm_train.nn.UNet` for its fields.

    Raises:
        ValueError: if the fields describe no network.
    """

    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_factors: tuple[int, ...]
    context_dim: int | None
    num_heads: int | None
    head_channels: int | None
    transformer_depth: int | tuple[int, ...]
    linear_projection: bool
    attention: AttentionKind
    time_modulation: TimeModulation
    resample: Resampling
    norm_groups: int
    dropout: float
    checkpoint_factors: tuple[int, ...]

    def __post_init__(self) -> None:
        _check_choices(self)
        _check_numbers(self)
        _check_attention(self)
        _check_factors(self)

    @property
    def embedding_channels(self) -> int:
        """E."""
        return 4 * self.channels

    @property
    def levels(self) -> list[UNetLevel]:
        """The levels, the finest first."""
        depths = self.transformer_depth
        return [
            UNetLevel(
                factor=2**i,
                width=self.channels * multiplier,
                attend=2**i in self.attention_factors,
                depth=depths if isinstance(depths, int) else depths[i],
                recompute=2**i in self.checkpoint_factors,
            )
            for i, multiplier in enumerate(self.channel_multipliers)
        ]

    @property
    def skip_widths(self) -> list[int]:
        """Channels of everything that is kept for the expanding path, in the order in which it comes about."""
        widths = [self.channels]
        for level in self.levels:
            widths += [level.width] * (self.num_res_blocks + (level != self.levels[-1]))
        return widths

    def contracting(self) -> Iterator[ContractingLevel]:
        """The levels of the contracting path, the finest first."""
        width = self.channels
        for level in self.levels:
            inputs = [width] + [level.width] * (self.num_res_blocks - 1)
            blocks = [self._block(c_in, level, level.attend) for c_in in inputs]
            width = level.width
            downsample = None if level == self.levels[-1] else self._resample("down", width)
            yield ContractingLevel(blocks, downsample, level.recompute)

    def middle(self) -> tuple[UNetBlock, UNetBlock]:
        """The two innermost blocks; the first always attends."""
        level = self.levels[-1]
        return self._block(level.width, level, attend=True), self._block(level.width, level, attend=False)

    def expanding(self) -> Iterator[ExpandingLevel]:
        """The levels of the expanding path, the coarsest first."""
        skips, width = self.skip_widths, self.levels[-1].width
        for level in reversed(self.levels):
            inputs = [width] + [level.width] * self.num_res_blocks
            blocks = [self._block(c_in + skips.pop(), level, level.attend) for c_in in inputs]
            width = level.width
            upsample = None if level.factor == 1 else self._resample("up", width)
            yield ExpandingLevel(blocks, upsample, level.recompute)

    def _block(self, c_in: int, level: UNetLevel, attend: bool) -> UNetBlock:
        width, groups = level.width, self.norm_groups
        heads = self.num_heads or width // (self.head_channels or width)
        residual = self._residual(c_in, width)
        if not attend:
            return UNetBlock(residual, recompute=level.recompute)
        if self.attention == "plain":
            return UNetBlock(residual, None, PlainAttention(width, heads, groups), level.recompute)
        transformer = SpatialTransformer(width, self.context_dim, heads, level.depth, self.linear_projection, groups)
        return UNetBlock(residual, transformer, None, level.recompute)

    def _resample(self, direction: Literal["down", "up"], width: int) -> nn.Module:
        if self.resample == "residual":
            return self._residual(width, width, direction)
        return Downsample(width, symmetric=True) if direction == "down" else Upsample(width)

    def _residual(self, c_in: int, c_out: int, resample: Literal["down", "up"] | None = None) -> ResidualBlock:
        return ResidualBlock(
            c_in,
            c_out,
            self.embedding_channels,
            self.norm_groups,
            dropout=self.dropout,
            zero_init=True,
            time_modulation=self.time_modulation,
            resample=resample,
        )


def _run(part: Callable[..., Tensor], recompute: bool, *inputs: Tensor | None) -> Tensor:
    """`part(*inputs)`; one that is to be recomputed keeps only its inputs for the backward pass."""
    if not (recompute and torch.is_grad_enabled()):
        return part(*inputs)
    return checkpoint(part, *inputs, use_reentrant=False)


def _check_choices(shape: UNetShape) -> None:
    for key, allowed in _CHOICES.items():
        if (found := getattr(shape, key)) not in allowed:
            raise ValueError(f"{key} is {found!r}; allowed are {' and '.join(allowed)}; change `unet.{key}`")


def _check_numbers(shape: UNetShape) -> None:
    multipliers = shape.channel_multipliers
    if not multipliers or not all(isinstance(m, int) and m >= 1 for m in multipliers):
        raise ValueError(
            f"channel_multipliers are {list(multipliers)}; allowed is one whole number from 1 for each level; change "
            "`unet.channel_multipliers`"
        )
    for key in ("channels", "num_res_blocks", "norm_groups"):
        if getattr(shape, key) < 1:
            raise ValueError(f"{key} is {getattr(shape, key)}; allowed are numbers from 1; change `unet.{key}`")
    if shape.channels % shape.norm_groups or shape.channels % 2:
        raise ValueError(
            f"channels are {shape.channels}; allowed are even multiples of the {shape.norm_groups} normalisation "
            "groups; change `unet.channels` or `unet.norm_groups`"
        )
    depths = shape.transformer_depth
    listed = (depths,) * len(multipliers) if isinstance(depths, int) else depths
    if len(listed) != len(multipliers) or min(listed) < 1:
        raise ValueError(
            f"transformer_depth is {depths}; allowed is a number from 1, or {len(multipliers)} of them, one for each "
            "level; change `unet.transformer_depth`"
        )


def _check_attention(shape: UNetShape) -> None:
    num_heads, head_channels = shape.num_heads, shape.head_channels
    if (num_heads is None) == (head_channels is None):
        raise ValueError(
            f"num_heads is {num_heads} and head_channels is {head_channels}; exactly one of them is allowed to be set; "
            "change `unet.num_heads` and `unet.head_channels`"
        )
    if shape.attention == "plain" and shape.context_dim is not None:
        raise ValueError(
            f"context_dim is {shape.context_dim}, but plain attention has no place for context tokens; allowed is "
            "null, or a transformer; change `unet.context_dim` or `unet.attention`"
        )
    for level in shape.levels:
        if head_channels is not None and level.width % head_channels and (level.attend or level == shape.levels[-1]):
            raise ValueError(
                f"head_channels is {head_channels}, of which level {level.factor} is {level.width} wide; allowed are "
                "divisors of the width; change `unet.head_channels`"
            )


def _check_factors(shape: UNetShape) -> None:
    allowed = [level.factor for level in shape.levels]
    for key in ("attention_factors", "checkpoint_factors"):
        found: Sequence[int] = getattr(shape, key)
        if not set(found) <= set(allowed):
            raise ValueError(
                f"{key} are {list(found)}; allowed are the downsampling factors of the levels, {allowed}; change "
                f"`unet.{key}` or `unet.channel_multipliers`"
            )
