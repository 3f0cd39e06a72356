"""Layouts of adapter files: under which names, in which shapes and with which scale a format keeps A, B and m.

             A                    B                  scale of B A                     m of DoRA
    ours     .down                .up                .alpha, the scale itself         .magnitude (out,)
    kohya    .lora_down.weight    .lora_up.weight    .alpha / r; 1 where it lacks     .dora_scale (out, 1[, 1, 1])
    diffusers .lora_A.weight      .lora_B.weight     lora_alpha / r of a header       .lora_magnitude_vector

Kohya's and diffusers' scale is divided by the rank and ours is not: a network alpha a is a / r here, and is written as
our alpha times r. Diffusers reads the JSON `lora_adapter_metadata` in a file's header as the settings of peft's
`LoraConfig`, each under its part's prefix (`unet.lora_alpha`), with a pattern where a layer differs from the rest;
without it, alpha is the rank and the scale 1. Readers that do not know this header (older than diffusers 0.34) take
adapters of scales other than 1 from kohya's layout alone. Peft's folders have the same settings in
`adapter_config.json`; with `use_rslora` the divisor is sqrt(r) (Kalajdzievski 2023).

Diffusers 0.42 reads kohya's files with two faults. It drops magnitudes, and says so; and where the numbers `.alpha` of
a file differ (`network_alphas`), it takes the most frequent one for all attentions of the U-Net and for the whole text
encoder. Its own layout has neither fault.

Diffusers' names have had three ages, all of which are understood: `attn1.processor.to_q_lora.down.weight`,
`attn1.to_q.lora.down.weight` and now peft's.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_train.interchange.adapter_metadata import PUBLISHED, TRIGGER_PHRASE, AdapterMetadata
from ldm_train.interchange.adapter_names import (
    TEXT_ENCODER,
    UNET,
    Layer,
    Vocabulary,
    diffusers_names,
    kohya_names,
    our_names,
)
from ldm_train.interchange.clip import PREFIX
from ldm_train.interchange.unet import UNetArchitecture
from ldm_train.nn.low_rank import LowRank

PEFT_SETTINGS = "lora_adapter_metadata"
"""Entry of the header with peft's settings."""

_PEFT_PREFIX = "base_model.model."
_PEFT_ALPHA = 8  # of `LoraConfig` where nothing is said


class Layout(NamedTuple):
    """How a format keeps adapters.

    Attributes:
        name: of the format.
        names: its names of a base model's layers.
        down: ends of A's names; the first is the one that is written, as in those that follow.
        up: of B's.
        alpha: of the scale's.
        magnitude: of m's.
    """

    name: str
    names: Callable[[list[Layer]], Vocabulary]
    down: tuple[str, ...]
    up: tuple[str, ...]
    alpha: tuple[str, ...]
    magnitude: tuple[str, ...]


