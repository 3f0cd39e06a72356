"""Generate images from prompts with a trained latent diffusion model, with any number of LoRAs.

    python tools/sample.py --checkpoint runs/demo/default/checkpoints/last.ckpt --prompt "red apple, a fruit food emoji"
    python tools/sample.py --checkpoint v1-5-pruned-emaonly.safetensors --prompt "..." --lora style.safetensors=0.8
    python tools/sample.py --checkpoint stable-diffusion-2-1/ --prompts-file prompts.jsonl --precision bfloat16
    python tools/sample.py --checkpoint ... --prompt "..." --sampler dpm_solver --steps 15 --negative "a face"
    python tools/sample.py --checkpoint ... --prompt "..." --image photo.png --strength 0.6
    python tools/sample.py --checkpoint ... --prompt "..." --image photo.png --mask hole.png
    python tools/sample.py --checkpoint ... --label 3 --label 7 --per-prompt 8
    torchrun --nproc-per-node 8 tools/sample.py --checkpoint ... --prompts-file many.txt --output pictures/
    python tools/sample.py ... --task-index $SLURM_ARRAY_TASK_ID --num-tasks $SLURM_ARRAY_TASK_COUNT
    python tools/sample.py --again pictures/00017.png

The model is a checkpoint of stage 2 or of a LoRA run, a published Stable Diffusion file, a folder of diffusers, or one
that tools/convert_model.py has written; averaged weights are taken where it has them. Image i is made from the seed
`--seed` + i, whatever the batch and however many processes share the work. Each is a PNG that says in its text fields
how it was made; `grid.png` shows the first 64 with their prompts. The same command goes on where it was stopped.
"""

import argparse
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sampling_settings
import torch
from array_progress import tell_finished
from convert_model import add_source_options, source_of
from rich.console import Console
from rich.progress import track
from sampling_folder import GRID, images_in, is_made, pending, write_grid
from sampling_images import (
    PRECISIONS,
    SAMPLERS,
    Picture,
    Start,
    check_precision,
    generate,
    generate_batch,
    set_sampling,
    shape_of,
    start_of,
)
from sampling_models import Model, add_adapters, load_model
from sampling_requests import Request, Share, check_conditions, requests_of


@dataclass(frozen=True)
class Session:
    """All that a command needs before it makes images.

    Attributes:
        model: on its device, its adapters on.
        start: what the images begin with.
        requests: the images, of all processes.
        shared: settings of all of them.
    """

    model: Model
    start: Start
    requests: list[Request]
    shared: dict[str, Any]


def prepare(arguments: argparse.Namespace, console: Console) -> Session:
    """Read everything that is named, and compare it.

    Raises:
        ValueError: if something is asked for that cannot be.
        FileNotFoundError: if a file is not there.
    """
    device = device_of(arguments.device)
    check_precision(arguments.precision, device)
    requests = requests_of(arguments)
    model = load_model(source_of(arguments, arguments.checkpoint), arguments.raw)
    check_conditions(model.stage.conditioner, requests, arguments)
    set_sampling(model.stage, arguments)
    start = start_of(arguments, shape_of(arguments, model.shape, model.multiple()), model.stage.conditioner)
    adapters = add_adapters(model, arguments.lora)
    for added in adapters:
        for warning in added.warnings:
            warn(console, warning)
        if added.trigger_words:
            say(console, f"trigger words of {added.path.name}: {', '.join(added.trigger_words)}")
    model.stage.to(device).eval()
    return Session(model, start, requests, sampling_settings.shared_settings(model, adapters, start, arguments))


def sample(arguments: argparse.Namespace, console: Console) -> int:
    """Make the images of this process; its exit code.

    Raises:
        ValueError: if something is asked for that cannot be.
        FileNotFoundError: if a file that it names is not there.
    """
    share, folder = Share.of(arguments), arguments.output
    check_output(folder)
    session = prepare(arguments, console)
    own = share.own(session.requests)
    left = own if arguments.overwrite else pending(own, session.shared, folder)
    if len(left) < len(own):
        say(console, f"{len(own) - len(left)} of {len(own)} images are there already")
    stage = session.model.stage
    made = generate(stage, session.start, left, arguments.batch, arguments.precision)
    hidden = int(os.environ.get("LOCAL_RANK", "0")) > 0
    before = len(own) - len(left)
    tell_finished(before)
    for number, picture in enumerate(track(made, "images", len(left), console=console, disable=hidden), start=1):
        sampling_settings.save(picture, folder / picture.request.name, session.shared, stage.device)
        if not arguments.overwrite:  # else another start makes all of them anew, and nothing is finished for good
            tell_finished(before + number)
    missing = sum(not is_made(request, session.shared, folder) for request in session.requests)
    if missing:
        say(console, f"{len(left)} images in {folder}; {missing} of other processes are not there yet")
        return 0
    write_grid([folder / request.name for request in session.requests], folder / GRID)
    say(console, f"images and {GRID} in {folder}")
    return 0


