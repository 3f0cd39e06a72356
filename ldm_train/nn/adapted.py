"""Layers with low-rank adapters: the frozen layer, and beside it any number of changes of its weight.

    y = W x + b + sum_i m_i alpha_i B_i A_i x                                       (Hu et al. 2022, section 3)

The thin products are applied one after the other, so that no matrix of the weight's size is made, forwards or
backwards. Of a convolution A has the layer's kernel, stride and padding, and B is 1x1. Dropout is of the x that goes
into A. With a magnitude (Liu et al. 2024, equation 5) adapter i is a change of direction and length,

    y = W x + b + m [(g - 1) W x + g alpha B A x],        g = (|W| + c) / |W + alpha B A|,

where c, the learned change of the length of what enters each output, starts at zero; both lengths are taken by the same
sums and the lower one is a constant for the gradient (their section 4.3). So with B = 0 and c = 0 each change is a zero
that is added: y is that of the base bit for bit, on any device and in any type.

`nn.MultiheadAttention` keeps the weights of q, k and v in one matrix. Each has adapters of its own here, on its rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.nn.linear import linear
from ldm_train.nn.low_rank import LowRank, lengths

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers inside `nn.MultiheadAttention`, by the names that their adapters have."""


class Adapter(nn.Module):
    """The trainable change of one layer.

    Args:
        change: its values; they are copied to float32.
        weight: the base weight, whose device the adapter takes.
        multiplier: m.
        dropout: the share of the entries of x that A does not see in training.

    Attributes:
        alpha: the scale of B A.
    """

    def __init__(self, change: LowRank, weight: Tensor, multiplier: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.alpha, self.multiplier = change.alpha, multiplier
        is_last = weight.ndim == 4 and weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if is_last else torch.contiguous_format

        def own(factor: Tensor) -> nn.Parameter:
            copied = torch.empty_like(factor, dtype=torch.float32, device=weight.device, memory_format=layout)
            return nn.Parameter(copied.copy_(factor.detach()))

        self.down, self.up = own(change.down), own(change.up)
        self.length_change: nn.Parameter | None = None
        if change.magnitude is not None:
            magnitude = change.magnitude.detach().to(weight.device, torch.float32)
            self.length_change = nn.Parameter(magnitude - lengths(weight.detach()))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, product: Callable[[Tensor, Tensor], Tensor], y: Tensor, weight: Tensor) -> Tensor:
        """What is added to the layer's output.

        Args:
            x: the layer's input.
            product: (x, weight) -> the layer's product with weights of its kernel, without a bias.
            y: W x, the output without a bias; read only with a magnitude.
            weight: W.
        """
        low = product(self.dropout(x), self.down.to(x.dtype))
        up = self.up.to(x.dtype)
        change = self.alpha * (linear(low, up, None) if up.ndim == 2 else F.conv2d(low, up))
        if self.length_change is not None:
            stretch = self._stretch(weight)
            if weight.ndim == 4:
                stretch = stretch[:, None, None]
            # g - 1 is small beside g, and would be lost if g were rounded first.
            change = (stretch - 1.0).to(y.dtype) * y + stretch.to(y.dtype) * change
        return self.multiplier * change

    def value(self, weight: Tensor) -> LowRank:
        """The adapter of a layer of weight W as a value, without the multiplier."""
        magnitude = None if self.length_change is None else lengths(weight.detach()) + self.length_change.detach()
        return LowRank(self.down.detach(), self.up.detach(), self.alpha, magnitude)

    def _stretch(self, weight: Tensor) -> Tensor:
        assert self.length_change is not None
        with torch.no_grad():
            base = lengths(weight)
            delta = LowRank(self.down, self.up, self.alpha).delta()
            turned = lengths(weight.float() + delta).clamp_min(torch.finfo(torch.float32).tiny)
        return (base + self.length_change) / turned