OURS = Layout("ours", our_names, (".down",), (".up",), (".alpha",), (".magnitude",))
KOHYA = Layout("kohya", kohya_names, (".lora_down.weight",), (".lora_up.weight",), (".alpha",), (".dora_scale",))
DIFFUSERS = Layout(
    "diffusers",
    diffusers_names,
    (".lora_A.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", ".down.weight"),
    (".lora_B.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", ".up.weight"),
    (),
    (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in (OURS, KOHYA, DIFFUSERS)}
"""By name."""


def layout_of(names: list[str]) -> Layout | None:
    """The layout that the names of a file's tensors have; `None` if it is none of them."""
    if any(name.startswith("lora_") for name in names):
        return KOHYA
    if any(name.endswith((*DIFFUSERS.down, *DIFFUSERS.up)) for name in names):
        return DIFFUSERS
    return OURS if any(name.endswith((*OURS.down, *OURS.up)) for name in names) else None


Parts = dict[str, dict[str, Tensor]]
"""The tensors of each module, by their part: down, up, alpha or magnitude."""


def split(tensors: Mapping[str, Tensor], layout: Layout) -> tuple[Parts, list[str]]:
    """The tensors of each module, and the names that are no part of an adapter."""
    ends = {end: part for part in ("down", "up", "alpha", "magnitude") for end in getattr(layout, part)}
    modules: Parts = {}
    strangers = []
    for name, tensor in tensors.items():
        end = next((end for end in ends if name.endswith(end)), None)
        if end is None:
            strangers.append(name)
        else:
            modules.setdefault(name.removesuffix(end), {})[ends[end]] = tensor
    return modules, strangers


def magnitude_of(value: Tensor, layout: Layout, up: Tensor) -> Tensor | None:
    """The (out,) of a magnitude in a layout's shape; `None` if it is in none, such as one length for each input."""
    shapes: dict[str, list[tuple[int, ...]]] = {
        "ours": [(up.shape[0],)],
        "kohya": [(up.shape[0],), (up.shape[0], *(1,) * (up.ndim - 1))],
        "diffusers": [(up.shape[0],) if up.ndim == 2 else (1, up.shape[0], *(1,) * (up.ndim - 2))],
    }
    return value.flatten() if tuple(value.shape) in shapes[layout.name] else None


class PeftSettings(NamedTuple):
    """What a header or an `adapter_config.json` says of the scale of adapters, per part.

    Where there are settings without `lora_alpha` it is peft's default, 8; where there are none, the scale is 1.
    """

    by_prefix: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, header: Mapping[str, str], config: Mapping[str, Any] | None) -> "PeftSettings":
        """From a file's header, or the content of the `adapter_config.json` beside it.

        Raises:
            ValueError: if it is damaged.
        """
        is_folder = config is not None
        if config is None:
            try:
                config = json.loads(header.get(PEFT_SETTINGS, "{}"))
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"the metadata {PEFT_SETTINGS!r} is damaged ({error}); allowed is JSON, or none; name another file"
                ) from error
        if not isinstance(config, Mapping):
            raise ValueError(
                f"the settings of the adapters are {type(config).__name__}; allowed is a dictionary; name another file"
            )
        by_prefix: dict[str, dict[str, Any]] = {"": {}} if is_folder else {}
        for key, value in config.items():
            prefix = next((prefix for prefix in (UNET, TEXT_ENCODER) if key.startswith(prefix)), "")
            # Peft's own keys have no dots: what is left is of a part that is none of ours, such as `text_encoder_2.`.
            if "." not in (name := key.removeprefix(prefix)):
                by_prefix.setdefault(prefix, {})[name] = value
        return cls(by_prefix)

    def scale(self, module: str, rank: int) -> float:
        """The scale of a module's B A, by its name in the file.

        Raises:
            ValueError: if what the file says is no number.
        """
        prefix = next((prefix for prefix in self.by_prefix if prefix and module.startswith(prefix)), "")
        settings = self.by_prefix.get(prefix)
        if settings is None:
            return 1.0
        name = module.removeprefix(prefix).removeprefix(_PEFT_PREFIX)
        alpha = _matching(settings.get("alpha_pattern"), name, settings.get("lora_alpha", _PEFT_ALPHA))
        # No comparison with what is no number is true, and whole numbers of JSON have no largest one.
        if not isinstance(alpha, int | float) or not abs(alpha) <= sys.float_info.max:
            raise ValueError(f"lora_alpha of {module} is {alpha!r}; allowed is a finite number; name another file")
        return alpha / (rank**0.5 if settings.get("use_rslora") else rank)


def _matching(patterns: object, name: str, default: object) -> object:
    """The first pattern's value that matches the end of a name, as peft looks it up."""
    try:
        found = (
            value
            for pattern, value in (patterns or {}).items()  # type: ignore[attr-defined]
            if re.match(rf"(.*\.)?({pattern})$", name)
        )
        return next(found, default)
    except (re.error, AttributeError) as error:
        raise ValueError(
            f"the alpha_pattern of the file cannot be read ({error}); allowed are names and numbers; name another file"
        ) from error


