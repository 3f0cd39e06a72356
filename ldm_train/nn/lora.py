"""Low-rank adapters on a network: put on by name, several at once, taken off, merged and restored.

    W' = W + sum_i m_i (W'_i - W),      W'_i - W = alpha_i B_i A_i  without a magnitude, see `LowRank`

Each adapter has a name, and changes the layers that its dictionary names; m_i is its multiplier. The network is
changed in place: an adapted layer is a frozen one with adapters beside it (`ldm_train.nn.adapted`). Adapters come from
a file as values (`attach_adapters`), or start from nothing and are trained (`ldm_train.nn.inject_adapters`).

Keys are the layers' names in the module that is handed in. For a model of several networks that is a dictionary of
them, `nn.ModuleDict({"unet": ..., "text_encoder": ...})`, whose names begin with `unet.` and `text_encoder.`. The
layers inside an `nn.MultiheadAttention` are called `q_proj`, `k_proj`, `v_proj` and `out_proj`.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn

from ldm_train.nn.adapted import (
    PROJECTIONS,
    AdaptedAttention,
    AdaptedConv2d,
    AdaptedLayer,
    AdaptedLinear,
    Adapter,
    projection_weight,
)
from ldm_train.nn.low_rank import LowRank

_LISTED = 3


def adaptable_layers(module: nn.Module, prefix: str = "") -> dict[str, Tensor]:
    """The layers that can have adapters, adapted already or not: name -> weight, in the module's order."""
    found: dict[str, Tensor] = {}
    for child, layer in module.named_children():
        name = f"{prefix}{child}"
        attention = layer.base if isinstance(layer, AdaptedAttention) else layer
        if isinstance(attention, nn.MultiheadAttention):
            if attention.in_proj_weight is not None and attention.batch_first:
                found |= {f"{name}.{part}": projection_weight(attention, part) for part in PROJECTIONS}
        elif isinstance(layer, AdaptedLayer | nn.Linear) or _is_plain_convolution(layer):
            found[name] = cast(Tensor, layer.weight)
        else:
            found |= adaptable_layers(layer, f"{name}.")
    return found


def adapted_layers(module: nn.Module) -> dict[str, AdaptedLayer]:
    """The layers that have adapters, by name, in the module's order."""
    return {
        name: layer for name, layer in module.named_modules() if isinstance(layer, AdaptedLayer) and len(layer.adapters)
    }


def attach_adapters(
    module: nn.Module,
    name: str,
    adapters: Mapping[str, LowRank],
    multiplier: float = 1.0,
    dropout: float = 0.0,
) -> None:
    """Put an adapter on a network.

    Args:
        module: the network, changed in place; the layers that get an adapter are frozen.
        name: of the adapter; a network has one of each name.
        adapters: name of a layer -> its change; copied, in float32.
        multiplier: m.
        dropout: of the adapters' inputs in training.

    Raises:
        ValueError: if a layer is not there or of another shape, the name is taken, or a network is merged; nothing is
            changed then.
    """
    _check_name(module, name)
    _check_fit(adaptable_layers(module), name, adapters)
    for key, change in adapters.items():
        layer = _adapted(module, key)
        layer.adapters[name] = Adapter(change, layer.weight, multiplier, dropout)


def detach_adapters(module: nn.Module, name: str | None = None) -> None:
    """Take an adapter off, or all of them; a layer without adapters is the plain layer again, bit for bit.

    Raises:
        ValueError: if there is none of that name.
    """
    _check_present(module, name)
    unmerge_adapters(module)
    for layer in adapted_layers(module).values():
        for own in [name] if name is not None else list(layer.adapters):
            if own in layer.adapters:
                del layer.adapters[own]
    _unwrap(module)


def adapter_names(module: nn.Module) -> list[str]:
    """The names of the adapters on a network, sorted."""
    return sorted({name for layer in adapted_layers(module).values() for name in layer.adapters})


def adapters_of(module: nn.Module, name: str) -> dict[str, LowRank]:
    """An adapter's values: name of the layer -> its change without the multiplier; the tensors are those in use.

    Raises:
        ValueError: if there is none of that name.
    """
    _check_present(module, name)
    found: dict[str, LowRank] = {}
    for key, layer in adapted_layers(module).items():
        if (adapter := layer.of(name)) is not None:
            found[key] = adapter.value(layer.weight if layer.original is None else layer.original)
    return found


def set_multiplier(module: nn.Module, name: str, multiplier: float) -> None:
    """Give an adapter another m; 0 makes it do nothing.

    Raises:
        ValueError: if there is none of that name, or it is merged.
    """
    _check_present(module, name)
    _check_unmerged(module)
    for layer in adapted_layers(module).values():
        if (adapter := layer.of(name)) is not None:
            adapter.multiplier = multiplier


