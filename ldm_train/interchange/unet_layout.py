"""Layouts of the U-Net: the names that a format gives to the tensors of one and the same network.

As for the autoencoder (`ldm_train.interchange.layout`), a vocabulary of templates for a walk over the network's places
gives a table of whole names. Here the walk goes down the levels, through the middle and up again, and a place may
hold a residual block, a spatial transformer, plain attention or a convolution.

The published layout numbers what is executed, one entry after the other, and its plain attention keeps queries, keys
and values in one tensor, (3 C, C, 1) in the order [heads, (q, k, v), C / heads]; a table from three names to thirds of
one tensor says so. Everywhere else a tensor has the same shape in all formats.

Fields of the templates: `level` from 0, the finest; `step` from 0 in the order of computation; `block` from 0 within
its level; `entry` from 0 within its side, resamplers counted when contracting; `slot`, the place within an entry.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_train.interchange.unet import UNetArchitecture

_LEAVES = ("weight", "bias")
_QUERY_KEY_VALUE = 3


class PlaceNames(NamedTuple):
    """Templates of the modules; `downsample_conv` and `upsample_conv` are names inside convolutional resamplers."""

    time_in: str
    time_out: str
    vector_in: str
    vector_out: str
    conv_in: str
    down_residual: str
    down_attention: str
    downsample: str
    middle_in: str
    middle_attention: str
    middle_out: str
    up_residual: str
    up_attention: str
    upsample: str
    norm_out: str
    conv_out: str
    downsample_conv: str = "conv"
    upsample_conv: str = "conv"


class ResidualNames(NamedTuple):
    """The layers of a residual block; `skip` is there where the width changes."""

    norm_in: str
    conv_in: str
    embed: str
    norm_out: str
    conv_out: str
    skip: str


class AttentionNames(NamedTuple):
    """The projections of an attention; equal names for q, k and v mean one tensor for the three."""

    to_q: str
    to_k: str
    to_v: str
    to_out: str


class TransformerNames(NamedTuple):
    """The layers of a spatial transformer; those from `norm_self` on are inside a `block`."""

    norm: str
    project_in: str
    project_out: str
    block: str
    norm_self: str
    self_attention: str
    norm_cross: str
    cross_attention: str
    norm_feed_forward: str
    feed_forward_in: str
    feed_forward_out: str
    attention: AttentionNames


@dataclass(frozen=True)
class UNetLayout:
    """The vocabulary of a format.

    Attributes:
        places: templates of the modules; `{attention}` is the word for the kind of attention.
        residual: layers inside a residual block.
        transformer: layers inside a spatial transformer.
        plain_norm: normalisation inside a plain attention.
        plain: projections inside one.
        attention_words: what `{attention}` stands for, by kind of attention.
    """

    places: PlaceNames
    residual: ResidualNames
    transformer: TransformerNames
    plain_norm: str
    plain: AttentionNames
    attention_words: Mapping[str, str]


OURS = UNetLayout(
    places=PlaceNames(
        time_in="time_embedding.layers.0",
        time_out="time_embedding.layers.2",
        vector_in="vector_embedding.0",
        vector_out="vector_embedding.2",
        conv_in="conv_in",
        down_residual="down.{level}.blocks.{block}.residual",
        down_attention="down.{level}.blocks.{block}.{attention}",
        downsample="down.{level}.downsample",
        middle_in="middle_in.residual",
        middle_attention="middle_in.{attention}",
        middle_out="middle_out.residual",
        up_residual="up.{step}.blocks.{block}.residual",
        up_attention="up.{step}.blocks.{block}.{attention}",
        upsample="up.{step}.upsample",
        norm_out="norm_out",
        conv_out="conv_out",
    ),
    residual=ResidualNames("norm_in", "conv_in", "embed", "norm_out", "conv_out", "skip"),
    transformer=TransformerNames(
        norm="norm",
        project_in="project_in",
        project_out="project_out",
        block="blocks.{depth}",
        norm_self="norm_self",
        self_attention="self_attention",
        norm_cross="norm_cross",
        cross_attention="cross_attention",
        norm_feed_forward="norm_feed_forward",
        feed_forward_in="feed_forward.project_in",
        feed_forward_out="feed_forward.project_out",
        attention=AttentionNames("to_q", "to_k", "to_v", "to_out"),
    ),
    plain_norm="norm",
    plain=AttentionNames("to_q", "to_k", "to_v", "to_out"),
    attention_words={"transformer": "transformer", "plain": "attention"},
)

# Diffusers has kept the published names inside its transformers.
PUBLISHED_TRANSFORMER = TransformerNames(
    norm="norm",
    project_in="proj_in",
    project_out="proj_out",
    block="transformer_blocks.{depth}",
    norm_self="norm1",
    self_attention="attn1",
    norm_cross="norm2",
    cross_attention="attn2",
    norm_feed_forward="norm3",
    feed_forward_in="ff.net.0.proj",
    feed_forward_out="ff.net.2",
    attention=AttentionNames("to_q", "to_k", "to_v", "to_out.0"),
)

COMPVIS_UNET = UNetLayout(
    places=PlaceNames(
        time_in="time_embed.0",
        time_out="time_embed.2",
        vector_in="label_emb.0.0",
        vector_out="label_emb.0.2",
        conv_in="input_blocks.0.0",
        down_residual="input_blocks.{entry}.0",
        down_attention="input_blocks.{entry}.1",
        downsample="input_blocks.{entry}.0",
        middle_in="middle_block.0",
        middle_attention="middle_block.1",
        middle_out="middle_block.2",
        up_residual="output_blocks.{entry}.0",
        up_attention="output_blocks.{entry}.1",
        upsample="output_blocks.{entry}.{slot}",
        norm_out="out.0",
        conv_out="out.2",
        downsample_conv="op",
    ),
    residual=ResidualNames(
        "in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"
    ),
    transformer=PUBLISHED_TRANSFORMER,
    plain_norm="norm",
    plain=AttentionNames("qkv", "qkv", "qkv", "proj_out"),
    attention_words={"transformer": "", "plain": ""},
)


def unet_names(layout: UNetLayout, architecture: UNetArchitecture) -> list[str]:
    """Every tensor of an architecture by its name in a layout, in the order of computation; fused ones three times."""
    return [tensor.name for tensor in _tensors(layout, architecture)]


def unet_to_ours(
    tensors: Mapping[str, Tensor], layout: UNetLayout, architecture: UNetArchitecture
) -> dict[str, Tensor]:
    """Tensors of a layout under our names and in our shapes; strangers are kept, under names that are not ours."""
    ours = unet_names(OURS, architecture)
    table = dict(zip(ours, _tensors(layout, architecture), strict=True))
    known = {name: _taken(tensors[theirs.name], theirs) for name, theirs in table.items() if theirs.name in tensors}
    strangers = tensors.keys() - {theirs.name for theirs in table.values()}
    return known | {f"{name} (of the file)" if name in table else name: tensors[name] for name in sorted(strangers)}


def unet_from_ours(
    state: Mapping[str, Tensor], layout: UNetLayout, architecture: UNetArchitecture
) -> dict[str, Tensor]:
    """A complete state dict of ours in a layout's names and shapes, without what it has no name for."""
    sources: dict[str, list[Tensor]] = {}
    forms: dict[str, _Tensor] = {}
    for ours, theirs in zip(unet_names(OURS, architecture), _tensors(layout, architecture), strict=True):
        sources.setdefault(theirs.name, []).append(state[ours])
        forms[theirs.name] = theirs
    return {name: _given(parts, forms[name]) for name, parts in sources.items()}


