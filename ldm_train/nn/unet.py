"""The time-conditional U-Net with cross-attention (Rombach et al. 2022, section 3.3).

A contracting path, a middle and an expanding path of residual blocks, each followed, at chosen resolutions, by
attention: a spatial transformer that also attends to the context tokens, or, in unconditional models, plain attention
between positions. Every output of the contracting path is concatenated to the input of its mirror image in the
expanding path. Conditions enter in three places: tokens by cross-attention, a vector beside the time embedding, and
maps of the latents' size as further input channels.

The published networks are options of `conf/unet/`. That of Stable Diffusion 1 is `sd1`: 859,520,964 parameters in 686
tensors.

Letters: B batch, C channels, h and w height and width of the latents, M context tokens of width D, E time embedding.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.nn.attention import zero_initialised
from ldm_train.nn.embedding import TimeEmbedding, VectorEmbedding
from ldm_train.nn.unet_blocks import UNetShape

_MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class UNet(nn.Module):
    """Predicts from noisy latents, a time and a condition; what it predicts is the denoiser's affair.

    Args:
        in_channels: channels of the latents.
        out_channels: channels of the prediction; twice the latents' where a variance is learned as well.
        channels: width of the first level.
        channel_multipliers: width of each level in units of `channels`; every level but the last halves the resolution.
        num_res_blocks: residual blocks a level (one more when expanding).
        attention_factors: downsampling factors (1, 2, 4, ...) at which attention stands; the middle always has it.
        context_dim: width D of the context tokens; `None` for no cross-attention.
        vector_dim: width of the pooled vector that joins the time embedding; `None` ignores such a vector.
        num_heads: attention heads; exactly one of `num_heads` and `head_channels` is given.
        head_channels: channels of a head.
        transformer_depth: transformer blocks in each spatial transformer: one number, or one for each level; the middle
            has the last.
        linear_projection: see `SpatialTransformer`.
        norm_groups: groups of all group normalisations; must divide every width.
        dropout: in the residual blocks. A stage draws the masks by step and process: the same after a resume, but with
            another number of processes others.
        concat_channels: channels of `Conditioning.concat`, which joins the latents; 0 for none.
        attention: `transformer`, or `plain`: only between positions, without context and feed-forward.
        time_modulation: `add` the time embedding, or let it `scale_shift` the normalised features, see `ResidualBlock`.
        resample: halve and double the resolution by a `convolution`, or by a `residual` block.
        checkpoint_factors: downsampling factors of the levels whose activations are computed again in the backward pass
            instead of being kept, see `ldm_train.nn.unet_blocks`.
        memory_format: `contiguous` or `channels_last`: how weights and activations lie in memory; values are the same.

    Raises:
        ValueError: if the arguments describe no network.
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
        transformer_depth: int | Sequence[int] = 1,
        linear_projection: bool = False,
        norm_groups: int = 32,
        dropout: float = 0.0,
        concat_channels: int = 0,
        attention: Literal["transformer", "plain"] = "transformer",
        time_modulation: Literal["add", "scale_shift"] = "add",
        resample: Literal["convolution", "residual"] = "convolution",
        checkpoint_factors: Sequence[int] = (),
        memory_format: Literal["contiguous", "channels_last"] = "contiguous",
    ) -> None:
        super().__init__()
        self.in_channels, self.out_channels, self.concat_channels = in_channels, out_channels, concat_channels
        self.context_dim, self.vector_dim = context_dim, vector_dim
        self.downsampling_factor = 2 ** (len(channel_multipliers) - 1)
        depth = transformer_depth if isinstance(transformer_depth, int) else tuple(transformer_depth)
        self.shape = shape = UNetShape(
            channels,
            tuple(channel_multipliers),
            num_res_blocks,
            tuple(attention_factors),
            context_dim,
            num_heads,
            head_channels,
            depth,
            linear_projection,
            attention,
            time_modulation,
            resample,
            norm_groups,
            dropout,
            tuple(checkpoint_factors),
        )
        _check(in_channels, out_channels, concat_channels, memory_format)
        self._build(shape)
        self.memory_format = _MEMORY_FORMATS[memory_format]
        self.to(memory_format=self.memory_format)

    def _build(self, shape: UNetShape) -> None:
        channels, embedding_channels = shape.channels, shape.embedding_channels
        self.time_embedding = TimeEmbedding(channels, embedding_channels)
        self.vector_embedding = (
            None if self.vector_dim is None else VectorEmbedding(self.vector_dim, embedding_channels)
        )
        self.conv_in = nn.Conv2d(self.in_channels + self.concat_channels, channels, 3, padding=1)
        self.down, self.up = nn.ModuleList(shape.contracting()), nn.ModuleList()
        self.middle_in, self.middle_out = shape.middle()
        self.up.extend(shape.expanding())
        self.norm_out = nn.GroupNorm(shape.norm_groups, channels, eps=1e-5)
        self.conv_out = zero_initialised(nn.Conv2d(channels, self.out_channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Predict from noisy latents.

        Args:
            x_t: (B, C, h, w) latents; h and w divisible by `downsampling_factor`.
            t: (B,) times, whole or not.
            conditioning: its `context` (B, M, D) is attended to, its `vector` (B, V) joins the time embedding, its
                `concat` (B, C', h, w) the latents.

        Returns:
            (B, out_channels, h, w).

        Raises:
            ValueError: if an input is of another shape than the network takes.
        """
        self._check_input(x_t, conditioning)
        embedding = self.time_embedding(t)  # (B, E)
        if self.vector_embedding is not None and conditioning.vector is not None:
            embedding = embedding + self.vector_embedding(conditioning.vector.to(embedding.dtype))
        x = x_t if conditioning.concat is None else torch.cat([x_t, conditioning.concat], dim=1)
        x = x.to(self.conv_in.weight.dtype, memory_format=self.memory_format)
        context = None if conditioning.context is None else conditioning.context.to(x.dtype)
        skips = [self.conv_in(x)]  # (B, channels, h, w)
        for level in self.down:
            skips += level(skips[-1], embedding, context)
        x = self.middle_in(skips[-1], embedding, context)
        x = self.middle_out(x, embedding, None)
        for level in self.up:
            x = level(x, skips, embedding, context)
        return self.conv_out(F.silu(self.norm_out(x)))

    def _check_input(self, x_t: Tensor, conditioning: Conditioning) -> None:
        channels, height, width = x_t.shape[-3:]
        if channels != self.in_channels:
            raise ValueError(
                f"latents have {channels} channels; the U-Net takes {self.in_channels}; change `unet.in_channels` or "
                "the `autoencoder`"
            )
        if height % self.downsampling_factor or width % self.downsampling_factor:
            raise ValueError(
                f"latents are {height} x {width}; allowed are multiples of {self.downsampling_factor}, because the "
                "U-Net halves them once a level; change `image_size`, or `unet.channel_multipliers` (one entry a level)"
            )
        _check_width("context", conditioning.context, self.context_dim)
        if self.vector_dim is not None:
            _check_width("vector", conditioning.vector, self.vector_dim)
        concat = 0 if conditioning.concat is None else conditioning.concat.shape[1]
        if concat != self.concat_channels:
            raise ValueError(
                f"the conditioner gives {concat} channels to concatenate; the U-Net takes {self.concat_channels}; "
                "change `unet.concat_channels` or the `conditioner`"
            )


def _check_width(name: str, entry: Tensor | None, allowed: int | None) -> None:
    found = None if entry is None else entry.shape[-1]
    if found != allowed:
        raise ValueError(
            f"the conditioner gives a {name} of width {found}; the U-Net takes {allowed}; "
            f"change `unet.{name}_dim` or the `conditioner`"
        )


def _check(in_channels: int, out_channels: int, concat_channels: int, memory_format: str) -> None:
    """Refuse, with ValueError, what `UNetShape` does not look at."""
    for key, found, least in (
        ("in_channels", in_channels, 1),
        ("out_channels", out_channels, 1),
        ("concat_channels", concat_channels, 0),
    ):
        if found < least:
            raise ValueError(f"{key} is {found}; allowed are numbers from {least}; change `unet.{key}`")
    if memory_format not in _MEMORY_FORMATS:
        raise ValueError(
            f"memory_format is {memory_format!r}; allowed are {' and '.join(_MEMORY_FORMATS)}; change "
            "`unet.memory_format`"
        )
