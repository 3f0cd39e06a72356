"""Low-rank adaptation: fine-tune a frozen layer by a product of two thin matrices (Hu et al. 2022, section 4.1).

    W' = W + alpha B A,    A of (r, in),  B of (out, r),  r << min(in, out)

B starts at zero, so that training starts from the base model bit for bit. `alpha` is the whole scale: there is no
hidden 1/r (a "network alpha" a of other trainers is alpha = a / r here). Adapters live beside the layers they adapt,
are trained and saved alone, and can be merged into the weights and taken out again.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

PRESETS: dict[str, tuple[str, ...]] = {
    "attention": (r".*_attention\.to_(q|k|v|out)",),
    "attention_and_feed_forward": (r".*_attention\.to_(q|k|v|out)", r".*feed_forward\.project_(in|out)"),
}


class LoRALinear(nn.Module):
    """A frozen linear layer with an adapter: y = base(x) + alpha B A x.

    Args:
        base: the layer; its parameters are frozen.
        rank: r.
        alpha: the scale of B A.
    """

    def __init__(self, base: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        if not 1 <= rank <= min(base.in_features, base.out_features):
            raise ValueError(
                f"lora rank is {rank} for a layer of {base.out_features} x {base.in_features}; allowed are 1 to "
                f"{min(base.in_features, base.out_features)}; change `stage.rank`"
            )
        self.base = base.requires_grad_(False)
        self.alpha = alpha
        self.enabled = True
        device = base.weight.device
        self.down = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        # The rows of A have unit expected length, whatever the rank.
        nn.init.normal_(self.down, std=base.in_features**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) to (..., out)."""
        y = self.base(x)
        if not self.enabled:
            return y
        low = nn.functional.linear(x, self.down.to(x.dtype))
        return y + self.alpha * nn.functional.linear(low, self.up.to(x.dtype))

    def delta(self) -> Tensor:
        """Alpha B A in float32: (out, in)."""
        return self.alpha * (self.up.float() @ self.down.float())


def inject_lora(module: nn.Module, targets: str | Sequence[str], rank: int, alpha: float) -> list[str]:
    """Put adapters on the linear layers whose names match; everything else is frozen.

    Args:
        module: the network, changed in place.
        targets: a preset's name, or regular expressions of which one must match a layer's whole name.
        rank: r.
        alpha: the scale.

    Returns:
        The adapted layers' names, in the module's order.

    Raises:
        ValueError: if nothing matches.
    """
    patterns = _patterns(targets)
    module.requires_grad_(False)
    linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
    names = [name for name in linear if any(re.fullmatch(pattern, name) for pattern in patterns)]
    if not names:
        raise ValueError(
            f"lora targets {list(patterns)} match none of {len(linear)} linear layers (the first is "
            f"{linear[0] if linear else 'missing'!r}); allowed are {', '.join(PRESETS)} or regular expressions of "
            "whole layer names; change `stage.targets`"
        )
    for name in names:
        parent, _, child = name.rpartition(".")
        owner = module.get_submodule(parent)
        setattr(owner, child, LoRALinear(getattr(owner, child), rank, alpha))
    return names


def _patterns(targets: str | Sequence[str]) -> Sequence[str]:
    if not isinstance(targets, str):
        return targets
    if targets not in PRESETS:
        raise ValueError(
            f"lora targets {targets!r} is no preset; allowed are {', '.join(PRESETS)} or a list of regular "
            "expressions; change `stage.targets`"
        )
    return PRESETS[targets]


def lora_layers(module: nn.Module) -> Iterator[tuple[str, LoRALinear]]:
    """The adapted layers, with their names."""
    return ((name, layer) for name, layer in module.named_modules() if isinstance(layer, LoRALinear))


def lora_state_dict(module: nn.Module) -> dict[str, Tensor]:
    """The adapters alone: `<layer>.down`, `<layer>.up` and `<layer>.alpha` for each adapted layer."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(module):
        state[f"{name}.down"] = layer.down.detach()
        state[f"{name}.up"] = layer.up.detach()
        state[f"{name}.alpha"] = torch.tensor(layer.alpha, dtype=torch.float32)
    return state


def load_lora_state_dict(module: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give the adapters of an adapted network the values of a state dict.

    Raises:
        ValueError: if layers or shapes differ; nothing is changed then.
    """
    layers = dict(lora_layers(module))
    expected = {f"{name}.{part}" for name in layers for part in ("down", "up", "alpha")}
    missing, unexpected = sorted(expected - state.keys()), sorted(state.keys() - expected)
    shapes = [
        f"{name}.{part} is {tuple(state[f'{name}.{part}'].shape)}, not {tuple(getattr(layer, part).shape)}"
        for name, layer in layers.items()
        for part in ("down", "up")
        if f"{name}.{part}" in state and state[f"{name}.{part}"].shape != getattr(layer, part).shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the LoRA file does not fit the adapted network: {len(missing)} keys missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}, shapes {shapes[:3]}; allowed is a file of the same layers "
            "and rank; change `stage.targets` and `stage.rank`"
        )
    for name, layer in layers.items():
        layer.down.data.copy_(state[f"{name}.down"])
        layer.up.data.copy_(state[f"{name}.up"])
        layer.alpha = float(state[f"{name}.alpha"])


def lora_shape(state: Mapping[str, Tensor]) -> tuple[list[str], int, float]:
    """Which layers a LoRA state dict adapts, with what rank and alpha; for injecting before loading it."""
    names = [key.removesuffix(".down") for key in state if key.endswith(".down")]
    if not names:
        raise ValueError(
            f"no LoRA adapter among {len(state)} tensors; allowed is a file with `<layer>.down`, `<layer>.up` and "
            "`<layer>.alpha`, as the lora stage writes it"
        )
    return [re.escape(name) for name in names], state[f"{names[0]}.down"].shape[0], float(state[f"{names[0]}.alpha"])


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Inside, the network is the base model, bit for bit."""
    layers = [layer for _, layer in lora_layers(module)]
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled


@torch.no_grad()
def merge_lora(module: nn.Module) -> None:
    """Replace every adapted layer by a plain one of weight W + alpha B A."""
    for name, layer in list(lora_layers(module)):
        parent, _, child = name.rpartition(".")
        layer.base.weight.add_(layer.delta().to(layer.base.weight.dtype))
        setattr(module.get_submodule(parent), child, layer.base)