class AdaptedLayer(nn.Module, ABC):
    """A weight that is frozen, and its adapters by name.

    Attributes:
        adapters: name -> `Adapter`; their changes are added up.
        is_enabled: false makes the layer the base's.
        original: W while the adapters are merged into the weight.
    """

    original: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.adapters = nn.ModuleDict()
        self.is_enabled = True
        self.register_buffer("original", None, persistent=False)

    @property
    @abstractmethod
    def weight(self) -> Tensor:
        """W, (out, in) or (out, in, h, w); writing to it changes the layer."""

    @property
    @abstractmethod
    def bias(self) -> Tensor | None:
        """The bias (out,), if there is one."""

    @abstractmethod
    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """What the layer does to its input, with another weight of its kernel and without a bias."""

    def changed(self, x: Tensor, y: Tensor) -> Tensor:
        """The output y = W x + b of the base with the changes of all adapters."""
        if not self.is_enabled or self.original is not None:
            return y
        without_bias, result = y, y
        if self.bias is not None and any(adapter.length_change is not None for adapter in self.of_adapters()):
            without_bias = y - (self.bias[:, None, None] if self.weight.ndim == 4 else self.bias).to(y.dtype)
        for adapter in self.of_adapters():
            if adapter.multiplier != 0.0:
                result = result + adapter(x, self.product, without_bias, self.weight)
        return result

    def of_adapters(self) -> Iterator[Adapter]:
        """The adapters, in the order in which they came."""
        for adapter in self.adapters.values():
            assert isinstance(adapter, Adapter)
            yield adapter

    def of(self, name: str) -> Adapter | None:
        """The adapter of a name, if the layer has it."""
        return dict(zip(self.adapters, self.of_adapters(), strict=True)).get(name)

    def merged_weight(self) -> Tensor:
        """W + sum_i m_i (W'_i - W), computed in float32, in the type of W."""
        weight = self.weight.detach()
        total = weight.float()
        for adapter in self.of_adapters():
            total = total + adapter.multiplier * adapter.value(weight).change(weight)
        return total.to(weight.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Let the weight hold the changes; W is kept."""
        if self.original is None:
            original = self.weight.detach().clone()
            self.weight.copy_(self.merged_weight())
            self.original = original

    @torch.no_grad()
    def unmerge(self) -> None:
        """Give the weight W back, bit for bit."""
        if self.original is not None:
            self.weight.copy_(self.original)
            self.original = None


class _AdaptedModule(AdaptedLayer):
    """A layer that owns its weight, with adapters.

    Args:
        base: the layer; its parameters are frozen.
    """

    def __init__(self, base: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """W, (out, in) or (out, in, h, w)."""
        return self.base.weight

    @property
    def bias(self) -> Tensor | None:
        """The bias (out,), if there is one."""
        return self.base.bias

    def forward(self, x: Tensor) -> Tensor:
        """The output of the layer, of the layer's shape."""
        return self.changed(x, self.base(x))


class AdaptedLinear(_AdaptedModule):
    """A linear layer, (..., in) to (..., out), with adapters."""

    base: nn.Linear

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) to (..., out of the weight)."""
        return linear(x, weight, None)


class AdaptedConv2d(_AdaptedModule):
    """A convolution, (B, in, H, W) to (B, out, H', W'), with adapters."""

    base: nn.Conv2d

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(B, in, H, W) to (B, out of the weight, H', W')."""
        return F.conv2d(x, weight, None, self.base.stride, self.base.padding, self.base.dilation)


class AdaptedProjection(AdaptedLayer):
    """One of the linear layers inside an `nn.MultiheadAttention`, which does not own its weight.

    Args:
        attention: owns it.
        name: one of `PROJECTIONS`.
    """

    def __init__(self, attention: nn.MultiheadAttention, name: str) -> None:
        super().__init__()
        self._attention = (attention,)  # in a tuple, so that it is no submodule here as well
        self._name = name

    @property
    def weight(self) -> Tensor:
        """W, (D, D)."""
        return projection_weight(self._attention[0], self._name)

    @property
    def bias(self) -> Tensor | None:
        """The bias (D,), if there is one."""
        attention = self._attention[0]
        if self._name == PROJECTIONS[-1]:
            return attention.out_proj.bias
        joint = attention.in_proj_bias
        return None if joint is None else joint.chunk(3)[PROJECTIONS.index(self._name)]

    def product(self, x: Tensor, weight: Tensor) -> Tensor:
        """(..., in) to (..., out) of the weight."""
        return linear(x, weight, None)


class AdaptedAttention(nn.Module):
    """`nn.MultiheadAttention` of a sequence to itself, with adapters on q, k, v and the output.

    The order of the arithmetic is torch's, tokens before batch, so that the results are the same bit for bit.
    Letters: B batch, N tokens, D width.

    Args:
        base: the attention; its parameters are frozen.
    """

    def __init__(self, base: nn.MultiheadAttention) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (AdaptedProjection(base, name) for name in PROJECTIONS)

    def projections(self) -> dict[str, AdaptedProjection]:
        """The four layers by name."""
        return dict(zip(PROJECTIONS, (self.q_proj, self.k_proj, self.v_proj, self.out_proj), strict=True))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, need_weights: bool = False, attn_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """`query` (B, N, D), which is `key` and `value` as well; `attn_mask` (N, N), added: (B, N, D) and None."""
        # As open_clip's text tower calls it.
        assert query is key
        assert key is value
        assert not need_weights
        x, base = query.transpose(0, 1), self.base
        joint = F.linear(x, base.in_proj_weight, base.in_proj_bias).chunk(3, dim=-1)
        parts = zip((self.q_proj, self.k_proj, self.v_proj), joint, strict=True)
        q, k, v = (layer.changed(x, y).unflatten(-1, (base.num_heads, -1)).permute(1, 2, 0, 3) for layer, y in parts)
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask).permute(2, 0, 1, 3).flatten(2)
        y = F.linear(attended, base.out_proj.weight, base.out_proj.bias)
        return self.out_proj.changed(attended, y).transpose(0, 1), None


def projection_weight(attention: nn.MultiheadAttention, name: str) -> Tensor:
    """The weight (D, D) of one of `PROJECTIONS`: rows of the joint matrix, or the output's own."""
    if name == PROJECTIONS[-1]:
        return attention.out_proj.weight
    return attention.in_proj_weight.chunk(3)[PROJECTIONS.index(name)]
