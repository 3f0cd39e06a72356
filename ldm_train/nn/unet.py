"""The time-conditional U-Net with cross-attention (Rombach et al. 2022, section 3.3).

A contracting path, a middle and an expanding path of residual blocks, each followed, at chosen resolutions, by a
spatial transformer that attends to the context tokens. Every output of the contracting path is concatenated to the
input of its mirror image in the expanding path. With the configuration of `conf/unet/sd1.yaml` this is the network of
Stable Diffusion 1: 859,520,964 parameters in 686 tensors.

Letters: B batch, C channels, h and w height and width of the latents, M context tokens of width D, E time embedding.
"""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.nn.attention import SpatialTransformer, zero_initialised
from ldm_train.nn.embedding import TimeEmbedding, VectorEmbedding
from ldm_train.nn.resnet import Downsample, ResidualBlock, Upsample


class UNetBlock(nn.Module):
    """A residual block, and a spatial transformer where the resolution has one."""

    def __init__(self, residual: ResidualBlock, transformer: SpatialTransformer | None) -> None:
        super().__init__()
        self.residual = residual
        self.transformer = transformer

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> Tensor:
        """`x` (B, C, h, w), `embedding` (B, E), `context` (B, M, D) or None."""
        x = self.residual(x, embedding)
        return x if self.transformer is None else self.transformer(x, context)


class ContractingLevel(nn.Module):
    """Blocks of one resolution, then an optional halving; every result is kept for the expanding path."""

    def __init__(self, blocks: Iterable[UNetBlock], downsample: Downsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor | None) -> list[Tensor]:
        """`x` (B, C, h, w) to the results of its layers, the last for the next level."""
        results = []
        for block in self.blocks:
            x = block(x, embedding, context)
            results.append(x)
        return results if self.downsample is None else [*results, self.downsample(x)]


