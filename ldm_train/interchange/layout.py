"""Layouts: the names that a format gives to the tensors of one and the same network.

An autoencoder is a walk over places: the residual blocks, attentions and resamplings of each level of the encoder, its
middle, and the same in the decoder. A `Layout` is the vocabulary of one format for that walk. `names` spells it out in
an order that depends on the architecture alone, so that two vocabularies give a table of whole names,

    dict(zip(names(OURS, architecture), names(COMPVIS, architecture)))

and translating is looking up. A name that is in no table is a stranger and stays what it is, for the strict comparison
that follows to find.

Fields of the templates: `level` from 0, the finest; `step` from 0 in the order of computation; `block` from 0 within
its level; `layer` likewise, with the attentions counted.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from torch import Tensor

from ldm_train.interchange.architecture import Architecture

_Side = Literal["encoder", "decoder"]
_Kind = Literal[
    "conv_in",
    "residual",
    "attention",
    "resample",
    "middle_in",
    "middle_attention",
    "middle_out",
    "norm_out",
    "conv_out",
]  # the fields of `SideNames`
_LEAVES = ("weight", "bias")


class SideNames(NamedTuple):
    """Templates of the modules of the encoder, or of the decoder."""

    conv_in: str
    residual: str
    attention: str
    resample: str
    middle_in: str
    middle_attention: str
    middle_out: str
    norm_out: str
    conv_out: str


class ResidualNames(NamedTuple):
    """The layers of a residual block; `skip` is there where the width changes."""

    norm_in: str
    conv_in: str
    norm_out: str
    conv_out: str
    skip: str


class AttentionNames(NamedTuple):
    """The layers of an attention."""

    norm: str
    to_q: str
    to_k: str
    to_v: str
    to_out: str


@dataclass(frozen=True)
class Layout:
    """The vocabulary of a format.

    Attributes:
        encoder: templates of the encoder's modules.
        decoder: templates of the decoder's.
        residual: layers inside a residual block.
        attention: layers inside an attention.
        to_moments: 1x1 convolution after the encoder.
        from_latents: 1x1 convolution before the decoder.
        codebook: tensor (K, C) of a vector quantiser.
        linear_attention: attention weights are those of linear layers, (C, C), and not of 1x1 convolutions,
            (C, C, 1, 1).
    """

    encoder: SideNames
    decoder: SideNames
    residual: ResidualNames
    attention: AttentionNames
    to_moments: str
    from_latents: str
    codebook: str
    linear_attention: bool


OURS = Layout(
    encoder=SideNames(
        conv_in="encoder.conv_in",
        residual="encoder.down.{level}.layers.{layer}",
        attention="encoder.down.{level}.layers.{layer}",
        resample="encoder.down.{level}.resample.conv",
        middle_in="encoder.middle.block_in",
        middle_attention="encoder.middle.attention",
        middle_out="encoder.middle.block_out",
        norm_out="encoder.norm_out",
        conv_out="encoder.conv_out",
    ),
    decoder=SideNames(
        conv_in="decoder.conv_in",
        residual="decoder.up.{step}.layers.{layer}",
        attention="decoder.up.{step}.layers.{layer}",
        resample="decoder.up.{step}.resample.conv",
        middle_in="decoder.middle.block_in",
        middle_attention="decoder.middle.attention",
        middle_out="decoder.middle.block_out",
        norm_out="decoder.norm_out",
        conv_out="decoder.conv_out",
    ),
    residual=ResidualNames("norm_in", "conv_in", "norm_out", "conv_out", "skip"),
    attention=AttentionNames("norm", "to_q", "to_k", "to_v", "to_out"),
    to_moments="to_moments",
    from_latents="from_latents",
    codebook="regularizer.codebook",
    linear_attention=False,
)


def names(layout: Layout, architecture: Architecture) -> list[str]:
    """Every tensor of an architecture by its name in a layout, in the order of computation."""
    return [tensor.name for tensor in _tensors(layout, architecture)]


def to_ours(tensors: Mapping[str, Tensor], layout: Layout, architecture: Architecture) -> dict[str, Tensor]:
    """Tensors of a layout under our names and in our shapes; strangers are kept, under names that are not ours."""
    ours = names(OURS, architecture)
    table = dict(zip(_tensors(layout, architecture), ours, strict=True))
    known = {
        name: _as_convolution(tensors[theirs.name], theirs) for theirs, name in table.items() if theirs.name in tensors
    }
    strangers = tensors.keys() - {theirs.name for theirs in table}
    return known | {f"{name} (of the file)" if name in ours else name: tensors[name] for name in sorted(strangers)}


def from_ours(state: Mapping[str, Tensor], layout: Layout, architecture: Architecture) -> dict[str, Tensor]:
    """A complete state dict of ours in a layout's names and shapes, without what it has no name for."""
    table = zip(names(OURS, architecture), _tensors(layout, architecture), strict=True)
    return {
        theirs.name: (state[ours][:, :, 0, 0] if theirs.is_matrix else state[ours]).contiguous()
        for ours, theirs in table
    }


