"""Files of low-rank adapters: ours, kohya's, and diffusers' or peft's, in memory `dict[str, LowRank]`.

The keys are those of `ldm_train.interchange.adapter_names`; the layouts are in `ldm_train.interchange.adapter_layouts`.
Reading recognises the layout, looks every name up in the table of the architecture, compares every shape and refuses
the file with the whole difference; nothing is guessed and nothing is left out. The architecture comes from the caller,
from our record in the file, or else is Stable Diffusion's, where names and shapes fit exactly one of its versions.

Two things are not errors: a file of kohya's without `.alpha` means alpha = r, that is a scale of 1, and says so in
`assumed_scales`; and adapters of another model of the same architecture, which only the digest tells.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ldm_train.checkpoint import atomic_write, read_checkpoint
from ldm_train.interchange.adapter_layouts import (
    DIFFUSERS,
    KOHYA,
    LAYOUTS,
    OURS,
    Layout,
    Parts,
    PeftSettings,
    encode_diffusers,
    encode_kohya,
    encode_ours,
    kohya_header,
    layout_of,
    magnitude_of,
    peft_settings,
    split,
)
from ldm_train.interchange.adapter_metadata import PUBLISHED, AdapterMetadata, Header, read_header
from ldm_train.interchange.adapter_names import AdapterBase, Layer, layers_of
from ldm_train.interchange.compvis import check_tensors, state_of
from ldm_train.nn.low_rank import LowRank

PEFT_CONFIG = "adapter_config.json"
"""By it a folder of peft is recognised."""

_FILES = (
    "adapter_model.safetensors",
    "adapter_model.bin",
    "pytorch_lora_weights.safetensors",
    "pytorch_lora_weights.bin",
)
_PICKLED = (".bin", ".pt", ".pth", ".ckpt")
# Parts of LyCORIS' other decompositions (Yeh et al. 2024), which are no product of two matrices.
_OTHER_KINDS = {
    "hada_": "LoHa, a Hadamard product",
    "lokr_": "LoKr, a Kronecker product",
    "lora_mid": "LoCon with a Tucker decomposition",
    "oft_": "OFT, an orthogonal transformation",
    "lora_embedding_": "adapters of an embedding",
}
_LISTED = 4


@dataclass(frozen=True)
class AdapterFile:
    """Adapters that were read.

    Attributes:
        adapters: by our key.
        metadata: what is known beside them.
        layout: the name of the file's layout.
        assumed_scales: of kohya's files: how many adapters say no alpha, and are taken to have a scale of 1.
    """

    adapters: dict[str, LowRank]
    metadata: AdapterMetadata
    layout: str
    assumed_scales: int = 0


def read_adapters(path: Path, base: AdapterBase | None = None) -> AdapterFile:
    """Read adapters of any layout; no code in the file is run.

    Args:
        path: a `.safetensors`, a `.bin`, `.pt` or `.ckpt` of plain tensors, or a folder of peft or diffusers.
        base: the architecture they belong to; `None` where the file says it, or it is Stable Diffusion's.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, of another kind, or belongs to another architecture; with what is allowed.
    """
    content = _content(path)
    try:
        return _decoded(content, base)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def write_adapters(
    path: Path,
    adapters: Mapping[str, LowRank],
    metadata: AdapterMetadata,
    layout: str = OURS.name,
    dtype: torch.dtype | None = None,
) -> None:
    """Write adapters; the file is there whole or not at all.

    Args:
        path: a name in `.safetensors`.
        adapters: by our key.
        metadata: their architecture, by which names are spelled out, and what is kept beside them.
        layout: `ours`, `kohya` or `diffusers`.
        dtype: of the factors and magnitudes; `None` leaves it.

    Raises:
        ValueError: if the layout is unknown or cannot hold them, or they are not of this architecture.
    """
    if layout not in LAYOUTS:
        raise ValueError(f"there is no layout {layout!r}; allowed are {', '.join(LAYOUTS)}; change the layout")
    if path.suffix != ".safetensors":
        raise ValueError(f"{path} ends in {path.suffix!r}; allowed is a name in .safetensors; change it")
    layers = layers_of(metadata.base)
    _check_shapes(adapters, layers)
    _check_scales(adapters)
    converted = adapters if dtype is None else {key: adapter.to(dtype) for key, adapter in adapters.items()}
    names = LAYOUTS[layout].names(layers).written
    header = metadata.header()
    if layout == KOHYA.name:
        tensors, header = encode_kohya(converted, names), header | kohya_header(adapters, metadata)
    elif layout == DIFFUSERS.name:
        tensors, header = encode_diffusers(converted, names), header | peft_settings(adapters, names)
    else:
        tensors = encode_ours(converted, names)
    _check_finite(tensors)
    with atomic_write(path) as temporary:
        # A copy of each: save_file refuses tensors that share memory.
        own = {
            name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in tensors.items()
        }
        save_file(own, temporary, metadata=header)


class _Content(NamedTuple):
    """What is in a file, and in the `adapter_config.json` beside it."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    peft: dict[str, Any] | None


