"""What files of adapters say about themselves beside their tensors, and the models that files of others belong to.

Every file that is written here carries our record, JSON in the header of safetensors where other readers do not look:

    {"adapters": {"version": 1, "unet": {...}, "text_encoder": {...}, "base_digest": "...", "trigger_words": [...]}}

so it describes its architecture and finds its base model again. A file of others says at most a word about it, and is
recognised as one of Stable Diffusion's by its names and shapes (`ldm_train.interchange.adapter_files`).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from ldm_train.interchange.adapter_names import AdapterBase, TextShape
from ldm_train.interchange.compvis import RECORD, from_metadata
from ldm_train.interchange.unet import UNetArchitecture

VERSION = 1
"""Of the record."""

TRIGGER_PHRASE = "modelspec.trigger_phrase"
"""Where files of others keep the trigger words, separated by commas."""

_ADAPTERS = "adapters"
_STRUCTURAL = ("format", RECORD, "lora_adapter_metadata")
# Notes that are of the tensors themselves, and stale with others: kohya's and modelspec's.
_OF_THE_TENSORS = (
    "ss_network_dim",
    "ss_network_alpha",
    "sshs_model_hash",
    "sshs_legacy_hash",
    "modelspec.hash_sha256",
)
# No U-Net has so many blocks, nor a text tower so many layers, and a record of more would take hours to look at.
_LARGEST = 500
# Nor has one so many channels; tensors of more cannot be counted.
_WIDEST = 1 << 20
_UNET = {"_target_": "ldm_train.nn.UNet", "in_channels": 4, "out_channels": 4}
PUBLISHED: dict[str, AdapterBase] = {
    "sd1": AdapterBase(_UNET | {"context_dim": 768, "num_heads": 8}, TextShape(12, 768)),
    "sd2": AdapterBase(
        _UNET | {"context_dim": 1024, "head_channels": 64, "linear_projection": True}, TextShape(24, 1024)
    ),
    # Its second text encoder has no place in a model of ours.
    "sdxl": AdapterBase(
        _UNET
        | {
            "channel_multipliers": [1, 2, 4],
            "attention_factors": [2, 4],
            "context_dim": 2048,
            "vector_dim": 2816,
            "head_channels": 64,
            "transformer_depth": [1, 2, 10],
            "linear_projection": True,
        },
        TextShape(12, 768),
    ),
}
"""The models that files of others are recognised for, by the options of conf/unet that describe them."""

# What kohya's scripts and the modelspec of stability.ai write, beginnings of it.
_NAMED_BASES = {
    "ss_base_model_version": {"sd_v1": "sd1", "sd_v2": "sd2", "sd_1": "sd1", "sd_2": "sd2", "sdxl": "sdxl"},
    "modelspec.architecture": {
        "stable-diffusion-v1": "sd1",
        "stable-diffusion-v2": "sd2",
        "stable-diffusion-xl": "sdxl",
    },
}


@dataclass(frozen=True)
class AdapterMetadata:
    """What is known of adapters beside their tensors.

    Attributes:
        base: the architecture they belong to.
        base_digest: identity of the U-Net they were trained on, `ldm_train.checkpoint.digest`; `None` if unknown.
        trigger_words: words of the captions they were trained with.
        notes: what else the header says, of others' making.
    """

    base: AdapterBase
    base_digest: str | None = None
    trigger_words: tuple[str, ...] = ()
    notes: Mapping[str, str] = field(default_factory=dict)

    def header(self) -> dict[str, str]:
        """The header of a safetensors file with our record."""
        text = self.base.text_encoder
        record = {
            "version": VERSION,
            "unet": dict(self.base.unet),
            "text_encoder": None if text is None else text._asdict(),
            "base_digest": self.base_digest,
            "trigger_words": list(self.trigger_words),
        }
        stale = (*_STRUCTURAL, *_OF_THE_TENSORS)
        notes = {key: value for key, value in self.notes.items() if key not in stale}
        return notes | {"format": "pt", RECORD: json.dumps({_ADAPTERS: record})}


@dataclass(frozen=True)
class Header:
    """A header that was read.

    Attributes:
        base: what our record says of the architecture, if there is one.
        named: option of conf/unet that others' words mean, if there are any.
        base_digest: as in `AdapterMetadata`.
        trigger_words: likewise.
        notes: likewise.
    """

    base: AdapterBase | None
    named: str | None
    base_digest: str | None
    trigger_words: tuple[str, ...]
    notes: dict[str, str]


def read_header(header: Mapping[str, str]) -> Header:
    """What a header says.

    Raises:
        ValueError: if our record in it is damaged, or of a later version.
    """
    record = from_metadata(header).get(RECORD) or {}
    record = record.get(_ADAPTERS) if isinstance(record, Mapping) else None
    notes = {key: value for key, value in header.items() if key not in _STRUCTURAL}
    if record is None:
        phrase = header.get(TRIGGER_PHRASE, "")
        words = tuple(word.strip() for word in phrase.split(",") if word.strip())
        return Header(None, _named_base(header), None, words, notes)
    version = record.get("version") if isinstance(record, Mapping) else None
    if version != VERSION:
        raise ValueError(
            f"the record of the file is of version {version}; allowed is {VERSION}; update this program, or convert "
            "the file with the one that wrote it"
        )
    try:
        text, digest, words = (record.get(key) for key in ("text_encoder", "base_digest", "trigger_words"))
        base = AdapterBase(record["unet"], None if text is None else TextShape(**text))
        _check_size(base)
        if not isinstance(digest, str | None) or not all(isinstance(word, str) for word in words or ()):
            raise TypeError("a value is of another type")
    except (KeyError, TypeError) as error:
        raise ValueError(
            f"the record of the file is damaged ({error}); allowed is what this program writes; name another file"
        ) from error
    return Header(base, None, digest, tuple(words or ()), notes)


def _check_size(base: AdapterBase) -> None:
    """Refuse a record that describes no model, before one is built from it."""
    shape = UNetArchitecture.of(base.unet)
    counts = (shape.in_channels, shape.out_channels, shape.concat_channels, shape.channels, shape.num_res_blocks)
    widths = (shape.context_dim or 0, shape.vector_dim or 0, shape.norm_groups, *shape.channel_multipliers)
    text = base.text_encoder or ()
    if any(
        type(number) is not int or not 0 <= number <= _WIDEST for number in (*counts, *widths, *shape.depths, *text)
    ):
        raise TypeError(f"a size of a network is no whole number from 0 to {_WIDEST}")
    if not isinstance(base.unet.get("dropout", 0.0), int | float):
        raise TypeError("a share is no number")
    blocks = shape.num_res_blocks * sum(1 + depth for depth in shape.depths)
    layers = 0 if base.text_encoder is None else base.text_encoder.num_layers
    for found, what in ((blocks, "blocks of its U-Net"), (layers, "layers of its text encoder")):
        if found > _LARGEST:
            raise ValueError(
                f"the record of the file says {found} {what}; allowed are up to {_LARGEST}; name another file"
            )


def _named_base(header: Mapping[str, str]) -> str | None:
    for key, names in _NAMED_BASES.items():
        for beginning, option in names.items():
            if header.get(key, "").startswith(beginning):
                return option
    return None
