"""What an image of `tools/sample.py` was made from, in the image itself: enough to make it again.

A PNG has text fields. `ldm_train` holds everything as JSON: the model and each file that took part, by path and
SHA-256, and all numbers. `parameters` says the same in the words that other programs read:

    red apple
    Negative prompt: a face
    Steps: 50, Sampler: ddim, CFG scale: 3, Seed: 4, Size: 64x64, Model hash: 0123456789, Model: demo, ...

Further fields are for people. Two images have equal settings if they agree in all but where files lie, what they are
called, and how the image was made: beside which others, on which device.

An image is a function of its settings up to the last bits: sums of floating-point numbers depend on the shape of a
batch. So the shape and the image's row are kept as well, and the same row of a batch of copies gives it bit for bit, on
the same machine with as many threads.
"""

import json
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from PIL.PngImagePlugin import PngInfo
from sampling_images import SAMPLERS, Picture, Start
from sampling_models import AddedAdapters, Model, file_digest
from sampling_requests import Request
from torch import Tensor

from ldm_train.checkpoint import atomic_write

FIELD, PARAMETERS = "ldm_train", "parameters"
"""The text fields."""
MADE = "made"
"""What says how an image was made, in which equal settings may differ."""
VERSION = 1
"""Of the settings' layout."""
SHOWN_DIGITS = 10
"""Of a model's digest, in the field that others read."""

_PLACES = (MADE, "file", "checkpoint", "title")
_TOLD = ("unet", "autoencoder", "schedule", "override", "prediction", "scale_factor", "raw")
_NUMBER, _NOTHING = (int, float), type(None)
_FILE = {"file": str, "sha256": str}
_FORM: dict[str, Any] = {
    "prompt": str,
    "negative": (str, _NOTHING),
    "seed": int,
    "label": (int, _NOTHING),
    "model": {"checkpoint": str, "title": str, "sha256": str, "told": {}},
    "lora": [_FILE | {"weight": _NUMBER}],
    "height": int,
    "width": int,
    "sampler": {"kind": str, "steps": int, "eta": (*_NUMBER, _NOTHING)},
    "guidance": {"scale": _NUMBER},
    "precision": str,
    "strength": (*_NUMBER, _NOTHING),
    MADE: {"row": int, "batch": int, "device": str},
}
"""What `command_of` and --again rely on."""


def shared_settings(
    model: Model, adapters: Sequence[AddedAdapters], start: Start, arguments: Namespace
) -> dict[str, Any]:
    """What all images of a command have in common, of plain values."""
    sampler, guidance = model.stage.sampler, model.stage.guidance
    kind = next(name for name, kind in SAMPLERS.items() if type(sampler) is kind)
    walk = {"kind": kind, "steps": sampler.num_steps, "spacing": sampler.spacing}
    walk |= {"clip_x_0": sampler.clip_x_0, "final_alpha": sampler.final_alpha}
    walk |= {name: getattr(sampler, name) for name in ("eta", "churn") if hasattr(sampler, name)}
    told = {key: getattr(arguments, key) for key in _TOLD if getattr(arguments, key)}
    files = {key: None if path is None else _file(path) for key, path in _pictures(arguments).items()}
    return {
        "version": VERSION,
        "model": {"checkpoint": str(arguments.checkpoint.absolute()), "title": model.title, "sha256": model.digest}
        | {"told": told},
        "lora": [{"file": str(a.path.absolute()), "weight": a.weight, "sha256": a.sha256} for a in adapters],
        "height": start.shape.height,
        "width": start.shape.width,
        "sampler": walk,
        "guidance": {"scale": guidance.scale, "rescale": guidance.rescale, "interval": guidance.interval},
        "precision": arguments.precision,
        "strength": None if start.original is None else start.original.strength,
    } | files


def _pictures(arguments: Namespace) -> dict[str, Path | None]:
    return {key: getattr(arguments, key) for key in ("image", "mask", "segmentation")}


def _file(path: Path) -> dict[str, str]:
    return {"file": str(path.absolute()), "sha256": file_digest(path)}


def settings_of(request: Request, shared: Mapping[str, Any]) -> dict[str, Any]:
    """Everything that decides an image."""
    own = {"prompt": request.prompt, "negative": request.negative, "seed": request.seed, "label": request.label}
    return {**own, **shared}


def differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """The settings in which two images differ; none if these are equal."""
    first, second = _essence(one), _essence(other)
    return sorted(key for key in first.keys() | second.keys() if first.get(key) != second.get(key))