def _content(path: Path) -> _Content:
    if not path.exists():
        raise FileNotFoundError(
            f"nothing at {path}; allowed are a .safetensors, a file of plain tensors ({', '.join(_PICKLED)}), and a "
            "folder of peft or diffusers; name another file"
        )
    if not path.is_dir():
        return _Content(*_tensors(path), peft=None)
    found = [path / name for name in _FILES if (path / name).is_file()]
    if not found:
        raise ValueError(f"{path} holds no adapters; allowed is a folder with {' or '.join(_FILES)}; name another one")
    config = path / PEFT_CONFIG
    try:
        peft = json.loads(config.read_text(encoding="utf-8")) if config.is_file() else None
    except ValueError as error:
        raise ValueError(f"{config} cannot be read ({error}); allowed is JSON; fetch it again") from error
    return _Content(*_tensors(found[0]), peft)


def _tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    if path.suffix in _PICKLED:
        state = state_of(read_checkpoint(path, "the adapters' file", is_foreign=True))
        check_tensors(state)
        return dict(state), {}
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); allowed is a complete safetensors file; fetch it again, or name another"
        ) from error


def _decoded(content: _Content, base: AdapterBase | None) -> AdapterFile:
    names = list(content.tensors)
    for part, kind in _OTHER_KINDS.items():
        if found := [name for name in names if part in name]:
            raise ValueError(
                f"{len(found)} tensors are parts of {kind}, the first is {found[0]}; allowed are products of two "
                "matrices, LoRA and DoRA; name another file, or extract adapters out of a merged model"
            )
    layout = layout_of(names)
    if layout is None:
        raise ValueError(
            f"none of {len(names)} tensors has an adapter's name{_listed(names)}; allowed are the layouts "
            f"{', '.join(LAYOUTS)}; name another file"
        )
    _check_finite(content.tensors)
    modules, strangers = split(content.tensors, layout)
    if strangers:
        raise ValueError(
            f"{len(strangers)} tensors are no parts of adapters{_listed(strangers)}; allowed are those that end in "
            f"{', '.join((*layout.down, *layout.up, *layout.alpha, *layout.magnitude))}; name another file"
        )
    _check_pairs(modules)
    header = read_header(content.header)
    base = base or header.base or _recognised(modules, layout, header)
    layers = layers_of(base)
    keys = layout.names(layers).read
    if unknown := [module for module in modules if module not in keys]:
        raise ValueError(_unknown(unknown, len(modules)))
    scale = _Scales(layout, PeftSettings.of(content.header, content.peft))
    adapters = {keys[module]: scale.adapter(module, parts) for module, parts in modules.items()}
    _check_shapes(adapters, layers)
    order = {layer.key: index for index, layer in enumerate(layers)}
    adapters = {key: adapters[key] for key in sorted(adapters, key=order.__getitem__)}
    metadata = AdapterMetadata(base, header.base_digest, header.trigger_words, header.notes)
    assumed = sum("alpha" not in parts for parts in modules.values()) if layout.alpha else 0
    return AdapterFile(adapters, metadata, layout.name, assumed)


class _Scales(NamedTuple):
    """How a file's parts become adapters."""

    layout: Layout
    peft: PeftSettings

    def adapter(self, module: str, parts: Mapping[str, Tensor]) -> LowRank:
        down, up = parts["down"], parts["up"]
        try:
            rank = LowRank(down, up).rank
        except ValueError as error:
            raise ValueError(f"{module}: {error}") from error
        if self.layout is DIFFUSERS:
            alpha = self.peft.scale(module, rank)
        else:
            alpha = _number(module, parts["alpha"]) if "alpha" in parts else float(rank)
            # Ours is the scale itself; without it, as in kohya's files, it is 1.
            alpha = alpha / rank if self.layout is KOHYA or "alpha" not in parts else alpha
        magnitude = None
        if "magnitude" in parts:
            magnitude = magnitude_of(parts["magnitude"], self.layout, up)
            if magnitude is None:
                raise ValueError(
                    f"the magnitude of {module} is {tuple(parts['magnitude'].shape)} beside a B of {tuple(up.shape)}; "
                    f"allowed is one length for each of the {up.shape[0]} outputs; name another file"
                )
        return LowRank(down, up, alpha, magnitude)