def encode_ours(adapters: Mapping[str, LowRank], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of our layout; the scale in float64, so that it comes back as it was."""
    tensors: dict[str, Tensor] = {}
    for key, adapter in adapters.items():
        tensors |= _factors(OURS, names[key], adapter)
        tensors[names[key] + OURS.alpha[0]] = torch.tensor(adapter.alpha, dtype=torch.float64)
        if adapter.magnitude is not None:
            tensors[names[key] + OURS.magnitude[0]] = adapter.magnitude
    return tensors


def encode_kohya(adapters: Mapping[str, LowRank], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of kohya's layout; alpha times the rank in float32, whatever the type of the factors."""
    tensors: dict[str, Tensor] = {}
    for key, adapter in adapters.items():
        tensors |= _factors(KOHYA, names[key], adapter)
        tensors[names[key] + KOHYA.alpha[0]] = torch.tensor(adapter.alpha * adapter.rank, dtype=torch.float32)
        if adapter.magnitude is not None:
            shape = (-1, *(1,) * (adapter.up.ndim - 1))
            tensors[names[key] + KOHYA.magnitude[0]] = adapter.magnitude.view(shape)
    return tensors


def encode_diffusers(adapters: Mapping[str, LowRank], names: Mapping[str, str]) -> dict[str, Tensor]:
    """Tensors of diffusers' layout, whose scales are in `peft_settings`."""
    tensors: dict[str, Tensor] = {}
    for key, adapter in adapters.items():
        tensors |= _factors(DIFFUSERS, names[key], adapter)
        if adapter.magnitude is not None:
            shape = (-1,) if adapter.up.ndim == 2 else (1, -1, *(1,) * (adapter.up.ndim - 2))
            # Transformers 5 finds a text encoder's magnitude by the longer name alone, and peft by either.
            end = DIFFUSERS.magnitude[key.startswith(TEXT_ENCODER)]
            tensors[names[key] + end] = adapter.magnitude.view(shape)
    return tensors


def _factors(layout: Layout, name: str, adapter: LowRank) -> dict[str, Tensor]:
    return {name + layout.down[0]: adapter.down, name + layout.up[0]: adapter.up}


def peft_settings(adapters: Mapping[str, LowRank], names: Mapping[str, str]) -> dict[str, str]:
    """The header by which diffusers gets ranks and scales right.

    Raises:
        ValueError: if some adapters of a part have a magnitude and others none.
    """
    settings: dict[str, Any] = {}
    for prefix in (UNET, TEXT_ENCODER):
        part = {names[key]: adapter for key, adapter in adapters.items() if key.startswith(prefix)}
        if part:
            settings |= {f"{prefix}{key}": value for key, value in _settings_of(part, prefix).items()}
    return {PEFT_SETTINGS: json.dumps(settings, sort_keys=True)}


def _settings_of(part: Mapping[str, LowRank], prefix: str) -> dict[str, Any]:
    with_magnitude = sum(adapter.magnitude is not None for adapter in part.values())
    if with_magnitude not in (0, len(part)):
        raise ValueError(
            f"{with_magnitude} of {len(part)} adapters under {prefix} have a magnitude; diffusers knows DoRA of all "
            "layers of a part or of none; choose another layout"
        )
    # Transformers has dropped `text_model.` in version 5; a name without it fits the end of both. Elsewhere a pattern
    # is tied to the beginning: `conv_in` is no other layer's end.
    is_unet = prefix == UNET
    modules = {name.removeprefix(prefix).removeprefix(PREFIX): adapter for name, adapter in part.items()}
    ranks = {f"^{name}" if is_unet else name: adapter.rank for name, adapter in modules.items()}
    alphas = {f"^{name}" if is_unet else name: adapter.alpha * adapter.rank for name, adapter in modules.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
        "target_modules": sorted(modules),
        "use_dora": with_magnitude > 0,
    }


def network_alphas(adapters: Mapping[str, LowRank]) -> set[float]:
    """The different numbers that kohya's layout has for the adapters' scales; diffusers wants one alone."""
    return {round(adapter.alpha * adapter.rank, 6) for adapter in adapters.values()}


def kohya_header(adapters: Mapping[str, LowRank], metadata: AdapterMetadata) -> dict[str, str]:
    """What kohya's scripts and the interfaces that read its files show and look for."""
    ranks = {adapter.rank for adapter in adapters.values()}
    alphas = network_alphas(adapters)
    header = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(ranks.pop()) if len(ranks) == 1 else "Dynamic",
        "ss_network_alpha": str(alphas.pop()) if len(alphas) == 1 else "Dynamic",
    }
    architecture = UNetArchitecture.of(metadata.base.unet)
    words = {"sd1": ("sd_v1", "stable-diffusion-v1"), "sd2": ("sd_v2", "stable-diffusion-v2-512")}
    for option, (version, name) in words.items():
        if architecture == UNetArchitecture.of(PUBLISHED[option].unet):
            header |= {"ss_base_model_version": version, "ss_v2": str(option == "sd2")}
            header |= {"modelspec.architecture": f"{name}/lora", "modelspec.sai_model_spec": "1.0.0"}
    if metadata.trigger_words:
        header[TRIGGER_PHRASE] = ", ".join(metadata.trigger_words)
    return header