class _Tensor(NamedTuple):
    """A tensor's name in a layout, and how that layout keeps what ours has as a linear layer's, (C, C) or (C,).

    Attributes:
        name: the name.
        part: 0, 1, 2 for the queries, keys and values of a fused tensor.
        heads: attention heads of a fused tensor.
        is_conv1d: the weight has a third dimension, of length 1.
    """

    name: str
    part: int | None = None
    heads: int = 1
    is_conv1d: bool = False


def _taken(value: Tensor, theirs: _Tensor) -> Tensor:
    """Our tensor out of theirs; one of an impossible shape as it is, for the strict comparison to find."""
    if theirs.is_conv1d and value.ndim == 3:
        value = value[:, :, 0]
    if theirs.part is None or value.shape[0] % (_QUERY_KEY_VALUE * theirs.heads):
        return value
    return value.unflatten(0, (theirs.heads, _QUERY_KEY_VALUE, -1))[:, theirs.part].flatten(0, 1)


def _given(parts: list[Tensor], theirs: _Tensor) -> Tensor:
    """Their tensor out of ours, one or three."""
    value = parts[0]
    if theirs.part is not None:
        value = torch.stack([part.unflatten(0, (theirs.heads, -1)) for part in parts], dim=1).flatten(0, 2)
    return (value[:, :, None] if theirs.is_conv1d else value).contiguous()


class _Place(NamedTuple):
    """A module of the walk."""

    kind: str  # a field of `PlaceNames`
    level: int = 0
    step: int = 0
    block: int = 0
    entry: int = 0
    slot: int = 0
    widens: bool = False


def _tensors(layout: UNetLayout, architecture: UNetArchitecture) -> list[_Tensor]:
    return [tensor for place in _places(architecture) for tensor in _tensors_at(place, layout, architecture)]


