"""Which layers get new adapters, of which rank and scale; the adapters themselves are in `ldm_train.nn.lora`.

Layers are chosen by a preset or by regular expressions of their whole names. The scale s in W' = W + s B A follows from
the number `alpha` in one of three ways, of which only the first does not change with the rank:

    direct              s = alpha
    alpha_over_rank     s = alpha / r           (Hu et al. 2022, section 4.1; the "network alpha" of other trainers)
    rank_stabilised     s = alpha / sqrt(r)     (Kalajdzievski 2023, arXiv 2312.03732)
"""

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from ldm_train.nn.lora import adaptable_layers, attach_adapters
from ldm_train.nn.low_rank import LowRank, lengths

ScaleMode = Literal["direct", "alpha_over_rank", "rank_stabilised"]
Value = TypeVar("Value", int, float)

_ATTENTION = (r".*attention\.to_(q|k|v|out)", r".*attn\.(q|k|v|out)_proj")
_FEED_FORWARD = (r".*feed_forward\.project_(in|out)", r".*mlp\.c_(fc|proj)")
_PROJECTIONS = (r".*transformer\.project_(in|out)",)
_RESIDUAL = (r".*(residual|downsample|upsample)\.(conv_in|conv_out|embed|skip|conv)",)
PRESETS: dict[str, tuple[str, ...]] = {
    "attention": _ATTENTION,
    "attention_and_feed_forward": _ATTENTION + _FEED_FORWARD,
    "transformers": _ATTENTION + _FEED_FORWARD + _PROJECTIONS,
    "transformers_and_residual_blocks": _ATTENTION + _FEED_FORWARD + _PROJECTIONS + _RESIDUAL,
}
"""Sets of layers of the U-Net and of CLIP's text tower, each larger than the one before. Of Stable Diffusion 1's U-Net
they are 128, 160, 192 and 278 layers; of its text encoder 48 and, from the second on, 72."""

_SCALES: dict[ScaleMode, Callable[[float, int], float]] = {
    "direct": lambda alpha, _: alpha,
    "alpha_over_rank": lambda alpha, rank: alpha / rank,
    "rank_stabilised": lambda alpha, rank: alpha / math.sqrt(rank),
}