def _number(module: str, value: Tensor) -> float:
    if value.numel() != 1:
        raise ValueError(
            f"the alpha of {module} has the shape {tuple(value.shape)}; allowed is one number; name another file"
        )
    return float(value)


def _recognised(modules: Parts, layout: Layout, header: Header) -> AdapterBase:
    """The published model that every name and shape fits; the file's word decides between several.

    Raises:
        ValueError: if none fits, with what is closest, or several do.
    """
    misfits = {option: _misfits(modules, layout, base) for option, base in PUBLISHED.items()}
    fitting = [option for option, names in misfits.items() if not names]
    if header.named in fitting:
        fitting = [header.named]
    if len(fitting) == 1:
        return PUBLISHED[fitting[0]]
    if fitting:
        several = f"{', '.join(fitting[:-1])} and {fitting[-1]}"
        raise ValueError(
            f"its {len(modules)} layers fit {several} alike, and it does not say which; allowed is one model; name it: "
            f"--unet {fitting[0]}"
        )
    closest = min(misfits, key=lambda option: len(misfits[option]))
    raise ValueError(
        f"it says no architecture, and of its {len(modules)} layers {len(misfits[closest])} do not fit {closest}, the "
        f"closest{_listed(misfits[closest])}; allowed without more words are adapters of {', '.join(PUBLISHED)}; "
        "describe their U-Net with --unet"
    )


def _misfits(modules: Parts, layout: Layout, base: AdapterBase) -> list[str]:
    """The modules that are none of a base model's layers, or are of other shapes."""
    layers = layers_of(base)
    shapes = {layer.key: layer.weight_shape for layer in layers}
    keys = layout.names(layers).read
    return [
        module
        for module, parts in modules.items()
        if module not in keys or (*parts["up"].shape[:1], *parts["down"].shape[1:]) != shapes[keys[module]]
    ]


def _check_pairs(modules: Parts) -> None:
    halves = [
        f"{module} lacks its {'B (up)' if 'down' in parts else 'A (down)'}"
        for module, parts in modules.items()
        if not {"down", "up"} <= parts.keys()
    ]
    if halves:
        raise ValueError(
            f"{len(halves)} adapters are incomplete{_listed(halves)}; allowed are pairs of A and B; fetch the file "
            "again"
        )


def _check_finite(tensors: Mapping[str, Tensor]) -> None:
    if broken := [name for name, value in tensors.items() if not bool(torch.isfinite(value.float()).all())]:
        raise ValueError(
            f"{len(broken)} tensors hold values that are not finite{_listed(broken)}; allowed are finite numbers; use "
            "an earlier file of that training, or a type of a larger range"
        )


def _check_scales(adapters: Mapping[str, LowRank]) -> None:
    if broken := [key for key, adapter in adapters.items() if not math.isfinite(adapter.alpha)]:
        raise ValueError(
            f"the scales of {len(broken)} adapters are not finite{_listed(broken)}; allowed are finite numbers; change "
            "their alpha"
        )


def _check_shapes(adapters: Mapping[str, LowRank], layers: list[Layer]) -> None:
    shapes = {layer.key: layer.weight_shape for layer in layers}
    if unknown := [key for key in adapters if key not in shapes]:
        raise ValueError(_unknown(unknown, len(adapters)))
    differing = [
        f"{key} is for a weight of {adapter.weight_shape} and the layer's is {shapes[key]}"
        for key, adapter in adapters.items()
        if adapter.weight_shape != shapes[key]
    ]
    if differing:
        raise ValueError(
            f"{len(differing)} of {len(adapters)} adapters are of other shapes than the base model{_listed(differing)};"
            " allowed are adapters of this architecture; name another base model (--unet) or another file"
        )


def _unknown(names: list[str], count: int) -> str:
    return (
        f"{len(names)} of {count} adapted layers are none of the base model{_listed(names)}; allowed are the linear "
        "and convolutional layers of its U-Net and text encoder; name another base model (--unet) or another file"
    )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return f" ({', '.join(names[:_LISTED])}{more})" if names else ""
