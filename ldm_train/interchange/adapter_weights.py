"""Adapters in the weights of a model, put in and taken out: state dicts of the U-Net and the text tower.

    put in      W' = W + sum_i c_i (W'_i - W)          c_i the weight of the i-th set of adapters
    taken out   W = W' - sum_i c_i alpha_i B_i A_i     without magnitudes, which forget the length of W

Every set is a change of the base weights, as `peft` adds several adapters. The arithmetic is in float32 and the result
in the type of the weights, so taking out is exact up to their rounding. A text tower has one tensor (3 D, D) for the
queries, keys and values of an attention; the virtual layers are its thirds.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from ldm_train.interchange.adapter_names import QUERY_KEY_VALUE, TEXT_ENCODER, UNET
from ldm_train.nn.low_rank import LowRank


class Place(NamedTuple):
    """Where the weight of a layer is.

    Attributes:
        name: of the tensor in the state dict of its part.
        third: 0, 1, 2 of a fused tensor, `None` for the whole.
    """

    name: str
    third: int | None = None

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        """The weight itself, a view."""
        value = state[self.name]
        return value if self.third is None else value.chunk(len(QUERY_KEY_VALUE))[self.third]


def place_of(key: str) -> Place:
    """The place of a layer's weight in the state dict of its part, by its key."""
    if key.startswith(UNET):
        return Place(f"{key.removeprefix(UNET)}.weight")
    module, _, layer = key.removeprefix(TEXT_ENCODER).rpartition(".")
    if layer in QUERY_KEY_VALUE:
        return Place(f"{module}.in_proj_weight", QUERY_KEY_VALUE.index(layer))
    return Place(f"{module}.{layer}.weight")


class Weighted(NamedTuple):
    """A set of adapters, and the weight c of it."""

    adapters: Mapping[str, LowRank]
    weight: float


def merged(state: Mapping[str, Tensor], prefix: str, sets: Sequence[Weighted]) -> dict[str, Tensor]:
    """The weights of a part with adapters in them.

    Args:
        state: of the U-Net, or of the text tower under open_clip's names.
        prefix: `unet.` or `text_encoder.`, the part; adapters of the other are not looked at.
        sets: of adapters that fit.

    Returns:
        The state dict; tensors that nothing changes are the same.
    """
    result = dict(state)
    for key in _keys(prefix, sets):
        weight = place_of(key).of(state).float()
        change = sum(each.weight * each.adapters[key].change(weight) for each in sets if key in each.adapters)
        _set(result, state, key, weight + change)
    return result


def unmerged(state: Mapping[str, Tensor], prefix: str, sets: Sequence[Weighted]) -> dict[str, Tensor]:
    """The weights of a part without the adapters that `merged` put into them; the arguments are the same.

    Raises:
        ValueError: if an adapter has a magnitude.
    """
    if found := [key for each in sets for key, adapter in each.adapters.items() if adapter.magnitude is not None]:
        raise ValueError(
            f"{len(found)} adapters have a magnitude (DoRA), the first is of {found[0]}, and merging them has "
            "forgotten the lengths of the weights; allowed are adapters without; take the base model's own file"
        )
    return merged(state, prefix, [Weighted(each.adapters, -each.weight) for each in sets])


def _keys(prefix: str, sets: Sequence[Weighted]) -> list[str]:
    return list(dict.fromkeys(key for each in sets for key in each.adapters if key.startswith(prefix)))


def _set(result: dict[str, Tensor], state: Mapping[str, Tensor], key: str, value: Tensor) -> None:
    place = place_of(key)
    if result[place.name] is state[place.name]:
        result[place.name] = state[place.name].clone()
    place.of(result).copy_(value)
