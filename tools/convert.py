"""Convert a trained autoencoder between our checkpoints, the published layout and diffusers, in either direction.

    python tools/convert.py kl-f8.ckpt kl_f8.ckpt --autoencoder kl_f8 --scale-factor 0.18215   published -> ours
    python tools/convert.py sd/vae kl_f8.ckpt                                                  diffusers -> ours
    python tools/convert.py runs/autoencoder_kl_f8/default/checkpoints/last.ckpt vae/          ours -> diffusers
    python tools/convert.py runs/autoencoder_kl_f8/default/checkpoints/last.ckpt kl.safetensors   ours -> published

A checkpoint of ours feeds stage 2 as `stage.autoencoder.checkpoint`. Averaged weights are taken where there are any.
Every tensor's name and shape is compared before anything is written; files are read without running code from them.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import save_file
from sources import AUTOENCODER, read_file, read_json, read_tensors, tensors_in

from ldm_train.checkpoint import atomic_write, strict_load
from ldm_train.interchange import (
    Imported,
    build,
    compvis,
    diffusers,
    export_compvis,
    export_diffusers,
    import_compvis,
    import_diffusers,
    latents,
)
from ldm_train.nn import Autoencoder, VectorQuantizer

OURS, COMPVIS, DIFFUSERS = "ldm_train", "compvis", "diffusers"
SUFFIXES = {OURS: (".ckpt",), COMPVIS: (".safetensors", ".ckpt"), DIFFUSERS: ("",)}
"""Formats, and the suffixes of what holds them; diffusers' is a folder."""
PREFIX = "autoencoder."
"""What our checkpoints put before the names of an autoencoder's tensors."""


@dataclass(frozen=True)
class Source:
    """A file or folder with an autoencoder, and what its reader has to be told.

    Attributes:
        path: the file or folder.
        format: one of `SUFFIXES`, or `None` to recognise it.
        autoencoder: option of conf/autoencoder that describes it; `None` where it describes itself.
        overrides: changes to that option.
        scale_factor: of the published kind, for latents; `None` leaves what the file says.
        raw: the weights as trained, and not their averages.
    """

    path: Path
    format: str | None = None
    autoencoder: str | None = None
    overrides: tuple[str, ...] = ()
    scale_factor: float | None = None
    raw: bool = False


class Loaded(NamedTuple):
    """An autoencoder, ready for use.

    Attributes:
        autoencoder: in evaluation mode.
        node: the config node that builds it.
        ignored: what its file held besides, first part of the name -> number of tensors.
    """

    autoencoder: Autoencoder
    node: dict[str, Any]
    ignored: dict[str, int]


def read(source: Source) -> Loaded:
    """Read an autoencoder of any format, compared strictly with the architecture it is said to have.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if a file is damaged, or holds another architecture.
    """
    imported = _read(source)
    autoencoder = assembled(imported)
    if source.scale_factor is not None:
        scaled = latents.scaled(source.scale_factor, autoencoder.latent_channels)
        autoencoder.calibrate(scaled["latent_mean"], scaled["latent_std"])
    return Loaded(autoencoder, imported.node, imported.ignored)


def assembled(imported: Imported) -> Autoencoder:
    """The autoencoder itself, in evaluation mode.

    Raises:
        ValueError: with the whole difference, if names or shapes differ.
    """
    autoencoder = build(imported.node).eval()
    regularizer = autoencoder.regularizer
    # Counters and averages of a codebook in training are in our checkpoints alone: all of them, or none.
    counters = tuple(f"regularizer.{name}" for name, _ in regularizer.named_buffers())
    is_foreign = imported.state.keys().isdisjoint(counters)
    strict_load(autoencoder, imported.state, allowed_missing=counters if is_foreign else ())
    if is_foreign and isinstance(regularizer, VectorQuantizer):
        regularizer.set_codebook(regularizer.codebook)
    return autoencoder


