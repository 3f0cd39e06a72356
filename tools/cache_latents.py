r"""Encode every image of some shards once, so that stage 2 trains without the encoder (`ldm_train.data.latents`).

    python tools/cache_latents.py --checkpoint kl_f8.ckpt --data 'shards/*.tar' --image-size 512 --output latents/
    python tools/cache_latents.py ... --task-index $SLURM_ARRAY_TASK_ID --num-tasks $SLURM_ARRAY_TASK_COUNT
    python tools/cache_latents.py ... --verify 64      compare with the images, once the cache is complete

Each source shard gives one shard of the same name: the posterior's mean and log-variance of each image, its caption and
its metadata. The same command goes on where it was stopped; of N tasks, number I makes the shards I, I + N, ..., and
whichever finishes last writes the manifest (or --merge does). Then train with

    data=latents 'data.shards=latents/*.tar' stage.moments._target_=ldm_train.stages.CachedMoments
"""

import argparse
import sys
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from convert import add_source_options, read, source_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import DataLoader
from verify_latents import verify

from ldm_train.checkpoint import encoder_digest
from ldm_train.data.dataset import INTERPOLATIONS
from ldm_train.data.latent_encoding import PRECISIONS, MomentsEncoder, PictureBatch, SourceImages, entries
from ldm_train.data.latent_writing import LatentCacheWriter
from ldm_train.data.latents import DTYPES, MANIFEST, LatentSettings
from ldm_train.data.locations import expand_shards
from ldm_train.data.storage import ShardReadError
from ldm_train.nn import Autoencoder

NAMED_ON_SCREEN = 20


class Speed(ProgressColumn):
    """Images a second."""

    def render(self, task: Task) -> Text:
        """The figure, once there is one."""
        return Text("" if task.speed is None else f"{task.speed:.1f}/s")


def settings_of(arguments: argparse.Namespace, autoencoder: Autoencoder) -> LatentSettings:
    """What the values will depend on.

    Raises:
        ValueError: if the image size does not suit the autoencoder, or the precision the device.
    """
    factor = autoencoder.downsampling_factor
    if arguments.image_size % factor:
        raise ValueError(
            f"the image size is {arguments.image_size}; allowed are multiples of {factor}, by which this autoencoder "
            "divides it; change --image-size"
        )
    if arguments.precision != "float32" and arguments.device == "cpu":
        raise ValueError(
            f"--precision {arguments.precision} is asked for on the CPU; allowed there is float32; change --precision "
            "or --device"
        )
    return LatentSettings(
        encoder_digest(autoencoder),
        arguments.image_size,
        factor,
        autoencoder.latent_channels,
        autoencoder.regularizer.moments_per_channel,
        arguments.dtype,
        arguments.precision,
        arguments.crop,
        arguments.flip,
        arguments.interpolation,
    )


