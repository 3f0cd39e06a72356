"""The names that formats give to the layers that low-rank adapters change, as one table for each architecture.

An adapter belongs to a layer, and a layer is a place of the walk over the U-Net (`ldm_train.interchange.unet_layout`)
or over CLIP's text tower. In memory its key is our own name of it,

    unet.<name in our U-Net>                                     unet.conv_in
    text_encoder.<name in open_clip's tower>                     text_encoder.transformer.resblocks.0.mlp.c_fc
    text_encoder.transformer.resblocks.{i}.attn.{q,k,v}_proj     thirds of the tower's one tensor `attn.in_proj_weight`

Formats of others have the names of diffusers, or the published ones, with dots or with underscores in their place. A
name that has lost its dots cannot be split again without guessing, so every name is spelled out from the architecture
(two vocabularies of one walk) and reading is looking up.

Letters: D width of a text tower.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ldm_train.interchange.clip import PREFIX
from ldm_train.interchange.unet import UNetArchitecture, build_unet
from ldm_train.interchange.unet_diffusers import DIFFUSERS_UNET, DIFFUSERS_UNET_XL
from ldm_train.interchange.unet_layout import COMPVIS_UNET, OURS, unet_names

UNET, TEXT_ENCODER = "unet.", "text_encoder."
"""What our keys begin with; diffusers' begin likewise."""

QUERY_KEY_VALUE = ("q_proj", "k_proj", "v_proj")
"""The virtual layers of a text tower's attention, in the order of its one tensor."""

_WEIGHT = ".weight"
_TEXT_LAYER = "transformer.resblocks.{layer}."
_TRANSFORMERS_LAYER = "encoder.layers.{layer}."
# open_clip's layer, transformers', and the shape of the weight in units of D.
_TEXT = (
    *((f"attn.{part}", f"self_attn.{part}", (1, 1)) for part in (*QUERY_KEY_VALUE, "out_proj")),
    ("mlp.c_fc", "mlp.fc1", (4, 1)),
    ("mlp.c_proj", "mlp.fc2", (1, 4)),
)
# Diffusers once kept adapters in an attention's processor, under names of their own.
_PROCESSOR = {
    ".to_q": ".processor.to_q_lora",
    ".to_k": ".processor.to_k_lora",
    ".to_v": ".processor.to_v_lora",
    ".to_out.0": ".processor.to_out_lora",
}
_TEXT_PROCESSOR = {
    ".q_proj": ".to_q_lora",
    ".k_proj": ".to_k_lora",
    ".v_proj": ".to_v_lora",
    ".out_proj": ".to_out_lora",
}


class TextShape(NamedTuple):
    """What decides the names and shapes of a text tower: its layers, and D."""

    num_layers: int
    width: int


@dataclass(frozen=True)
class AdapterBase:
    """What is known of the model that adapters belong to.

    Attributes:
        unet: config node of its U-Net.
        text_encoder: its text tower, `None` where there is none, or nothing is known of it.
    """

    unet: Mapping[str, Any]
    text_encoder: TextShape | None = None


class Layer(NamedTuple):
    """A layer that an adapter may change.

    Attributes:
        key: ours.
        weight_shape: (out, in) or (out, in, h, w).
        module: diffusers' name, or transformers' after `text_model.`.
        processors: what stood for that name in diffusers' oldest files.
        others: other names of the same layer: that of Stable Diffusion XL's class, and the published one.
    """

    key: str
    weight_shape: tuple[int, ...]
    module: str
    processors: tuple[str, ...]
    others: tuple[str, ...]


def layers_of(base: AdapterBase) -> list[Layer]:
    """Every linear and convolutional layer of a base model, in the order of computation."""
    return [*_unet_layers(base.unet), *_text_layers(base.text_encoder or TextShape(0, 0))]