def _read(source: Source) -> Imported:
    path = source.path / "vae" if (source.path / "vae" / diffusers.CONFIG).is_file() else source.path
    if not path.exists():
        raise FileNotFoundError(
            f"nothing at {path}; allowed are a .ckpt, a .safetensors and a vae/ folder of diffusers; change SOURCE"
        )
    if source.format == DIFFUSERS or (source.format is None and path.is_dir()):
        config = read_json(path / diffusers.CONFIG)
        return import_diffusers(config, read_tensors(tensors_in(path, diffusers.TENSORS_READ))[0])
    checkpoint = read_file(path)
    if source.format == OURS or (source.format is None and _is_ours(checkpoint)):
        return _from_ours(checkpoint, source)
    found = compvis.contents(checkpoint)
    return import_compvis(found, _node(source, found.record))


def _is_ours(checkpoint: Mapping[str, Any]) -> bool:
    state = checkpoint.get("state_dict")
    return isinstance(state, Mapping) and any(str(name).startswith(PREFIX) for name in state)


def _from_ours(checkpoint: Mapping[str, Any], source: Source) -> Imported:
    """The autoencoder of a stage 1 checkpoint, or of one that was converted."""
    if not _is_ours(checkpoint):
        raise ValueError(
            f"{source.path} holds no tensor under {PREFIX!r}; allowed is a checkpoint of stage 1 (stages 2 and 3 leave "
            "the frozen autoencoder out; tools/convert_model.py converts whole models); change SOURCE or --from"
        )
    average = {} if source.raw else (checkpoint.get("ema") or {}).get("average", {})
    state = {**checkpoint["state_dict"], **average}
    compvis.check_tensors(state)
    part = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    ignored = Counter(name.split(".")[0] for name in state if not name.startswith(PREFIX))
    # A run's checkpoint has the whole config, a converted one the node alone.
    return Imported(_node(source, checkpoint.get("config") or checkpoint), part, dict(ignored))


def _node(source: Source, config: Mapping[str, Any]) -> dict[str, Any]:
    """The config node that the user names, or else that the file holds."""
    return AUTOENCODER.described(source.autoencoder, source.overrides, config, source.path)