@dataclass(frozen=True)
class Adaptation:
    """What new adapters are to be.

    Attributes:
        targets: a preset's name, or regular expressions of which one must match a layer's whole name.
        rank: r.
        alpha: the number that the scale is made of.
        scale_mode: how, see above.
        dropout: the share of the entries of a layer's input that its adapter does not see in training.
        rank_pattern: regular expression of whole layer names -> rank, in the place of `rank`; the first match counts.
        alpha_pattern: likewise, in the place of `alpha`.
        dora: adapt direction and length, see `LowRank`.
        key: the config node that these come from, for errors.

    Raises:
        ValueError: for a number out of range, or an unknown preset or scale mode.
    """

    targets: str | Sequence[str] = "attention"
    rank: int = 4
    alpha: float = 1.0
    scale_mode: ScaleMode = "direct"
    dropout: float = 0.0
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    dora: bool = False
    key: str = "stage"

    def __post_init__(self) -> None:
        if isinstance(self.targets, str) and self.targets not in PRESETS:
            raise ValueError(
                f"lora targets {self.targets!r} is no preset; allowed are {', '.join(PRESETS)} or a list of regular "
                f"expressions; change `{self.key}.targets`"
            )
        if self.scale_mode not in _SCALES:
            raise ValueError(
                f"lora scale_mode is {self.scale_mode!r}; allowed are {', '.join(get_args(ScaleMode))}; change "
                f"`{self.key}.scale_mode`"
            )
        if not 0.0 <= self.dropout < 1.0:
            raise ValueError(
                f"lora dropout is {self.dropout}; allowed is 0 <= dropout < 1; change `{self.key}.dropout`"
            )
        for option, alpha in (
            ("alpha", self.alpha),
            *(("alpha_pattern", each) for each in self.alpha_pattern.values()),
        ):
            if not math.isfinite(alpha):
                raise ValueError(f"lora {option} is {alpha}; allowed is a finite number; change `{self.key}.{option}`")
        for option in ("targets", "rank_pattern", "alpha_pattern"):
            for pattern in [] if isinstance(self.targets, str) and option == "targets" else getattr(self, option):
                self._check_expression(option, pattern)

    @property
    def patterns(self) -> tuple[str, ...]:
        """The regular expressions that choose the layers."""
        return PRESETS[self.targets] if isinstance(self.targets, str) else tuple(self.targets)

    def rank_of(self, layer: str) -> int:
        """The rank r of a layer's adapter."""
        return _first(self.rank_pattern, layer, self.rank)

    def scale_of(self, layer: str) -> float:
        """The whole scale s of a layer's adapter."""
        return _SCALES[self.scale_mode](_first(self.alpha_pattern, layer, self.alpha), self.rank_of(layer))

    def chosen(self, layers: Mapping[str, Tensor]) -> list[str]:
        """The layers to be adapted, of those that can be.

        Raises:
            ValueError: if there is none; a regular expression matches none; or a rank is out of range.
        """
        names = [name for name in layers if any(re.fullmatch(pattern, name) for pattern in self.patterns)]
        if not names:
            raise ValueError(
                f"lora targets {list(self.patterns)} match none of {len(layers)} linear layers and convolutions (the "
                f"first is {next(iter(layers), 'missing')!r}); allowed are {', '.join(PRESETS)} or regular expressions "
                f"of whole layer names; change `{self.key}.targets`"
            )
        if not isinstance(self.targets, str):
            self._check_matched("targets", self.targets, names)
        self._check_matched("rank_pattern", self.rank_pattern, names)
        self._check_matched("alpha_pattern", self.alpha_pattern, names)
        for name in names:
            self._check_rank(name, layers[name])
        return names

    def initial(self, layer: str, weight: Tensor) -> LowRank:
        """The adapter that a layer starts with: a random A whose rows have unit expected length, and B zero."""
        rank, fan_in = self.rank_of(layer), weight[0].numel()
        # On its weight's device, so that networks without memory get adapters without memory.
        down = torch.empty(rank, *weight.shape[1:], device=weight.device, dtype=torch.float32)
        nn.init.normal_(down, std=fan_in**-0.5)
        up = down.new_zeros(weight.shape[0], rank, *(1 for _ in weight.shape[2:]))
        return LowRank(down, up, self.scale_of(layer), lengths(weight.detach()) if self.dora else None)

    def _check_expression(self, option: str, pattern: str) -> None:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(
                f"lora {option} has {pattern!r}, which is no regular expression ({error}); allowed are those of "
                f"Python's `re`; change `{self.key}.{option}`"
            ) from error

    def _check_matched(self, option: str, patterns: Iterable[str], names: Sequence[str]) -> None:
        idle = [pattern for pattern in patterns if not any(re.fullmatch(pattern, name) for name in names)]
        if idle:
            raise ValueError(
                f"lora {option} has {idle[0]!r}, which matches none of the {len(names)} adapted layers (the first is "
                f"{names[0]!r}); allowed are regular expressions of whole names of adapted layers; change "
                f"`{self.key}.{option}`"
            )

    def _check_rank(self, name: str, weight: Tensor) -> None:
        rank, limit = self.rank_of(name), min(weight.shape[0], weight[0].numel())
        if not isinstance(rank, int) or not 1 <= rank <= limit:
            raise ValueError(
                f"lora rank is {rank} for the layer {name!r} of {weight.shape[0]} x {weight[0].numel()}; allowed are 1 "
                f"to {limit}; change `{self.key}.rank` or `{self.key}.rank_pattern`"
            )


def inject_adapters(module: nn.Module, adaptation: Adaptation, name: str = "default") -> list[str]:
    """Put new adapters on the layers that are chosen; everything else is frozen.

    Args:
        module: the network, changed in place.
        adaptation: which layers, and of which kind.
        name: of the adapter.

    Returns:
        The adapted layers' names, in the module's order.

    Raises:
        ValueError: if they do not fit; nothing is changed then.
    """
    layers = adaptable_layers(module)
    adapters = {layer: adaptation.initial(layer, layers[layer]) for layer in adaptation.chosen(layers)}
    module.requires_grad_(False)
    attach_adapters(module, name, adapters, dropout=adaptation.dropout)
    return list(adapters)


def _first(patterns: Mapping[str, Value], layer: str, otherwise: Value) -> Value:
    return next((value for pattern, value in patterns.items() if re.fullmatch(pattern, layer)), otherwise)
