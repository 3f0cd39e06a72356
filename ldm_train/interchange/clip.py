"""The text tower of CLIP (Radford et al. 2021) in the names of two libraries, open_clip's, which are ours, and another.

    open_clip                                          transformers
    transformer.resblocks.{i}.ln_1                     text_model.encoder.layers.{i}.layer_norm1
    transformer.resblocks.{i}.attn.in_proj_* (3D, D)   text_model.encoder.layers.{i}.self_attn.{q,k,v}_proj.* (D, D)
    text_projection (D, E)                             text_projection.weight (E, D)

OpenAI's own files have open_clip's names. Whole models carry a tower under a prefix of theirs: Stable Diffusion 1 under
`cond_stage_model.transformer.` with transformers' names, Stable Diffusion 2 under `cond_stage_model.model.` with
open_clip's. `text_tower` finds it wherever it is.

Letters: D width, E width of the space shared with images. `i` counts layers from 0.
"""

import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

PREFIX = "text_model."
"""What transformers puts before the tower's names; its version 5 leaves it out where the tower is the whole model."""

POSITION_IDS = "embeddings.position_ids"
"""0, 1, 2, ... (1, N): a buffer of older files, after the prefix, which says nothing."""

_EMBEDDED = "token_embedding.weight"  # the one tensor by which a tower is recognised; transformers: "embeddings." + it
_ENDS = (
    (_EMBEDDED, f"embeddings.{_EMBEDDED}"),
    ("positional_embedding", "embeddings.position_embedding.weight"),
    ("ln_final.weight", "final_layer_norm.weight"),
    ("ln_final.bias", "final_layer_norm.bias"),
)
_LAYER = (
    ("ln_1.{leaf}", ("layer_norm1.{leaf}",)),
    ("attn.in_proj_{leaf}", tuple(f"self_attn.{part}_proj.{{leaf}}" for part in "qkv")),
    ("attn.out_proj.{leaf}", ("self_attn.out_proj.{leaf}",)),
    ("ln_2.{leaf}", ("layer_norm2.{leaf}",)),
    ("mlp.c_fc.{leaf}", ("mlp.fc1.{leaf}",)),
    ("mlp.c_proj.{leaf}", ("mlp.fc2.{leaf}",)),
)
_PROJECTION = ("text_projection", "text_projection.weight")
# What files hold under the prefix that is not of the tower: the image's half, scales of the loss, the projection
# into the shared space, a mask that is computed, and OpenAI's numbers about the architecture.
_BESIDE = re.compile(
    r"visual\..*|logit_(scale|bias)|text_projection|attn_mask|context_length|vocab_size|input_resolution"
)
_OPEN_CLIP_LAYER, _TRANSFORMERS_LAYER = "transformer.resblocks.", "encoder.layers."


class TextTower(NamedTuple):
    """A text tower found in a file.

    Attributes:
        tensors: under open_clip's names, without prefix and projection; strangers keep their names.
        num_layers: how many layers it has.
    """

    tensors: dict[str, Tensor]
    num_layers: int


class _Entry(NamedTuple):
    """A tensor's name in open_clip, and those of its parts in transformers, which are stacked along the first axis."""

    open_clip: str
    transformers: tuple[str, ...]


def names(num_layers: int) -> list[str]:
    """Every tensor of a tower, without projection, by its name in open_clip."""
    return [entry.open_clip for entry in _table(num_layers)]


def to_open_clip(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A tower of transformers under open_clip's names.

    Args:
        tensors: of `CLIPTextModel` or `CLIPTextModelWithProjection`, with or without the prefix `text_model.`.
        num_layers: layers of the tower.

    Returns:
        The tensors; what the table does not know, and parts of an incomplete whole, keep their names for the strict
        comparison that follows.
    """
    left = {name.removeprefix(PREFIX): value for name, value in tensors.items()}
    left.pop(POSITION_IDS, None)
    result: dict[str, Tensor] = {}
    for entry in _table(num_layers):
        if all(name in left for name in entry.transformers):
            parts = [left.pop(name) for name in entry.transformers]
            result[entry.open_clip] = torch.cat(parts) if len(parts) > 1 else parts[0]
    ours, theirs = _PROJECTION
    if theirs in left:
        result[ours] = left.pop(theirs).t().contiguous()
    return result | left


def from_open_clip(tensors: Mapping[str, Tensor], num_layers: int) -> dict[str, Tensor]:
    """A tower of open_clip under transformers' names, those of `CLIPTextModel` in all published files.

    Args:
        tensors: of `TextTransformer`, complete, with or without its projection.
        num_layers: layers of the tower.

    Returns:
        Tensors that share no memory with each other: 16 a layer, 4 around them, and the projection if there is one.

    Raises:
        ValueError: if a tensor of the tower is missing.
    """
    if missing := [name for name in names(num_layers) if name not in tensors]:
        raise ValueError(
            f"{len(missing)} tensors of a text tower of {num_layers} layers are missing, the first is {missing[0]}; "
            "allowed is a complete one under open_clip's names; change `conditioner.encoder`"
        )
    result: dict[str, Tensor] = {}
    for entry in _table(num_layers):
        parts = tensors[entry.open_clip].chunk(len(entry.transformers))
        result |= {
            PREFIX + name: part.clone() if len(parts) > 1 else part
            for name, part in zip(entry.transformers, parts, strict=True)
        }
    ours, theirs = _PROJECTION
    return result | ({theirs: tensors[ours].t().contiguous()} if ours in tensors else {})


def text_tower(tensors: Mapping[str, Tensor]) -> TextTower:
    """Find the one text tower in a file: a text encoder, a CLIP model, or a whole diffusion model of either library.

    Args:
        tensors: all of the file.

    Raises:
        ValueError: if there is none, or more than one.
    """
    found = [name for name in tensors if name.endswith(_EMBEDDED)]
    if len(found) != 1:
        raise ValueError(
            f"{len(found)} text towers of CLIP among {len(tensors)} tensors {found}; allowed is a file with one: a "
            "text encoder of open_clip or transformers, a CLIP model, or Stable Diffusion 1 or 2; change "
            "`conditioner.encoder.weights`"
        )
    prefix = found[0].removesuffix(_EMBEDDED)
    is_transformers = prefix.endswith("embeddings.")
    prefix = prefix.removesuffix("embeddings.")
    own = {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
    layer = _TRANSFORMERS_LAYER if is_transformers else _OPEN_CLIP_LAYER
    num_layers = len({match[1] for name in own if (match := re.match(rf"{re.escape(layer)}(\d+)\.", name))})
    tower = to_open_clip(own, num_layers) if is_transformers else own
    return TextTower({name: value for name, value in tower.items() if not _BESIDE.fullmatch(name)}, num_layers)


def _table(num_layers: int) -> Iterator[_Entry]:
    yield from (_Entry(ours, (theirs,)) for ours, theirs in _ENDS)
    for layer in range(num_layers):
        for ours, theirs in _LAYER:
            for leaf in ("weight", "bias"):
                yield _Entry(
                    f"{_OPEN_CLIP_LAYER}{layer}.{ours.format(leaf=leaf)}",
                    tuple(f"{_TRANSFORMERS_LAYER}{layer}.{part.format(leaf=leaf)}" for part in theirs),
                )