def merge_adapters(module: nn.Module) -> None:
    """Let the weights hold the changes of all adapters, so that a forward pass costs what the base's does.

    The base weights of the adapted layers are kept, for `unmerge_adapters` to give them back.
    """
    for layer in adapted_layers(module).values():
        layer.merge()


def unmerge_adapters(module: nn.Module) -> None:
    """Give the base weights back, bit for bit; without effect on a network that is not merged."""
    for layer in adapted_layers(module).values():
        layer.unmerge()


def bake_adapters(module: nn.Module) -> None:
    """Make the changes of all adapters part of the weights for good: plain layers, and nothing is kept."""
    for layer in adapted_layers(module).values():
        layer.merge()
        layer.original = None
        layer.adapters.clear()
    _unwrap(module)


@contextmanager
def lora_disabled(module: nn.Module) -> Iterator[None]:
    """Inside, the network is the base model, bit for bit."""
    layers = list(adapted_layers(module).values())
    enabled, merged = [layer.is_enabled for layer in layers], [layer.original is not None for layer in layers]
    try:
        for layer in layers:
            layer.is_enabled = False
            layer.unmerge()
        yield
    finally:
        for layer, was_enabled, was_merged in zip(layers, enabled, merged, strict=True):
            layer.is_enabled = was_enabled
            if was_merged:
                layer.merge()


def _is_plain_convolution(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d) and layer.groups == 1 and layer.padding_mode == "zeros"


def _adapted(module: nn.Module, name: str) -> AdaptedLayer:
    """The layer of a name; one that has no adapters yet is put into a layer that can have some."""
    parent, _, child = name.rpartition(".")
    owner = module.get_submodule(parent)
    if isinstance(owner, nn.MultiheadAttention):
        owner = AdaptedAttention(owner)
        _replace(module, parent, owner)
    layer = getattr(owner, child)
    if isinstance(layer, nn.Linear):
        layer = AdaptedLinear(layer)
    elif isinstance(layer, nn.Conv2d):
        layer = AdaptedConv2d(layer)
    setattr(owner, child, layer)
    assert isinstance(layer, AdaptedLayer)
    return layer.train(owner.training)


def _unwrap(module: nn.Module) -> None:
    """Plain layers in the place of those without adapters."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, AdaptedAttention):
            is_plain = not any(len(part.adapters) for part in layer.projections().values())
        else:
            is_plain = isinstance(layer, AdaptedLinear | AdaptedConv2d) and not len(layer.adapters)
        if is_plain:
            _replace(module, name, layer.base)


def _replace(module: nn.Module, name: str, layer: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(module.get_submodule(parent), child, layer)


def _check_name(module: nn.Module, name: str) -> None:
    if not name or "." in name:
        raise ValueError(
            f"an adapter is called {name!r}; allowed are names that are not empty and have no dot; choose another name"
        )
    if name in (present := adapter_names(module)):
        raise ValueError(
            f"there is an adapter {name!r} already, among {', '.join(present)}; allowed is one of each name; choose "
            "another name, or detach that one"
        )
    _check_unmerged(module)


def _check_unmerged(module: nn.Module) -> None:
    if any(layer.original is not None for layer in adapted_layers(module).values()):
        raise ValueError(
            "the network's adapters are merged into its weights; allowed are changes of adapters that are not; call "
            "`unmerge_adapters` first"
        )


def _check_present(module: nn.Module, name: str | None) -> None:
    if name is not None and name not in (present := adapter_names(module)):
        raise ValueError(
            f"there is no adapter {name!r}; allowed are {', '.join(present) or 'none, for none is attached'}; choose "
            "another name"
        )


def _check_fit(layers: Mapping[str, Tensor], name: str, adapters: Mapping[str, LowRank]) -> None:
    missing = [key for key in adapters if key not in layers]
    shapes = [
        f"{key} is for {change.weight_shape}, not {tuple(layers[key].shape)}"
        for key, change in adapters.items()
        if key in layers and change.weight_shape != tuple(layers[key].shape)
    ]
    if missing or shapes or not adapters:
        raise ValueError(
            f"the adapter {name!r} of {len(adapters)} layers does not fit the network: {len(missing)} layers are not "
            f"there {missing[:_LISTED]}, {len(shapes)} have another shape {shapes[:_LISTED]}; allowed are some of its "
            f"{len(layers)} linear layers and convolutions, in their shapes; name another file, or the base model that "
            "it was trained on"
        )