def again(arguments: argparse.Namespace, console: Console) -> int:
    """Make an image from its own settings; 0 if all its pixels are the same.

    Raises:
        ValueError: if it has no settings, or what it was made from has changed.
        FileNotFoundError: if a file is not there.
    """
    path: Path = arguments.again
    if not path.is_file():
        raise FileNotFoundError(f"there is no image at {path}; allowed are images of this tool; change --again")
    settings = sampling_settings.read(path)
    if settings is None or not sampling_settings.is_whole(path):
        raise ValueError(
            f"{path} does not say how it was made, or is damaged; allowed are whole images of this tool; change --again"
        )
    if wrong := sampling_settings.misfits(settings, path):
        raise ValueError(
            f"{path} says {', '.join(wrong)} otherwise than this tool does, or not at all; allowed are images of this "
            "tool as it wrote them; change --again"
        )
    made, original = settings[sampling_settings.MADE], sampling_settings.pixels_of(path)
    folder = arguments.output or path.absolute().parent / "again"
    if (folder / path.name).resolve() == path.resolve():
        raise ValueError(
            f"the image would be made over {path}, which it is compared with; allowed is any other folder; change "
            "--output"
        )
    options = [*sampling_settings.command_of(settings), f"--output={folder}"]
    options += [f"--device={made['device'] if made['device'] in devices() else arguments.device}"]
    options += [] if arguments.checkpoint is None else [f"--checkpoint={arguments.checkpoint}"]
    try:
        own = parse(options)
    except SystemExit as error:  # the parser has said which
        raise ValueError(f"{path} has a setting that is no option; allowed are those above; change --again") from error
    check_output(folder)
    session = prepare(own, console)
    (request,) = session.requests
    if changed := sampling_settings.differing(settings, sampling_settings.settings_of(request, session.shared)):
        raise ValueError(
            f"what {path} was made from has changed since: {', '.join(changed)}; allowed are the same files; bring "
            "them back to their places, or name the model with --checkpoint"
        )
    stage, copies = session.model.stage, [request] * made["batch"]
    pixels = generate_batch(stage, session.start, copies, own.precision)[made["row"]]
    picture = Picture(request, pixels, made["row"], made["batch"])
    sampling_settings.save(picture, own.output / path.name, session.shared, stage.device)
    difference = (pixels.int() - original.int()).abs()
    differing, largest = int(difference.amax(0).count_nonzero()), int(difference.max())
    same = "the same, bit for bit" if not differing else f"{differing} pixels differ, by {largest} of 255 at most"
    say(console, f"{own.output / path.name}: {same}")
    return int(differing > 0)


def check_output(folder: Path) -> None:
    """Raises ValueError if nothing can be written into a folder; it is made when the first image is."""
    place = next(place for place in (folder.absolute(), *folder.absolute().parents) if os.path.lexists(place))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        state = "cannot be written to" if place.is_dir() else "is no folder"
        raise ValueError(f"{place} {state}; allowed is a folder, which need not be there yet; change --output")


def device_of(name: str) -> torch.device:
    """The device, and of several GPUs this process's own."""
    if name == "cuda":
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    return torch.device(name)


def devices() -> list[str]:
    """The kinds of device that this machine has."""
    return ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]


def say(console: Console, text: str) -> None:
    """Say something, as it is."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def warn(console: Console, text: str) -> None:
    """Say what is wrong but no reason to stop."""
    console.print(f"warning: {text}", style="yellow", markup=False, highlight=False, soft_wrap=True)


def finite(text: str) -> float:
    """An option's number."""
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"{text} is given; allowed: finite numbers")
    return number


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def weighted(text: str) -> tuple[Path, float]:
    """`FILE` or `FILE=WEIGHT`; a file that has the whole name is meant first."""
    path, equals, weight = text.rpartition("=")
    if not equals or Path(text).exists():
        return Path(text), 1.0
    try:
        float(weight)
    except ValueError:
        return Path(text), 1.0
    return Path(path), finite(weight)