class _Tensor(NamedTuple):
    """A tensor's name in a layout, and whether that layout has it as (C, C) where ours is (C, C, 1, 1)."""

    name: str
    is_matrix: bool = False


def _as_convolution(value: Tensor, theirs: _Tensor) -> Tensor:
    # A file may hold the convolution's shape under the linear layer's name: both mean the same.
    return value[:, :, None, None] if theirs.is_matrix and value.ndim == 2 else value


class _Place(NamedTuple):
    """A module of the walk."""

    side: _Side
    kind: _Kind
    level: int = 0
    step: int = 0
    block: int = 0
    layer: int = 0
    widens: bool = False


def _tensors(layout: Layout, architecture: Architecture) -> list[_Tensor]:
    places = [*_places(architecture, "encoder"), *_places(architecture, "decoder")]
    tensors = [tensor for place in places for tensor in _tensors_at(place, layout)]
    tensors += [_Tensor(f"{name}.{leaf}") for name in (layout.to_moments, layout.from_latents) for leaf in _LEAVES]
    return tensors if architecture.codebook_size is None else [*tensors, _Tensor(layout.codebook)]


def _tensors_at(place: _Place, layout: Layout) -> Iterator[_Tensor]:
    side = layout.encoder if place.side == "encoder" else layout.decoder
    module = getattr(side, place.kind).format(**place._asdict())
    match place.kind:
        case "residual" | "middle_in" | "middle_out":
            layers = layout.residual if place.widens else layout.residual[:-1]
            yield from (_Tensor(f"{module}.{layer}.{leaf}") for layer in layers for leaf in _LEAVES)
        case "attention" | "middle_attention":
            for layer in layout.attention:
                is_matrix = layout.linear_attention and layer != layout.attention.norm
                yield _Tensor(f"{module}.{layer}.weight", is_matrix)
                yield _Tensor(f"{module}.{layer}.bias")
        case _:
            yield from (_Tensor(f"{module}.{leaf}") for leaf in _LEAVES)


def _places(architecture: Architecture, side: _Side) -> Iterator[_Place]:
    yield _Place(side, "conv_in")
    if side == "encoder":
        yield from _level_places(architecture, side)
    yield _Place(side, "middle_in")
    if architecture.shape.middle_attention:
        yield _Place(side, "middle_attention")
    yield _Place(side, "middle_out")
    if side == "decoder":
        yield from _level_places(architecture, side)
    yield _Place(side, "norm_out")
    yield _Place(side, "conv_out")


def _level_places(architecture: Architecture, side: _Side) -> Iterator[_Place]:
    levels = list(enumerate(architecture.shape.levels))
    blocks, width = architecture.shape.num_res_blocks, architecture.shape.channels
    if side == "decoder":
        levels, blocks, width = levels[::-1], blocks + 1, levels[-1][1].width
    for step, (level, shape) in enumerate(levels):
        for block in range(blocks):
            layer = block * (2 if shape.attention else 1)
            yield _Place(side, "residual", level, step, block, layer, widens=shape.width != width)
            if shape.attention:
                yield _Place(side, "attention", level, step, block, layer + 1)
            width = shape.width
        if step + 1 < len(levels):
            yield _Place(side, "resample", level, step)
