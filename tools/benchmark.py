"""Measure how fast this code is, beside what others get from the same machine in the same run.

    python tools/benchmark.py unet --unet sd1 --latents 64 --batch 8
    python tools/benchmark.py unet --unet sd1 --set channels=64 --latents 32 --batch 2 --device cpu --without bfloat16
    python tools/benchmark.py data --shards benchmark_shards/
    python tools/benchmark.py steps

`unet` times a training step, forward and backward, of an option of `conf/unet`. Optimisations are switched on one by
one, each beside diffusers' U-Net of the same shape as its users get it: float32, contiguous, eager, fused attention.
The two take turns step by step, so that whatever slows the machine down slows both. All figures are medians.

- step, images/s: of one training step.
- of diffusers: the step's time as a share of the time of diffusers' steps between which it ran.
- of above: of the row above, likewise; what the optimisation brings.
- TFLOP/s, or MFU: the arithmetic of the model by the step's time, as a share of what the device can do in bfloat16.
  Counted are the products and convolutions of a forward and backward pass, once, also where checkpointing computes them
  twice.
- GiB: the most memory that was held during a step, weights and gradients included, without the other network's.

On one CPU thread the clock is the processor's own, because other programs may have their turn as well.

`data` times loading on one core: JPEG files of 300 to 900 pixels, made for it, to (3, 256, 256), shuffled, from shards
in the page cache; then the same from shards that `make_shards.py --resize 256` made of them; then cached latents of
them, (8, 32, 32) float16. Figures are medians over rounds; a round is one epoch of each contender, who take turns batch
by batch.

- webdataset + PIL: `WebDataset(...).shuffle(...).decode("pil")`, torchvision's transforms of PIL images, `batched`; of
  the same shards, or of the originals, which is what resized shards and cached latents save.
- ldm_train: the loader of the trainings, without workers. It delivers bytes, which become values in [-1, 1] on the
  device of the training; "converted as well": on this core.
- the limit: of files in memory, all pixels decoded by torchvision and resized by torch, and nothing else; of cached
  latents, members in memory that become a batch. `data.reducing_gap=1` decodes fewer pixels.

`steps` times what the callbacks that every run has add to a step that does nothing but take `--step-ms`: throughput,
guard and progress; then with these what a cluster needs, the ranks' agreement on signals, their watch and the
checkpoints' clock; Lightning's own checkpoints for comparison. They take turns, in one process and in `--processes` on
gloo, of which the first is timed. "added" is what a step takes more than without, and its standard error: of the
processor, all threads together, and with several processes also by the clock on the wall, which counts their waits for
each other. Figures are medians over rounds; in a round each has 50 steps in a row, with several processes 500.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from benchmark_data import DataRow, benchmark_data
from benchmark_steps import StepRow, benchmark_steps
from benchmark_unet import OPTIMISATIONS, Row, benchmark_unet
from rich.console import Console
from rich.table import Table

GPU_WARMUP_S = 180.0


def table(rows: list[Row], facts: dict[str, object]) -> Table:
    """The rows for people."""
    shown = Table(title=f"{facts['unet']}, {facts['parameters']:,} parameters, on {facts['device']}")
    shown.add_column("", no_wrap=True)
    speed = "TFLOP/s" if facts["peak_tflops"] is None else "MFU"
    for title in ("step, s", "images/s", "of diffusers", "of above", speed, "GiB"):
        shown.add_column(title, justify="right")
    for row in rows:
        shown.add_row(
            row.name,
            f"{row.step:.4f}",
            f"{row.images_per_second:.2f}",
            _number(row.of_diffusers, ".3f"),
            _number(row.of_row_above, ".3f"),
            f"{row.tflops:.3f}" if row.mfu is None else f"{row.mfu:.1%}",
            _number(None if row.memory is None else row.memory / 2**30, ".2f"),
        )
    return shown


def data_table(rows: list[DataRow], facts: dict[str, object]) -> Table:
    """The rows of `data` for people."""
    size = facts["image_size"]
    title = f"{facts['images']} JPEG files to (3, {size}, {size}), one core, page cache warm"
    shown = Table(title=title)
    for column in ("shards", "loaded by"):
        shown.add_column(column, no_wrap=True)
    for column in ("images/s", "ms an image", "of PIL's", "of PIL's from originals", "of the limit"):
        shown.add_column(column, justify="right")
    for above, row in zip([None, *rows], rows, strict=False):
        is_first = above is None or above.shards != row.shards
        if is_first and above is not None:
            shown.add_section()
        shown.add_row(
            row.shards if is_first else "",
            row.name,
            f"{row.images_per_second:.1f}",
            f"{row.milliseconds_per_image:.2f}",
            "" if row.of_plain is None else f"{row.of_plain:.2f}x",
            f"{row.of_plain_from_originals:.2f}x",
            f"{row.of_limit:.1%}",
        )
    return shown


def steps_table(rows: list[StepRow], facts: dict[str, object]) -> Table:
    """The rows of `steps` for people."""
    shown = Table(title=f"steps of {facts['step_ms']:g} ms, medians of {facts['rounds']} rounds")
    shown.add_column("callbacks")
    for column in ("processes", "time of", "step, ms", "added, us", "+-", "of the step"):
        shown.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        cells = f"{1e3 * row.step:.3f}", f"{1e6 * row.added:.1f}", f"{1e6 * row.error:.1f}"
        shown.add_row(
            row.name, str(row.processes), row.clock, *cells, f"{row.share:.2%}", end_section=row.name == rows[-1].name
        )
    return shown


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def add_unet(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `unet`."""
    add = commands.add_parser(
        "unet", help="training steps of a U-Net", description="See --help of the tool."
    ).add_argument
    add("--unet", default="sd1", help="option of conf/unet (default: %(default)s)")
    add("--set", nargs="*", default=[], metavar="KEY=VALUE", help="changes to it, as `channels=64`")
    add("--latents", type=positive, default=64, help="height and width of the latents (default: %(default)s)")
    add("--latent-channels", type=positive, default=4, help="their channels (default: %(default)s)")
    add("--batch", type=positive, default=8, help="images a step (default: %(default)s)")
    add("--context", type=positive, default=77, help="context tokens (default: %(default)s)")
    add("--context-dim", type=positive, default=768, help="their width (default: %(default)s)")
    add("--vector-dim", type=positive, help="width of the vector, if the network takes one")
    add("--steps", type=positive, default=20, help="timed steps a row (default: %(default)s)")
    add("--optimizer", action="store_true", help="end each step with AdamW")
    add("--without", nargs="*", default=[], choices=OPTIMISATIONS, help="rows to leave out")
    add("--alone", action="store_true", help="not beside diffusers")
    add("--warmup-s", type=float, help=f"seconds of warm-up (default: {GPU_WARMUP_S:.0f} on a GPU, else 0)")
    add("--peak-tflops", type=float, help="of the device in bfloat16, dense (default: known for common GPUs)")
    add("--output", type=Path, help="a JSON file for the figures")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what this machine has (default: %(default)s)")