def _tensors_at(place: _Place, layout: UNetLayout, architecture: UNetArchitecture) -> Iterator[_Tensor]:
    word = layout.attention_words[architecture.attention]
    module = getattr(layout.places, place.kind).format(attention=word, **place._asdict())
    match place.kind:
        case "downsample" | "upsample" if architecture.resample == "convolution":
            yield from _pair(f"{module}.{getattr(layout.places, f'{place.kind}_conv')}")
        case "down_residual" | "up_residual" | "middle_in" | "middle_out" | "downsample" | "upsample":
            layers = layout.residual if place.widens else layout.residual[:-1]
            yield from (tensor for layer in layers for tensor in _pair(f"{module}.{layer}"))
        case "down_attention" | "up_attention" | "middle_attention" if architecture.attention == "plain":
            yield from _plain_attention(module, layout, architecture.heads[place.level])
        case "down_attention" | "up_attention" | "middle_attention":
            has_context = architecture.context_dim is not None
            yield from _transformer(module, layout.transformer, architecture.depths[place.level], has_context)
        case _:
            yield from _pair(module)


def _pair(module: str) -> Iterator[_Tensor]:
    return (_Tensor(f"{module}.{leaf}") for leaf in _LEAVES)


def _plain_attention(module: str, layout: UNetLayout, heads: int) -> Iterator[_Tensor]:
    yield from _pair(f"{module}.{layout.plain_norm}")
    projections, is_fused = layout.plain[:-1], len(set(layout.plain[:-1])) == 1
    for part, layer in enumerate(projections):
        for leaf in _LEAVES:
            name = f"{module}.{layer}.{leaf}"
            yield _Tensor(name, part, heads, leaf == "weight") if is_fused else _Tensor(name)
    for leaf in _LEAVES:
        yield _Tensor(f"{module}.{layout.plain.to_out}.{leaf}", is_conv1d=is_fused and leaf == "weight")


def _transformer(module: str, names: TransformerNames, depth: int, has_context: bool) -> Iterator[_Tensor]:
    yield from _pair(f"{module}.{names.norm}")
    yield from _pair(f"{module}.{names.project_in}")
    attentions = [(names.norm_self, names.self_attention)]
    if has_context:
        attentions.append((names.norm_cross, names.cross_attention))
    for index in range(depth):
        block = f"{module}.{names.block.format(depth=index)}"
        for norm, attention in attentions:
            yield from _pair(f"{block}.{norm}")
            yield from (_Tensor(f"{block}.{attention}.{layer}.weight") for layer in names.attention)
            yield _Tensor(f"{block}.{attention}.{names.attention.to_out}.bias")
        for layer in (names.norm_feed_forward, names.feed_forward_in, names.feed_forward_out):
            yield from _pair(f"{block}.{layer}")
    yield from _pair(f"{module}.{names.project_out}")


def _places(architecture: UNetArchitecture) -> Iterator[_Place]:
    yield from (_Place("time_in"), _Place("time_out"))
    if architecture.vector_dim is not None:
        yield from (_Place("vector_in"), _Place("vector_out"))
    yield _Place("conv_in")
    skips = [architecture.channels]
    yield from _down_places(architecture, skips)
    last = len(architecture.widths) - 1
    yield from (_Place(kind, level=last) for kind in ("middle_in", "middle_attention", "middle_out"))
    yield from _up_places(architecture, skips)
    yield from (_Place("norm_out"), _Place("conv_out"))


def _down_places(architecture: UNetArchitecture, skips: list[int]) -> Iterator[_Place]:
    """The contracting places; the widths of what they keep are added to `skips`."""
    width, entry = architecture.channels, 1
    for level, level_width in enumerate(architecture.widths):
        for block in range(architecture.num_res_blocks):
            yield _Place("down_residual", level, level, block, entry, widens=level_width != width)
            if architecture.attends(level):
                yield _Place("down_attention", level, level, block, entry)
            width = level_width
            skips.append(width)
            entry += 1
        if level + 1 < len(architecture.widths):
            yield _Place("downsample", level, level, entry=entry)
            skips.append(width)
            entry += 1


def _up_places(architecture: UNetArchitecture, skips: list[int]) -> Iterator[_Place]:
    """The expanding places; each block takes one width of `skips` from the end."""
    width, entry = architecture.widths[-1], 0
    for step, level in enumerate(reversed(range(len(architecture.widths)))):
        attends, level_width = architecture.attends(level), architecture.widths[level]
        for block in range(architecture.num_res_blocks + 1):
            yield _Place("up_residual", level, step, block, entry, widens=width + skips.pop() != level_width)
            if attends:
                yield _Place("up_attention", level, step, block, entry)
            width = level_width
            entry += 1
        if level:
            yield _Place("upsample", level, step, entry=entry - 1, slot=2 if attends else 1)