def _essence(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        return {key: _essence(entry) for key, entry in value.items() if key not in _PLACES}
    return [_essence(entry) for entry in value] if isinstance(value, list | tuple) else value


def save(picture: Picture, path: Path, shared: Mapping[str, Any], device: torch.device) -> None:
    """Write an image as a PNG with its settings; it is there whole or not at all."""
    settings = settings_of(picture.request, shared)
    settings[MADE] = {
        "row": picture.row,
        "batch": picture.batch_size,
        "device": device.type,
        "torch": torch.__version__,
    }
    info = PngInfo()
    for name, text in fields(settings, picture.request.caption).items():
        info.add_text(name, text)
    with atomic_write(path) as temporary:
        Image.fromarray(picture.pixels.permute(1, 2, 0).numpy()).save(temporary, format="PNG", pnginfo=info)


def fields(settings: Mapping[str, Any], caption: str) -> dict[str, str]:
    """The text fields of an image."""
    walk = settings["sampler"]
    shown = {
        "prompt": caption,
        "negative": settings["negative"],
        "seed": settings["seed"],
        "checkpoint": settings["model"]["checkpoint"],
        "lora": ", ".join(f"{entry['file']}={entry['weight']:g}" for entry in settings["lora"]) or None,
        "sampler": walk["kind"],
        "steps": walk["steps"],
        "guidance": settings["guidance"]["scale"],
        "eta": walk.get("eta"),
        "strength": settings["strength"],
        FIELD: json.dumps(settings, ensure_ascii=False),
        PARAMETERS: parameters(settings, caption),
    }
    return {name: str(value) for name, value in shown.items() if value is not None}


def parameters(settings: Mapping[str, Any], caption: str) -> str:
    """The settings in the words that other programs read."""
    hashes = ", ".join(f"{Path(entry['file']).stem}: {entry['sha256'][:SHOWN_DIGITS]}" for entry in settings["lora"])
    shown = {
        "Steps": settings["sampler"]["steps"],
        "Sampler": settings["sampler"]["kind"],
        "CFG scale": f"{settings['guidance']['scale']:g}",
        "Seed": settings["seed"],
        "Size": f"{settings['width']}x{settings['height']}",
        "Model hash": settings["model"]["sha256"][:SHOWN_DIGITS],
        "Model": settings["model"]["title"],
        "Lora hashes": f'"{hashes}"' if hashes else None,
        "Denoising strength": settings["strength"],
    }
    last = ", ".join(f"{name}: {value}" for name, value in shown.items() if value is not None)
    negative = [f"Negative prompt: {settings['negative']}"] if settings["negative"] else []
    return "\n".join([caption, *negative, last])


def read(path: Path) -> dict[str, Any] | None:
    """The settings of an image; `None` if it has none.

    Raises:
        FileNotFoundError: if there is no such file.
    """
    try:
        with Image.open(path) as image:
            found = json.loads(image.info.get(FIELD, "null"))
    except (UnidentifiedImageError, Image.DecompressionBombError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) and found.get("version") == VERSION else None


def is_whole(path: Path) -> bool:
    """Whether an image has all its pixels: one that was cut off still has its text fields."""
    try:
        with Image.open(path) as image:
            image.load()
    except (OSError, SyntaxError, ValueError):  # what Pillow raises on damage
        return False
    return True


def pixels_of(path: Path) -> Tensor:
    """The pixels of an image: (3, H, W) bytes."""
    with Image.open(path) as image:
        rgb = image.convert("RGB")
    return torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8).view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def misfits(settings: Mapping[str, Any], path: Path) -> list[str]:
    """What settings that anybody may have written lack, or have in another form than this tool writes; of an image."""
    pictures = {key: _FILE for key in ("image", "mask", "segmentation") if settings.get(key) is not None}
    if wrong := list(_misfits(settings, _FORM | pictures, "")):
        return wrong
    told, made = settings["model"]["told"], settings[MADE]
    forms = dict.fromkeys(_TOLD, (str, *_NUMBER)) | {"override": [str]}
    wrong += [f"model.told.{key}" for key in told if key not in forms]
    wrong += [name for key in told.keys() & forms.keys() - {"raw"} for name in _misfits(told[key], forms[key], key)]
    wrong += [] if 0 <= made["row"] < made["batch"] else [f"{MADE}.row"]
    with Image.open(path) as image:
        return wrong + ([] if image.size == (settings["width"], settings["height"]) else ["width and height"])


def _misfits(found: object, form: Any, name: str) -> Iterator[str]:  # noqa: ANN401
    if isinstance(form, dict) and isinstance(found, Mapping):
        for key, part in form.items():
            yield from _misfits(found.get(key), part, f"{name}.{key}".removeprefix("."))
    elif isinstance(form, list) and isinstance(found, list):
        for entry in found:
            yield from _misfits(entry, form[0], name)
    elif isinstance(form, dict | list) or isinstance(found, bool) or not isinstance(found, form):
        yield name


def command_of(settings: Mapping[str, Any]) -> list[str]:
    """The options of `tools/sample.py` that make an image with these settings again.

    Strings follow an equals sign, for a prompt may begin with a dash.
    """
    told, walk = settings["model"]["told"], settings["sampler"]
    single: dict[str, Any] = {
        "checkpoint": settings["model"]["checkpoint"],
        "prompt": settings["prompt"],
        "negative": settings["negative"],
        "label": settings["label"],
        "seed": settings["seed"],
        "height": settings["height"],
        "width": settings["width"],
        "sampler": walk["kind"],
        "steps": walk["steps"],
        "eta": walk.get("eta"),
        "guidance": settings["guidance"]["scale"],
        "precision": settings["precision"],
        "strength": settings["strength"],
    }
    single |= {key: value for key, value in told.items() if key not in ("override", "raw")}
    single |= {key: settings[key]["file"] for key in ("image", "mask", "segmentation") if settings.get(key) is not None}
    options = [f"--{key.replace('_', '-')}={value}" for key, value in single.items() if value is not None]
    options += [f"--override={text}" for text in told.get("override", [])]
    options += [f"--lora={entry['file']}={entry['weight']!r}" for entry in settings["lora"]]
    return [*options, *(["--raw"] if told.get("raw") else [])]
