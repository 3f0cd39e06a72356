"""Linear layers over tokens and over the positions of a feature map: y = W x + b.

They are torch's layers, with the same parameters and the same values. What differs is who computes float32 products on
a CPU. Torch gives these to MKL, which on processors of other makers runs at half the speed of oneDNN, the library that
computes the convolutions (AMD EPYC 9005, one core: 100 against 240 GFLOP/s), and has no switch to change that. So the
three products of a layer ask oneDNN,

    y = x W^T + b,      dL/dx = g W,      dL/dW = g^T x,      g = dL/dy,

and everything else, other devices, other types and autocast, takes torch's way.

Letters: B batch, N tokens, C and C' channels in and out, H and W height and width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`torch.nn.Linear`, fast on any CPU."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C')."""
        return linear(x, self.weight, self.bias)


class PointwiseConv2d(nn.Conv2d):
    """A 1x1 `torch.nn.Conv2d`: on a `channels_last` feature map a linear layer, without any copy.

    Args:
        in_channels: C.
        out_channels: C'.
    """

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H, W)."""
        if not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        return feature_map(linear(tokens(x), self.weight.flatten(1), self.bias), x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` (B, N, C), `weight` (C', C), `bias` (C') or None: (B, N, C')."""
    fast = _HAS_ONEDNN and x.is_cpu and x.dtype == weight.dtype == torch.float32
    if not fast or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _OneDNNLinear.apply(x, weight, bias)


def tokens(x: Tensor) -> Tensor:
    """(B, C, H, W) to (B, HW, C): a contiguous view of a `channels_last` feature map."""
    return x.flatten(2).transpose(1, 2)


def feature_map(tokens: Tensor, like: Tensor) -> Tensor:
    """(B, HW, C) to (B, C, H, W), H and W those of `like`: a `channels_last` view."""
    return tokens.transpose(1, 2).unflatten(2, like.shape[-2:])


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # noqa: ANN401
        x, weight = ctx.saved_tensors
        g = g.contiguous()
        rows = g.flatten(0, -2)
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            _product(g, weight.t()) if needs_x else None,
            _product(rows.t(), x.flatten(0, -2).t()) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