def _unet_layers(node: Mapping[str, Any]) -> Iterator[Layer]:
    architecture = UNetArchitecture.of(node)
    shapes = _shapes(node)
    published = unet_names(COMPVIS_UNET, architecture)
    counts = Counter(published)
    vocabularies = (OURS, DIFFUSERS_UNET, DIFFUSERS_UNET_XL)
    for ours, theirs, xl, compvis in zip(
        *(unet_names(layout, architecture) for layout in vocabularies), published, strict=True
    ):
        name, module = ours.removesuffix(_WEIGHT), theirs.removesuffix(_WEIGHT)
        if not ours.endswith(_WEIGHT) or name not in shapes:
            continue
        # One tensor for queries, keys and values has no layer for each of them.
        others = [xl, *([compvis] if counts[compvis] == 1 else [])]
        names = (other.removesuffix(_WEIGHT) for other in others)
        yield Layer(
            f"{UNET}{name}",
            shapes[name],
            module,
            _replaced(module, _PROCESSOR),
            tuple(dict.fromkeys(other for other in names if other != module)),
        )


def _shapes(node: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        network = build_unet(node)
    return {
        name: tuple(layer.weight.shape)
        for name, layer in network.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _text_layers(shape: TextShape) -> Iterator[Layer]:
    for index in range(shape.num_layers):
        ours, theirs = (prefix.format(layer=index) for prefix in (_TEXT_LAYER, _TRANSFORMERS_LAYER))
        for layer, module, units in _TEXT:
            weight = tuple(unit * shape.width for unit in units)
            yield Layer(
                f"{TEXT_ENCODER}{ours}{layer}",
                weight,
                f"{theirs}{module}",
                _replaced(module, _TEXT_PROCESSOR, theirs),
                (),
            )


def _replaced(module: str, table: Mapping[str, str], prefix: str = "") -> tuple[str, ...]:
    return tuple(f"{prefix}{module.removesuffix(end)}{new}" for end, new in table.items() if module.endswith(end))


@dataclass(frozen=True)
class Vocabulary:
    """A format's names of layers.

    Attributes:
        written: our key -> the name that is written.
        read: every name that is understood -> our key.
    """

    written: dict[str, str] = field(default_factory=dict)
    read: dict[str, str] = field(default_factory=dict)


def _vocabulary(names: Iterator[tuple[str, str]]) -> Vocabulary:
    """Out of pairs (key, name), of which the first of each key is the one that is written."""
    result = Vocabulary()
    for key, name in names:
        result.written.setdefault(key, name)
        if result.read.setdefault(name, key) != key:
            raise AssertionError(f"{name} would be the name of {result.read[name]} and of {key}")
    return result


def our_names(layers: list[Layer]) -> Vocabulary:
    """Keys as they are."""
    return _vocabulary((layer.key, layer.key) for layer in layers)


def kohya_names(layers: list[Layer]) -> Vocabulary:
    """`lora_unet_down_blocks_0_...` and `lora_te_text_model_encoder_layers_0_...`; published names are understood."""

    def pairs() -> Iterator[tuple[str, str]]:
        for layer in layers:
            if layer.key.startswith(UNET):
                for name in (layer.module, *layer.others):
                    yield layer.key, f"lora_unet_{name}".replace(".", "_")
            else:
                for prefix in ("lora_te_", "lora_te1_"):
                    yield layer.key, f"{prefix}{PREFIX}{layer.module}".replace(".", "_")

    return _vocabulary(pairs())


def diffusers_names(layers: list[Layer]) -> Vocabulary:
    """`unet.down_blocks.0....`, `text_encoder.text_model....`; those of one network alone and peft's are read."""

    def pairs() -> Iterator[tuple[str, str]]:
        for layer in layers:
            modules = (layer.module, *layer.processors, *layer.others)
            if layer.key.startswith(UNET):
                prefixes: tuple[str, ...] = (UNET, "", "base_model.model.")
            else:
                prefixes = (f"{TEXT_ENCODER}{PREFIX}", TEXT_ENCODER, f"base_model.model.{PREFIX}", "base_model.model.")
            for module in modules:
                for prefix in prefixes:
                    yield layer.key, prefix + module

    return _vocabulary(pairs())
