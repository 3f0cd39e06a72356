"""The linear layers, over tokens and over feature maps: torch's, with the same parameters and values, fast on any CPU.

    tokens:         y = W x + b
    feature maps:   y = W [x at the positions under the kernel] + b

Torch gives float32 products on a CPU to MKL, which on processors of other makers runs at half the speed of oneDNN, the
library that computes the convolutions (AMD EPYC 9005, one core: 100 against 240 GFLOP/s), and has no switch to change
that. So the three products of a layer ask oneDNN,

    y = x W^T + b,      dL/dx = g W,      dL/dW = g^T x,      g = dL/dy.

A convolution over fewer positions than it has channels, as at the coarse levels of a U-Net, spends most of its time on
moving weights into the order of its kernel. There the few patches are moved instead, and the rest is the product above.
Everything else, other devices, other types, autocast and compiled networks, goes torch's way.

Letters: B batch, N tokens or positions, C and C' channels in and out, H and W height and width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class Linear(nn.Linear):
    """`torch.nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) to (B, N, C')."""
        return linear(x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    """`torch.nn.Conv2d` with a square kernel.

    On a `channels_last` feature map a 1x1 convolution is a linear layer without any copy, and one over few positions
    becomes one.

    Args:
        in_channels: C.
        out_channels: C'.
        kernel_size: height and width of the kernel.
        stride: positions from one patch to the next.
        padding: zeros on every side.
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, padding: int = 0
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride, padding)
        self.window = kernel_size, stride, padding

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H', W')."""
        if not self._is_product(x):
            return super().forward(x)
        patches = self._patches(x)
        y = linear(patches.flatten(1, 2), self.weight.permute(0, 2, 3, 1).flatten(1), self.bias)
        return y.transpose(1, 2).unflatten(2, patches.shape[1:3])

    def _is_product(self, x: Tensor) -> bool:
        last = torch.channels_last
        if not (x.is_contiguous(memory_format=last) and self.weight.is_contiguous(memory_format=last)):
            return False
        if self._is_pointwise():
            return True
        positions = x.shape[0] * x.shape[2] * x.shape[3] // self.window[1] ** 2
        return positions <= self.out_channels and _asks_onednn(x, self.weight)

    def _is_pointwise(self) -> bool:
        return self.window == (1, 1, 0)

    def _patches(self, x: Tensor) -> Tensor:
        """What lies under the kernel at each position: (B, H', W', kernel height * kernel width * C)."""
        x = x.permute(0, 2, 3, 1)
        if self._is_pointwise():
            return x
        size, stride, border = self.window
        x = F.pad(x, (0, 0, border, border, border, border))
        height, width = (x.shape[axis] - size + 1 for axis in (1, 2))
        shifts = [(i, j) for i in range(size) for j in range(size)]
        return torch.cat([x[:, i : i + height : stride, j : j + width : stride] for i, j in shifts], dim=-1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x` (B, N, C), `weight` (C', C), `bias` (C') or None: (B, N, C')."""
    return _OneDNNLinear.apply(x, weight, bias) if _asks_onednn(x, weight) else F.linear(x, weight, bias)


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


def _asks_onednn(x: Tensor, weight: Tensor) -> bool:
    plain = x.is_cpu and x.dtype == weight.dtype == torch.float32
    # A compiler chooses its products itself, and takes oneDNN's for frozen weights alone.
    is_choice = _HAS_ONEDNN and not torch.compiler.is_compiling()
    return is_choice and plain and not torch.is_autocast_enabled("cpu")


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