def encode_shards(
    writer: LatentCacheWriter,
    encoder: MomentsEncoder,
    own: list[tuple[str, str]],
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """Encode shards, given as (path, name), one after the other."""
    paths = [path for path, _ in own]
    sources = SourceImages(paths, encoder.settings, arguments.batch_size, arguments.max_pixels)
    loader = DataLoader(sources, batch_size=None, num_workers=arguments.workers, collate_fn=as_is)
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("images", total=len(sources.index))
        for number, batches in groupby(loader, key=lambda batch: batch.shard):
            with writer.shard(*own[number]) as shard:
                shard.record.left_out += sources.left_out(number)
                for batch in batches:
                    images = batch.images()
                    if images is not None:
                        shard.record.images.add(images)
                    for entry in entries(encoder, batch.pictures, images):
                        shard.add(entry)
                    progress.advance(task, len(batch.pictures))


def as_is(batch: PictureBatch) -> PictureBatch:
    """A batch is made by the source."""
    return batch


def cache_latents(arguments: argparse.Namespace, console: Console) -> int:
    """Run the tool; its exit code.

    Raises:
        FileNotFoundError: if a file is not there.
        OSError: if a file cannot be read, or the disk refuses the output.
        ValueError: if something cannot be used.
    """
    if not 0 <= arguments.task_index < arguments.num_tasks:
        raise ValueError(
            f"--task-index is {arguments.task_index}; allowed are 0 to {arguments.num_tasks - 1}, one below --num-tasks"
        )
    paths = expand_shards(arguments.data, "--data")
    loaded = read(source_of(arguments, arguments.checkpoint))
    autoencoder = loaded.autoencoder.to(arguments.device).eval()
    settings = settings_of(arguments, autoencoder)
    description = {"autoencoder": {"source": str(arguments.checkpoint.absolute()), "config": loaded.node}}
    writer = LatentCacheWriter(arguments.output, paths, settings, description)
    encoder = MomentsEncoder(autoencoder, settings)
    if arguments.verify and not arguments.overwrite and (arguments.output / MANIFEST).is_file():
        return verify(arguments.output, paths, encoder, arguments.verify, console)
    own = list(zip(paths, writer.names, strict=True))[arguments.task_index :: arguments.num_tasks]
    if not arguments.merge:
        if arguments.overwrite:
            writer.forget(name for _, name in own)
        if pending := [(path, name) for path, name in own if writer.record(path, name) is None]:
            encode_shards(writer, encoder, pending, arguments, console)
    missing = writer.merge()
    report(writer, missing, console)
    if missing:
        return 1 if arguments.merge or arguments.verify else 0
    if arguments.verify:
        return verify(arguments.output, paths, encoder, arguments.verify, console)
    return 0


def report(writer: LatentCacheWriter, missing: list[str], console: Console) -> None:
    """Say what is there, what is missing, and which samples could not be decoded."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    records = [
        record for path, name in zip(writer.paths, writer.names, strict=True) if (record := writer.record(path, name))
    ]
    damaged = [f"{record.name}: {sample['key']}: {sample['reason']}" for record in records for sample in record.damaged]
    left_out = [f"{record.name}: {line}" for record in records for line in record.left_out]
    for title, lines in (("could not be decoded", damaged), ("left out", left_out)):
        for line in lines[:NAMED_ON_SCREEN]:
            say(f"{title}: {line}", "yellow")
        if len(lines) > NAMED_ON_SCREEN:
            say(f"... {len(lines)} {title} in all, each named in the *_latents.json of its shard", "yellow")
    samples, size = sum(record.samples for record in records), sum(record.size for record in records)
    shards = f"{len(records)} of {len(writer.names)} shards"
    say(f"{samples} samples ({len(damaged)} without latents) in {shards}, {size} bytes")
    if missing:
        more = ", ..." if len(missing) > 5 else ""
        say(f"not there yet: {', '.join(missing[:5])}{more}; the task that finishes last writes the manifest")
    else:
        say(
            f"{writer.folder} is complete: data=latents 'data.shards={writer.folder}/*.tar' "
            "stage.moments._target_=ldm_train.stages.CachedMoments"
        )


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    help_text = "the autoencoder: anything that tools/convert.py reads"
    add("--checkpoint", metavar="SOURCE", type=Path, required=True, help=help_text)
    add_source_options(parser)
    add("--data", required=True, action="append", help="shards: a path, a glob or a brace pattern; may be repeated")
    add("--image-size", type=positive, required=True, help="side in pixels")
    add("--output", type=Path, required=True, help="the folder for the cache; what is there already is kept")
    add("--crop", choices=("center",), default="center", help="where squares are cut (default: %(default)s)")
    add("--flip", action="store_true", help="keep mirrored images as well, for data.flip=true; twice the size")
    add("--interpolation", choices=INTERPOLATIONS, default="bicubic", help="(default: %(default)s)")
    add("--max-pixels", type=positive, default=1 << 26, help="larger images are not decoded (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="float16", help="of the stored numbers (default: %(default)s)")
    add(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of the encoder's arithmetic, on a GPU (default: %(default)s)",
    )
    add("--batch-size", type=positive, default=16, help="images encoded at a time (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes that decode (default: %(default)s)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what this machine has (default: %(default)s)")
    add("--task-index", type=int, default=0, metavar="I", help="which part of the shards is this task's")
    add("--num-tasks", type=positive, default=1, metavar="N", help="how many tasks share the work")
    add("--merge", action="store_true", help="encode nothing; write the manifest if all shards are there")
    add(
        "--verify",
        type=positive,
        metavar="N",
        help="then compare N samples with their images; exit code 1 if they differ",
    )
    add("--overwrite", action="store_true", help="make this task's shards anew")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0; 1 if --verify found a difference, or --merge or --verify no complete cache; 2 if something cannot be used."""
    console = Console(stderr=True)
    try:
        return cache_latents(parse(argv), console)
    except (ValueError, OSError, ShardReadError) as error:
        console.print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
