"""Attention: between the positions of an image, and from them to the tokens of a context.

    softmax(Q K^T / sqrt(d)) V,   Q = W_q x,  K = W_k c,  V = W_v c       (Rombach et al. 2022, section 3.3)

with c = x for self-attention. All attention runs through torch's fused `scaled_dot_product_attention`.
Letters: B batch, N query tokens, M context tokens, C channels, H and W height and width.
"""

from typing import TypeVar

import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.nn.linear import Conv2d, Linear, feature_map, tokens

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_TRANSFORMER_NORM_EPSILON = 1e-6
_PLAIN_NORM_EPSILON = 1e-5


class Attention(nn.Module):
    """Multi-head attention; queries from `x`, keys and values from a context.

    Args:
        channels: width of `x` and of the result.
        context_dim: width of the context; `None` means self-attention.
        num_heads: heads; must divide `channels`.
    """

    def __init__(self, channels: int, context_dim: int | None = None, num_heads: int = 8) -> None:
        super().__init__()
        _check_heads(channels, num_heads)
        self.num_heads = num_heads
        source = channels if context_dim is None else context_dim
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(source, channels, bias=False)
        self.to_v = Linear(source, channels, bias=False)
        self.to_out = Linear(channels, channels)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """`x` (B, N, C) attends to `context` (B, M, D), or to itself: (B, N, C)."""
        source = x if context is None else context
        return self.to_out(_attend(self.to_q(x), self.to_k(source), self.to_v(source), self.num_heads))


class FeedForward(nn.Module):
    """Linear, GEGLU, Linear (Shazeer 2020): (W_1 x) * gelu(W_2 x), four times as wide inside."""

    def __init__(self, channels: int, multiplier: int = 4) -> None:
        super().__init__()
        self.project_in = Linear(channels, 2 * multiplier * channels)
        self.project_out = Linear(multiplier * channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C)."""
        value, gate = self.project_in(x).chunk(2, dim=-1)
        return self.project_out(value * F.gelu(gate))


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention, feed-forward; each normalised first and added.

    Args:
        channels: token width.
        context_dim: width of the context; `None` leaves cross-attention out.
        num_heads: attention heads.
    """

    def __init__(self, channels: int, context_dim: int | None, num_heads: int) -> None:
        super().__init__()
        self.norm_self = nn.LayerNorm(channels)
        self.self_attention = Attention(channels, None, num_heads)
        if context_dim is not None:
            self.norm_cross = nn.LayerNorm(channels)
            self.cross_attention = Attention(channels, context_dim, num_heads)
        self.has_context = context_dim is not None
        self.norm_feed_forward = nn.LayerNorm(channels)
        self.feed_forward = FeedForward(channels)

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """`x` (B, N, C), `context` (B, M, D) or None: (B, N, C)."""
        x = x + self.self_attention(self.norm_self(x))
        if self.has_context:
            x = x + self.cross_attention(self.norm_cross(x), context)
        return x + self.feed_forward(self.norm_feed_forward(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the positions of a feature map, added to it.

    Args:
        channels: channels of the feature map.
        context_dim: width of the context tokens, or `None`.
        num_heads: attention heads.
        depth: transformer blocks.
        linear_projection: project in and out on tokens (Stable Diffusion 2) instead of 1x1 convolutions (1).
        norm_groups: groups of the input normalisation.
    """

    def __init__(
        self,
        channels: int,
        context_dim: int | None,
        num_heads: int,
        depth: int = 1,
        linear_projection: bool = False,
        norm_groups: int = 32,
    ) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=_TRANSFORMER_NORM_EPSILON)
        self.linear_projection = linear_projection
        self.project_in = self._projection(channels)
        self.blocks = nn.ModuleList(TransformerBlock(channels, context_dim, num_heads) for _ in range(depth))
        self.project_out = zero_initialised(self._projection(channels))

    def forward(self, x: Tensor, context: Tensor | None) -> Tensor:
        """(B, C, H, W), (B, M, D) or None: (B, C, H, W)."""
        h = self.norm(x)
        h = self.project_in(tokens(h)) if self.linear_projection else tokens(self.project_in(h))
        for block in self.blocks:
            h = block(h, context)  # (B, HW, C)
        if self.linear_projection:
            return x + feature_map(self.project_out(h), x)
        return x + self.project_out(feature_map(h, x))

    def _projection(self, channels: int) -> nn.Module:
        return Linear(channels, channels) if self.linear_projection else Conv2d(channels, channels, 1)


class PlainAttention(nn.Module):
    """Multi-head self-attention between the positions of a feature map, added to it (Dhariwal and Nichol 2021).

    What unconditional latent diffusion models have in place of a spatial transformer: no context, no feed-forward.

    Args:
        channels: channels of the feature map.
        num_heads: attention heads; must divide `channels`.
        norm_groups: groups of the input normalisation.
    """

    def __init__(self, channels: int, num_heads: int, norm_groups: int = 32) -> None:
        super().__init__()
        _check_heads(channels, num_heads)
        self.num_heads = num_heads
        self.norm = nn.GroupNorm(norm_groups, channels, eps=_PLAIN_NORM_EPSILON)
        self.to_q = Linear(channels, channels)
        self.to_k = Linear(channels, channels)
        self.to_v = Linear(channels, channels)
        self.to_out = zero_initialised(Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        h = tokens(self.norm(x))
        attended = _attend(self.to_q(h), self.to_k(h), self.to_v(h), self.num_heads)
        return x + feature_map(self.to_out(attended), x)


class SpatialSelfAttention(nn.Module):
    """Single-head self-attention between positions, by 1x1 convolutions, added to its input: the autoencoder's kind."""

    def __init__(self, channels: int, norm_groups: int = 32) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=_TRANSFORMER_NORM_EPSILON)
        self.to_q = nn.Conv2d(channels, channels, 1)
        self.to_k = nn.Conv2d(channels, channels, 1)
        self.to_v = nn.Conv2d(channels, channels, 1)
        self.to_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C, H, W)."""
        h = self.norm(x)
        q, k, v = (tokens(layer(h)) for layer in (self.to_q, self.to_k, self.to_v))
        return x + self.to_out(feature_map(_attend(q, k, v, num_heads=1), x))


def zero_initialised(module: ModuleT) -> ModuleT:
    """Set every parameter to zero, so that a residual branch starts as the identity."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def _attend(q: Tensor, k: Tensor, v: Tensor, num_heads: int) -> Tensor:
    """Queries (B, N, C) to keys and values (B, M, C), each head on its own share of the channels: (B, N, C)."""
    heads = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in (q, k, v))  # (B, heads, ., C / heads)
    return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)


def _check_heads(channels: int, num_heads: int) -> None:
    if channels % num_heads:
        raise ValueError(
            f"attention over {channels} channels cannot be split into {num_heads} heads; allowed are divisors of "
            "the channels; change `unet.num_heads` or `unet.head_channels`"
        )