def add_data(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `data`."""
    add = commands.add_parser(
        "data", help="loading images from shards", description="See --help of the tool."
    ).add_argument
    add("--shards", type=Path, help="a folder that keeps the shards for the next time (default: a temporary one)")
    add("--images", type=positive, default=512, help="how many, a multiple of --batch (default: %(default)s)")
    add("--image-size", type=positive, default=256, help="side of the squares in pixels (default: %(default)s)")
    add("--batch", type=positive, default=32, help="images a batch (default: %(default)s)")
    add("--rounds", type=positive, default=5, help="timed epochs of each contender (default: %(default)s)")
    add("--output", type=Path, help="a JSON file for the figures")


def add_steps(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """The options of `steps`."""
    add = commands.add_parser(
        "steps", help="what callbacks add to a step", description="See --help of the tool."
    ).add_argument
    add("--step-ms", type=float, default=1.0, help="milliseconds of a step (default: %(default)s)")
    add("--processes", type=positive, default=2, help="of the second part; 1 leaves it out (default: %(default)s)")
    add("--rounds", type=positive, default=40, help="turns of 50 steps of each (default: %(default)s)")
    add("--output", type=Path, help="a JSON file for the figures")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    add_unet(commands)
    add_data(commands)
    add_steps(commands)
    arguments = parser.parse_args(argv)
    if arguments.command == "unet" and arguments.warmup_s is None:
        arguments.warmup_s = GPU_WARMUP_S if arguments.device == "cuda" else 0.0
    return arguments


def measure(arguments: argparse.Namespace, console: Console) -> tuple[Table, dict[str, object]]:
    """Run the command; the table for people, and everything for JSON.

    Raises:
        ValueError: if something cannot be measured.
    """
    if arguments.command == "unet":
        steps, facts = benchmark_unet(arguments, console)
        return table(steps, facts), {**facts, "rows": [asdict(row) for row in steps]}
    if arguments.command == "steps":
        added, facts = benchmark_steps(arguments, console)
        return steps_table(added, facts), {**facts, "rows": [asdict(row) for row in added]}
    with TemporaryDirectory() as folder:
        arguments.shards = arguments.shards or Path(folder)
        rows, facts = benchmark_data(arguments, console)
    return data_table(rows, facts), {**facts, "rows": [asdict(row) for row in rows]}


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if something cannot be measured."""
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        shown, found = measure(arguments, console)
    except ValueError as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    Console().print(shown)
    if arguments.output is not None:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(json.dumps(found, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