class ExpandingLevel(nn.Module):
    """Blocks of one resolution that each take in a kept result, then an optional doubling."""

    def __init__(self, blocks: Iterable[UNetBlock], upsample: Upsample | None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.upsample = upsample

    def forward(self, x: Tensor, skips: list[Tensor], embedding: Tensor, context: Tensor | None) -> Tensor:
        """`x` (B, C, h, w) to the next level's shape; takes one of `skips` from the end for each block."""
        for block in self.blocks:
            x = block(torch.cat([x, skips.pop()], dim=1), embedding, context)
        return x if self.upsample is None else self.upsample(x)


class UNet(nn.Module):
    """Predicts from noisy latents, a time and a condition; what it predicts is the denoiser's affair.

    Args:
        in_channels: channels of the latents plus those of `Conditioning.concat`.
        out_channels: channels of the prediction.
        channels: width of the first level.
        channel_multipliers: width of each level in units of `channels`; every level but the last halves the resolution.
        num_res_blocks: residual blocks a level (one more when expanding).
        attention_factors: downsampling factors (1, 2, 4, ...) at which transformers stand; the middle always has one.
        context_dim: width D of the context tokens; `None` for no cross-attention.
        vector_dim: width of the pooled vector that joins the time embedding; `None` ignores such a vector.
        num_heads: attention heads; exactly one of `num_heads` and `head_channels` is given.
        head_channels: channels of a head.
        transformer_depth: transformer blocks in each spatial transformer.
        linear_projection: see `SpatialTransformer`.
        norm_groups: groups of all group normalisations; must divide every width.
        dropout: in the residual blocks.

    Raises:
        ValueError: if heads are given twice or not at all, or a width is not divisible.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        channels: int = 320,
        channel_multipliers: Sequence[int] = (1, 2, 4, 4),
        num_res_blocks: int = 2,
        attention_factors: Sequence[int] = (1, 2, 4),
        context_dim: int | None = None,
        vector_dim: int | None = None,
        num_heads: int | None = None,
        head_channels: int | None = None,
        transformer_depth: int = 1,
        linear_projection: bool = False,
        norm_groups: int = 32,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        _check(channels, norm_groups, num_heads, head_channels)
        self.context_dim, self.vector_dim = context_dim, vector_dim
        self.downsampling_factor = 2 ** (len(channel_multipliers) - 1)
        embedding_channels = 4 * channels

        def block(c_in: int, c_out: int, attend: bool) -> UNetBlock:
            heads = num_heads or c_out // (head_channels or c_out)
            attention = (context_dim, heads, transformer_depth, linear_projection, norm_groups)
            return UNetBlock(
                ResidualBlock(c_in, c_out, embedding_channels, norm_groups, dropout=dropout, zero_init=True),
                SpatialTransformer(c_out, *attention) if attend else None,
            )

        widths = [channels * multiplier for multiplier in channel_multipliers]
        self.time_embedding = TimeEmbedding(channels, embedding_channels)
        self.vector_embedding = None if vector_dim is None else VectorEmbedding(vector_dim, embedding_channels)
        self.conv_in = nn.Conv2d(in_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()

        skips, width = [channels], channels
        for level, level_width in enumerate(widths):
            attend, last = 2**level in attention_factors, level == len(widths) - 1
            inputs = [width] + [level_width] * (num_res_blocks - 1)
            blocks = [block(c_in, level_width, attend) for c_in in inputs]
            width = level_width
            self.down.append(ContractingLevel(blocks, None if last else Downsample(width, symmetric=True)))
            skips += [width] * (num_res_blocks + (not last))

        self.middle_in = block(width, width, attend=True)
        self.middle_out = block(width, width, attend=False)

        for level, level_width in reversed(list(enumerate(widths))):
            attend = 2**level in attention_factors
            inputs = [width] + [level_width] * num_res_blocks
            blocks = [block(c_in + skips.pop(), level_width, attend) for c_in in inputs]
            width = level_width
            self.up.append(ExpandingLevel(blocks, Upsample(width) if level else None))

        self.norm_out = nn.GroupNorm(norm_groups, channels, eps=1e-5)
        self.conv_out = zero_initialised(nn.Conv2d(channels, out_channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict from noisy latents.

        Args:
            x_t: (B, C, h, w) latents; h and w divisible by `downsampling_factor`.
            t: (B,) int64 times.
            conditioning: its `context` (B, M, D) is attended to, its `vector` (B, V) joins the time embedding, its
                `concat` (B, C', h, w) the latents.

        Returns:
            (B, out_channels, h, w).
        """
        self._check_input(x_t, conditioning)
        embedding = self.time_embedding(t)  # (B, E)
        if self.vector_embedding is not None and conditioning.vector is not None:
            embedding = embedding + self.vector_embedding(conditioning.vector)
        x = x_t if conditioning.concat is None else torch.cat([x_t, conditioning.concat], dim=1)
        skips = [self.conv_in(x)]  # (B, channels, h, w)
        for level in self.down:
            skips += level(skips[-1], embedding, conditioning.context)
        x = self.middle_in(skips[-1], embedding, conditioning.context)
        x = self.middle_out(x, embedding, None)
        for level in self.up:
            x = level(x, skips, embedding, conditioning.context)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _check_input(self, x_t: Tensor, conditioning: Conditioning) -> None:
        height, width = x_t.shape[-2:]
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(
                f"latents are {height} x {width}; allowed are multiples of {self.downsampling_factor}, because the "
                "U-Net halves them once a level; change `image_size`, or `unet.channel_multipliers` (one entry a level)"
            )
        _check_width("context", conditioning.context, self.context_dim)
        if self.vector_dim is not None:
            _check_width("vector", conditioning.vector, self.vector_dim)


def _check_width(name: str, entry: Tensor | None, allowed: int | None) -> None:
    found = None if entry is None else entry.shape[-1]
    if found != allowed:
        raise ValueError(
            f"the conditioner gives a {name} of width {found}; the U-Net takes {allowed}; "
            f"change `unet.{name}_dim` or the `conditioner`"
        )


def _check(channels: int, norm_groups: int, num_heads: int | None, head_channels: int | None) -> None:
    if (num_heads is None) == (head_channels is None):
        raise ValueError(
            f"num_heads is {num_heads} and head_channels is {head_channels}; exactly one of them is allowed to be set; "
            "change `unet.num_heads` and `unet.head_channels`"
        )
    if channels % norm_groups:
        raise ValueError(
            f"channels are {channels}, which {norm_groups} normalisation groups do not divide; allowed are multiples "
            "of the groups; change `unet.channels` or `unet.norm_groups`"
        )
