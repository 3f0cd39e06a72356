"""The command line of `tools/lora.py`."""

import argparse
import math
from pathlib import Path

import torch
from convert_model import COMPVIS, DIFFUSERS, OURS

from ldm_train.interchange.adapter_layouts import LAYOUTS

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
"""Types of the tensors that are written."""

_NEW_FILE = "a name in .safetensors that is not there yet"
_MODEL_GROUPS = ("unet", "autoencoder", "schedule")


def parse(argv: list[str] | None, description: str | None = None) -> argparse.Namespace:
    """The command line; `command` says which of the commands it is."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_merge(commands.add_parser("merge", help="put adapters into a model's weights"))
    _add_merge(commands.add_parser("unmerge", help="take them out again"))
    _add_combine(commands.add_parser("combine", help="the weighted sum of several sets as one"))
    _add_extract(commands.add_parser("extract", help="adapters out of two models"))
    _add_resize(commands.add_parser("resize", help="smaller ranks"))
    _add_convert(commands.add_parser("convert", help="another layout or type"))
    _add_show(commands.add_parser("show", help="what is in a file"))
    return parser.parse_args(argv)


def _finite(text: str) -> float:
    """A number that is neither infinite nor none, which would make every weight so."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise argparse.ArgumentTypeError(f"it is {text!r}; allowed is a finite number; change it")
    return number


def _add_merge(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("base", metavar="BASE", type=Path, help="the model: a .ckpt, a .safetensors, or a folder")
    add("target", metavar="TARGET", type=Path, help="a file or folder that is not there yet")
    _add_sets(command)
    help_text = "format of TARGET (default: a file is compvis; a folder has that of BASE, or ldm_train)"
    add("--to", dest="model_format", choices=(OURS, COMPVIS, DIFFUSERS), help=help_text)
    _add_model_options(command)


def _add_combine(command: argparse.ArgumentParser) -> None:
    command.add_argument("target", metavar="TARGET", type=Path, help=_NEW_FILE)
    _add_sets(command)
    command.add_argument("--exact", action="store_true", help="the sum itself, of the sum of their ranks")
    _add_rank_options(command)
    _add_base_options(command)
    _add_output_options(command)


def _add_extract(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("base", metavar="BASE", type=Path, help="the model before training")
    add("tuned", metavar="TUNED", type=Path, help="the model after it")
    add("target", metavar="TARGET", type=Path, help=_NEW_FILE)
    _add_rank_options(command)
    help_text = "cut the factors' values off beyond this quantile, such as 0.99 (default: not at all)"
    add("--clamp-quantile", type=_finite, help=help_text)
    add("--layers", default=".*", metavar="PATTERN", help="regular expression of keys (default: all that differ)")
    _add_model_options(command)
    _add_output_options(command)


def _add_resize(command: argparse.ArgumentParser) -> None:
    _add_source_and_target(command)
    _add_rank_options(command)


def _add_convert(command: argparse.ArgumentParser) -> None:
    _add_source_and_target(command)


def _add_show(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", type=Path, help="a file or folder of adapters")
    command.add_argument("--json", action="store_true", help="everything, as JSON")
    _add_base_options(command)


def _add_source_and_target(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", metavar="SOURCE", type=Path, help="a file or folder of adapters")
    command.add_argument("target", metavar="TARGET", type=Path, help=_NEW_FILE)
    _add_base_options(command)
    _add_output_options(command)


def _add_sets(command: argparse.ArgumentParser) -> None:
    command.add_argument("adapters", metavar="ADAPTERS", type=Path, nargs="+", help="files or folders of adapters")
    help_text = "one for each of ADAPTERS, in their order (default: 1)"
    command.add_argument("--weight", type=_finite, action="append", default=[], help=help_text)


def _add_rank_options(command: argparse.ArgumentParser) -> None:
    command.add_argument("--rank", type=int, help="the largest rank of a layer")
    help_text = "the share of each layer's squared norm to keep, by the smallest rank that does (0 to 1)"
    command.add_argument("--energy", type=_finite, help=help_text)


def _add_output_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--to", dest="layout", choices=LAYOUTS, default="ours", help="layout of TARGET (default: ours)")
    add("--dtype", choices=DTYPES, help="type of its tensors (default: as they are)")


def _add_base_options(command: argparse.ArgumentParser) -> None:
    add = command.add_argument
    add("--unet", metavar="OPTION", help="of conf/unet: the base model, where the file does not say")
    add("--text-layers", type=int, metavar="N", help="layers of its text encoder (default: as published, or none)")
    _add_override(command)


def _add_model_options(command: argparse.ArgumentParser) -> None:
    for group in _MODEL_GROUPS:
        command.add_argument(f"--{group}", metavar="OPTION", help=f"of conf/{group}, where the model does not say")
    _add_override(command)
    help_text = "the weights as trained, where there are averaged ones as well"
    command.add_argument("--raw", action="store_true", help=help_text)


def _add_override(command: argparse.ArgumentParser) -> None:
    help_text = "a change to an option; may be repeated"
    command.add_argument("--override", metavar="GROUP.KEY=VALUE", action="append", default=[], help=help_text)
