"""A low-rank change of one layer's weight, as a value (Hu et al. 2022, "LoRA", section 4.1).

    Delta W = alpha B A,    A of (r, in),  B of (out, r),  r << min(in, out)

Of a convolution A has the layer's kernel, (r, in, h, w), and B is 1x1, (out, r, 1, 1): the product over r is the same,
at each place of the kernel. With a magnitude m of (out,) the change is one of direction and length (Liu et al. 2024,
"DoRA", equation 5; the norm is over all that enters one output):

    W' = W + alpha B A        or        W' = m (W + alpha B A) / |W + alpha B A|

`alpha` is the whole scale: nothing is divided by the rank any more.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one layer.

    Attributes:
        down: A, (r, in) of a linear layer, (r, in, h, w) of a convolution.
        up: B, (out, r) or (out, r, 1, 1).
        alpha: the scale of B A.
        magnitude: m, (out,); None leaves the length of the weights to W + alpha B A.
    """

    down: Tensor
    up: Tensor
    alpha: float = 1.0
    magnitude: Tensor | None = None

    def __post_init__(self) -> None:
        kernel_of_up = (1,) * (self.down.ndim - 2)
        meets = self.up.ndim == self.down.ndim and self.up.shape[1:] == (*self.down.shape[:1], *kernel_of_up)
        if self.down.ndim not in (2, 4) or not meets:
            raise ValueError(
                f"an adapter's A is {tuple(self.down.shape)} and its B {tuple(self.up.shape)}; allowed are (r, in) and "
                "(out, r), or (r, in, h, w) and (out, r, 1, 1); name another file"
            )
        if self.rank < 1:
            raise ValueError(f"an adapter's rank is {self.rank}; allowed is 1 at least; name another file")
        if self.magnitude is not None and self.magnitude.shape != self.up.shape[:1]:
            raise ValueError(
                f"an adapter's magnitude is {tuple(self.magnitude.shape)} beside a B of {tuple(self.up.shape)}; "
                f"allowed is {tuple(self.up.shape[:1])}; name another file"
            )

    @property
    def rank(self) -> int:
        """The rank r."""
        return self.down.shape[0]

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the weight that is changed: (out, in) or (out, in, h, w)."""
        return (self.up.shape[0], *self.down.shape[1:])

    def delta(self) -> Tensor:
        """Alpha B A in float32: (out, in) or (out, in, h, w)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return self.alpha * product.view(self.weight_shape)

    def change(self, weight: Tensor) -> Tensor:
        """W' - W of a base weight W (out, in) or (out, in, h, w), in float32; without a magnitude W does not matter."""
        if self.magnitude is None:
            return self.delta()
        turned = weight.float() + self.delta()
        # What has no length has no direction either, and stays zero.
        stretch = self.magnitude.float() / lengths(turned).clamp_min(torch.finfo(torch.float32).tiny)
        return turned * stretch.view(-1, *[1] * (weight.ndim - 1)) - weight.float()

    def merged(self, weight: Tensor, multiplier: float = 1.0) -> Tensor:
        """W + multiplier (W' - W) of a base weight W, computed in float32, in the type of W."""
        return (weight.float() + multiplier * self.change(weight)).to(weight.dtype)

    def to(self, dtype: torch.dtype) -> "LowRank":
        """The same with factors of another floating-point type."""
        magnitude = None if self.magnitude is None else self.magnitude.to(dtype)
        return replace(self, down=self.down.to(dtype), up=self.up.to(dtype), magnitude=magnitude)


def lengths(weight: Tensor) -> Tensor:
    """Euclidean length of what enters each output, (out,), of a weight (out, ...), in float32."""
    return weight.float().flatten(1).norm(dim=1)
