"""Residual blocks and the changes of resolution between them: the convolutional half of every network here.

    block(x, e) = skip(x) + conv(act(norm(conv(act(norm(x))) + W act(e))))

with group normalisation, SiLU, and an optional time embedding e (Ho et al. 2020, appendix B). Two variants come from
Dhariwal and Nichol 2021: the embedding may scale and shift what the second normalisation gives instead of being added
before it (their equation 3, "adaptive group normalisation"),

    h = norm(conv(act(norm(x)))),   block(x, e) = skip(x) + conv(act((1 + s) h + b)),   (s, b) = W act(e)

and a block may halve or double height and width itself, x on its way to the skip and act(norm(x)) alike.

Letters: B batch, C channels, H and W height and width, E width of the time embedding.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.nn.attention import zero_initialised
from ldm_train.nn.linear import Conv2d


class ResidualBlock(nn.Module):
    """Two normalised 3x3 convolutions around an optional time embedding, and a skip connection.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the result; a 1x1 convolution carries the skip where they differ.
        embedding_channels: E; `None` for a block without time.
        norm_groups: groups of the normalisations.
        norm_epsilon: their epsilon: 1e-5 in the published U-Nets, 1e-6 in the autoencoders.
        dropout: before the last convolution.
        zero_init: start the last convolution at zero.
        time_modulation: how the embedding enters: `add` or `scale_shift`.
        resample: `down` halves height and width by averaging, `up` doubles them by repetition; `None` keeps them.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_channels: int | None = None,
        norm_groups: int = 32,
        norm_epsilon: float = 1e-5,
        dropout: float = 0.0,
        zero_init: bool = False,
        time_modulation: Literal["add", "scale_shift"] = "add",
        resample: Literal["down", "up"] | None = None,
    ) -> None:
        super().__init__()
        self.scales, self.resample = time_modulation == "scale_shift", resample
        self.norm_in = nn.GroupNorm(norm_groups, in_channels, eps=norm_epsilon)
        self.conv_in = Conv2d(in_channels, out_channels, 3, padding=1)
        modulations = (2 if self.scales else 1) * out_channels
        self.embed = nn.Linear(embedding_channels, modulations) if embedding_channels is not None else None
        self.norm_out = nn.GroupNorm(norm_groups, out_channels, eps=norm_epsilon)
        self.dropout = nn.Dropout(dropout)
        self.conv_out = Conv2d(out_channels, out_channels, 3, padding=1)
        if zero_init:
            zero_initialised(self.conv_out)
        self.skip = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """`x` (B, C_in, H, W), `embedding` (B, E) or None: (B, C_out, H, W), resampled to half or twice H and W."""
        h = self.conv_in(self._resampled(F.silu(self.norm_in(x))))
        h = self._modulated(h, embedding)
        return self.skip(self._resampled(x)) + self.conv_out(self.dropout(F.silu(h)))

    def _modulated(self, h: Tensor, embedding: Tensor | None) -> Tensor:
        """The second normalisation of `h` (B, C_out, H, W), and the embedding."""
        if self.embed is None or embedding is None:
            return self.norm_out(h)
        modulation = self.embed(F.silu(embedding))[:, :, None, None]
        if not self.scales:
            return self.norm_out(h + modulation)
        scale, shift = modulation.chunk(2, dim=1)
        return torch.addcmul(shift, self.norm_out(h), 1 + scale)

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample is None:
            return x
        return F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2.0, mode="nearest")


class Downsample(nn.Module):
    """Halve height and width by a 3x3 convolution of stride 2.

    Args:
        channels: channels in and out.
        symmetric: pad one pixel on every side, as the U-Nets do; else only right and below, as the autoencoders do.
    """

    def __init__(self, channels: int, symmetric: bool) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=1 if symmetric else 0)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, H/2, W/2); called as a residual block is, it has no use for an embedding."""
        return self.conv(x if self.symmetric else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double height and width: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """(B, C, H, W) to (B, C, 2H, 2W); called as a residual block is, it has no use for an embedding."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