def write(target: Path, target_format: str, node: Mapping[str, Any], autoencoder: Autoencoder) -> None:
    """Write an autoencoder in a format.

    Raises:
        ValueError: if the format cannot hold it.
    """
    state = autoencoder.state_dict()
    if target_format == DIFFUSERS:
        config, tensors = export_diffusers(node, state)
        with atomic_write(target / diffusers.TENSORS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        with atomic_write(target / diffusers.CONFIG) as temporary:
            temporary.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        return
    with atomic_write(target) as temporary:
        if target_format == OURS:
            own = {f"{PREFIX}{name}": value.contiguous() for name, value in state.items()}
            torch.save({"state_dict": own, "autoencoder": dict(node), "global_step": 0}, temporary)
        else:
            tensors, record = export_compvis(node, state)
            if target.suffix == ".safetensors":
                save_file(tensors, temporary, metadata=compvis.as_metadata(record))
            else:
                torch.save({"state_dict": tensors, "global_step": 0, compvis.RECORD: record}, temporary)


def convert(arguments: argparse.Namespace, console: Console) -> None:
    """Run the tool.

    Raises:
        FileNotFoundError: if a file is not there.
        OSError: if the disk refuses the target.
        ValueError: if something cannot be read, or not be written as asked.
    """
    target_format = format_of(arguments.target, arguments.target_format)
    check_target(arguments.target, "TARGET")
    autoencoder, node, ignored = read(source_of(arguments, arguments.source))
    write(arguments.target, target_format, node, autoencoder)
    parameters = sum(parameter.numel() for parameter in autoencoder.parameters())
    console.print(f"{arguments.target}: {parameters:,} parameters as {target_format}", highlight=False, soft_wrap=True)
    tell_left_out(console, ignored, "being no part of an autoencoder")
    if not autoencoder.is_calibrated:
        warn(
            console,
            f"its latents have no mean and standard deviation, so stage 2 will refuse it; give --scale-factor "
            f"({latents.SCALE_FACTOR} for Stable Diffusion 1 and 2, 1 for the published VQ models), or "
            "measure them: tools/calibrate_latents.py",
        )


def format_of(target: Path, asked: str | None) -> str:
    """The format that a target's name means, which is the one asked for, if any.

    Raises:
        ValueError: if the name contradicts it, or means none.
    """
    meant = [name for name, suffixes in SUFFIXES.items() if target.suffix in suffixes and asked in (None, name)]
    if not meant:
        allowed = "a name in .ckpt, one in .safetensors, or that of a folder, without a suffix"
        if asked is not None:
            allowed = f"for {asked}: {' or '.join(suffix or 'no suffix' for suffix in SUFFIXES[asked])}"
        raise ValueError(f"{target} ends in {target.suffix!r}; allowed is {allowed}; change TARGET or --to")
    return meant[0]


def check_target(target: Path, option: str) -> None:
    """Refuse a place where something is, or nothing can be put, with a `ValueError` that names the option."""
    if target.exists() or target.is_symlink():
        raise ValueError(f"{target} is there already; allowed is a new name; change {option} or remove it")
    parent = next(path for path in target.absolute().parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        found = "cannot be written to" if parent.is_dir() else "is no folder"
        raise ValueError(f"{parent} {found}; allowed is a folder that you may write to; change {option}")


def source_of(arguments: argparse.Namespace, path: Path) -> Source:
    """What the command line says of a source.

    Raises:
        ValueError: if there are overrides of nothing.
    """
    if arguments.override and arguments.autoencoder is None:
        raise ValueError(
            f"--override {arguments.override[0]} changes an option of conf/autoencoder, and none is named; allowed: "
            f"{', '.join(AUTOENCODER.options)}; add --autoencoder, or leave --override out"
        )
    if strangers := [text for text in arguments.override if not text.lstrip("+~").startswith(PREFIX)]:
        raise ValueError(
            f"--override {strangers[0]} is no part of the autoencoder; allowed are {PREFIX}KEY=VALUE; change --override"
        )
    return Source(
        path,
        arguments.source_format,
        arguments.autoencoder,
        tuple(arguments.override),
        arguments.scale_factor,
        arguments.raw,
    )


def tell_left_out(console: Console, ignored: Mapping[str, int], reason: str) -> None:
    """Say what a source held and the target does not, by the first part of the names, if there is anything."""
    if ignored:
        shown = ", ".join(f"{name} ({count} tensors)" for name, count in sorted(ignored.items()))
        console.print(f"left out, {reason}: {shown}", highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Say what is wrong but no reason to stop."""
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def add_source_options(parser: argparse.ArgumentParser) -> None:
    """The options of `Source`."""
    add = parser.add_argument
    add("--from", dest="source_format", choices=SUFFIXES, help="format of the source (default: recognised)")
    add(
        "--autoencoder",
        metavar="OPTION",
        help="of conf/autoencoder: the architecture, where the source does not say",
    )
    override = "a change to it; may be repeated"
    add("--override", metavar="autoencoder.KEY=VALUE", action="append", default=[], help=override)
    scale_factor = f"scale of latents, as published models give it ({latents.SCALE_FACTOR}: Stable Diffusion 1 and 2)"
    add("--scale-factor", type=float, help=scale_factor)
    add("--raw", action="store_true", help="the weights as trained, where there are averaged ones as well")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", metavar="SOURCE", type=Path, help="a .ckpt, a .safetensors, or a folder of diffusers")
    parser.add_argument("target", metavar="TARGET", type=Path, help="a file or folder that is not there yet")
    add_source_options(parser)
    help_text = "format of TARGET (default: .ckpt ldm_train, .safetensors compvis, no suffix diffusers)"
    parser.add_argument("--to", dest="target_format", choices=SUFFIXES, help=help_text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if something cannot be used."""
    console = Console(stderr=True)
    try:
        convert(parse(argv), console)
    except (ValueError, OSError, SafetensorError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