def seeds(text: str) -> list[int]:
    """Whole numbers between commas."""
    return [int(number) for number in text.split(",")]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_request_options(parser)
    add_sampling_options(parser)
    add_work_options(parser)
    arguments = parser.parse_args(argv)
    if arguments.again is not None or arguments.grid is not None:
        return arguments
    if arguments.checkpoint is None:
        parser.error("no model; allowed are a checkpoint, a published file and a folder; give --checkpoint")
    if not arguments.prompt and not arguments.label and arguments.prompts_file is None:
        parser.error("no prompt; allowed are any number of them; give --prompt, --prompts-file or --label")
    if arguments.output is None:
        place = arguments.checkpoint.absolute()
        is_of_run = place.parent.name == "checkpoints"
        arguments.output = (place.parents[1] if is_of_run else Path.cwd()) / "generated"
    return arguments


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """What draws."""
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", type=Path, help="of stage 2 or 3, a published file, or a folder of a model")
    help_text = "adapters in any layout, and how much of them: 0 none, 1 as trained, the default; may be repeated"
    group.add_argument("--lora", type=weighted, action="append", default=[], metavar="FILE[=WEIGHT]", help=help_text)
    group.add_argument("--raw", action="store_true", help="weights as trained, where there are averaged ones as well")
    help_text = "of the networks' arithmetic (default: %(default)s)"
    group.add_argument("--precision", choices=PRECISIONS, default="float32", help=help_text)
    help_text = "what this machine has (default: %(default)s)"
    group.add_argument("--device", choices=devices(), default=devices()[0], help=help_text)
    add_source_options(parser)


def add_request_options(parser: argparse.ArgumentParser) -> None:
    """What is drawn."""
    add = parser.add_argument_group("images").add_argument
    add("--prompt", action="append", default=[], help="what the picture shows; may be repeated")
    add("--prompts-file", type=Path, help="one prompt a line, as text or as JSON: prompt, negative, seed, count, label")
    add("--label", type=int, action="append", default=[], help="a class, where the model takes one; may be repeated")
    add("--negative", help="what the pictures should not show; needs a guidance scale other than 1")
    add("--per-prompt", type=positive, default=1, help="images for each prompt (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the first image; the i-th after it has seed + i (default: %(default)s)")
    add("--seeds", type=seeds, default=[], metavar="N,N,...", help="the same for each prompt, an image for each")
    add("--image-size", type=positive, help="side in pixels (default: that of the training)")
    add("--width", type=positive, help="in pixels, where images are not square")
    add("--height", type=positive, help="likewise")
    add("--image", type=Path, help="a picture to begin with")
    add("--strength", type=finite, help="how much of it is given up, up to 1 (default: 0.6, with --mask 1)")
    add("--mask", type=Path, help="a picture that is white where something new is wanted; all else stays")
    add("--segmentation", type=Path, help="a PNG of one channel with a class for each pixel, for models of such maps")


def add_sampling_options(parser: argparse.ArgumentParser) -> None:
    """How it is drawn; what is left out is as the run's config or the published model has it."""
    add = parser.add_argument_group("sampling (default: as in the run's config)").add_argument
    add("--sampler", choices=list(SAMPLERS))
    add("--steps", type=positive, help="denoising steps")
    add("--guidance", type=finite, help="classifier-free guidance scale, 1 is none")
    add("--eta", type=finite, help="0 DDIM to 1 ancestral")


def add_work_options(parser: argparse.ArgumentParser) -> None:
    """How the work is done."""
    add = parser.add_argument_group("work").add_argument
    add("--output", type=Path, help="folder (default: `generated`, in the directory of a run or else in this one)")
    add("--overwrite", action="store_true", help="make images anew, also where others are")
    add("--batch", type=positive, default=16, help="images made at a time (default: %(default)s)")
    add("--task-index", type=int, default=0, metavar="I", help="which part of the images is this task's")
    add("--num-tasks", type=positive, default=1, metavar="N", help="how many tasks share the work")
    add("--grid", type=Path, metavar="FOLDER", help="make nothing; draw the sheet of the images in a folder")
    add("--again", type=Path, metavar="PNG", help="make an image again from its own settings, and compare")


def run(arguments: argparse.Namespace, console: Console) -> int:
    """What the command line asks for; its exit code."""
    if arguments.again is not None:
        return again(arguments, console)
    if arguments.grid is not None:
        write_grid(images_in(arguments.grid), arguments.grid / GRID)
        return 0
    return sample(arguments, console)


def main(argv: list[str] | None = None) -> int:
    """0; 1 if --again gave another image; 2 if something cannot be used."""
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        return run(arguments, console)
    except (ValueError, OSError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
