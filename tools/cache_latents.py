r"""Encode every image of some shards once, so that stage 2 trains without the encoder (`ldm_train.data.latents`).

    python tools/cache_latents.py --checkpoint kl_f8.ckpt --data 'shards/*.tar' --image-size 512 --output latents/
    python tools/cache_latents.py ... --task-index $SLURM_ARRAY_TASK_ID --num-tasks $SLURM_ARRAY_TASK_COUNT
    python tools/cache_latents.py ... --verify 64      compare with the images, once the cache is complete
    python tools/cache_latents.py ... --buckets 64     in the shapes of data.buckets with this step

Each source shard gives one shard of the same name: the posterior's mean and log-variance of each image, its caption and
its metadata, with --segmentation its map. The same command goes on where it was stopped, and makes again what was made
of a shard that has changed since; of N tasks, number I makes the shards I, I + N, ..., and whichever finishes last
writes the manifest (or --merge does). All tasks of a job may say --overwrite: the first of them begins anew. A task of
a SLURM job that is requeued after the cache was finished finds it finished; without SLURM, start a task again without
--overwrite, or it begins anew once more. Then train with

    data=latents 'data.shards=latents/*.tar' stage.moments._target_=ldm_train.stages.CachedMoments
"""

import argparse
import os
import sys
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from array_progress import tell_finished
from convert import add_source_options, read, source_of
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from torch.utils.data import DataLoader
from verify_latents import verify

from ldm_train.checkpoint import encoder_digest
from ldm_train.data.buckets import AspectBuckets
from ldm_train.data.crops import Shape
from ldm_train.data.dataset import INTERPOLATIONS
from ldm_train.data.latent_encoding import PRECISIONS, MomentsEncoder, PictureBatch, SourceImages
from ldm_train.data.latent_member import DTYPES
from ldm_train.data.latent_records import ShardRecord
from ldm_train.data.latent_settings import LatentSettings, sizes_of
from ldm_train.data.latent_writing import LatentCacheWriter
from ldm_train.data.latents import MANIFEST
from ldm_train.data.locations import expand_shards
from ldm_train.data.remote import RemoteFiles, options_of
from ldm_train.data.segmentation import SegmentationMember
from ldm_train.data.shard_cache import ShardCache
from ldm_train.data.storage import LOCAL_FILES, Routed, ShardReadError, explained
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
        shapes_of(arguments, factor),
        None if arguments.segmentation is None else SegmentationMember(1, arguments.segmentation).extension,
        arguments.max_pixels,
    )


def shapes_of(arguments: argparse.Namespace, factor: int) -> tuple[Shape, ...] | None:
    """Those of the aspect buckets, if there are any.

    Raises:
        ValueError: if they do not suit the autoencoder, or the image size.
    """
    if arguments.buckets is None:
        return None
    if arguments.buckets % factor:
        raise ValueError(
            f"the step of the buckets is {arguments.buckets}; allowed are multiples of {factor}, by which this "
            "autoencoder divides the sides; change --buckets"
        )
    return tuple(AspectBuckets(arguments.buckets, arguments.max_ratio).shapes(arguments.image_size))


def encode_shards(
    writer: LatentCacheWriter,
    encoder: MomentsEncoder,
    own: list[tuple[str, str]],
    finished: int,
    arguments: argparse.Namespace,
    console: Console,
) -> None:
    """Encode shards, given as (path, name), one after the other, beside those of this task that are finished."""
    tell_finished(finished)
    paths = [path for path, _ in own]
    sources = SourceImages(paths, encoder.settings, arguments.batch_size, writer.storage)
    loader = DataLoader(sources, batch_size=None, num_workers=arguments.workers, collate_fn=as_is)
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), Speed(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("images", total=len(sources.index))

        def counted(batches: Iterable[PictureBatch]) -> Iterator[PictureBatch]:
            for batch in batches:
                yield batch
                progress.advance(task, len(batch.rows))

        for number, batches in groupby(loader, key=lambda batch: batch.shard):
            with writer.shard(*own[number]) as shard:
                shard.record.left_out += sources.left_out(number)
                shard.fill(encoder, counted(batches), int(sources.index.starts[number]))
            tell_finished(finished + number + 1)


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
    shard_cache = shard_cache_of(arguments)
    storage = Routed(LOCAL_FILES, shard_cache)
    paths = expand_shards(arguments.data, "--data", shard_cache.glob)
    loaded = read(source_of(arguments, arguments.checkpoint))
    autoencoder = loaded.autoencoder.to(arguments.device).eval()
    settings = settings_of(arguments, autoencoder)
    description = {"autoencoder": {"source": str(arguments.checkpoint.absolute()), "config": loaded.node}}
    writer = LatentCacheWriter(arguments.output, paths, settings, description, storage, job_id())
    encoder = MomentsEncoder(autoencoder, settings)
    if arguments.verify and not arguments.overwrite and (arguments.output / MANIFEST).is_file():
        return verify(arguments.output, paths, encoder, arguments.verify, console, storage)
    own = list(zip(paths, writer.names, strict=True))[arguments.task_index :: arguments.num_tasks]
    if own and not arguments.merge:
        if arguments.overwrite and not writer.begin_overwriting():
            console.print(f"job {job_id()} has made all shards anew before: --overwrite begins nothing", markup=False)
        found = writer.records([path for path, _ in own])
        pending = [(path, name) for path, name in own if found[path] is None]
        if pending:
            encode_shards(writer, encoder, pending, len(own) - len(pending), arguments, console)
    merged = writer.merge()
    report(writer, merged, console)
    if None in merged:
        return 1 if arguments.merge or arguments.verify else 0
    if arguments.verify:
        return verify(arguments.output, paths, encoder, arguments.verify, console, storage)
    return 0


def shard_cache_of(arguments: argparse.Namespace) -> ShardCache:
    """Where shards behind URLs are fetched to.

    Raises:
        ValueError: if the options of the stores are no such thing.
    """
    remote = RemoteFiles(options_of(arguments.storage_options))
    return ShardCache(arguments.cache_dir, arguments.cache_bytes, remote, arguments.workers)


def job_id() -> str | None:
    """The job of SLURM that this process belongs to, all tasks of an array being one; None outside of SLURM."""
    return os.environ.get("SLURM_ARRAY_JOB_ID") or os.environ.get("SLURM_JOB_ID")


def report(writer: LatentCacheWriter, merged: list[ShardRecord | None], console: Console) -> None:
    """Say what is there, what is missing, what belongs elsewhere, and which samples could not be decoded."""

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    records = [record for record in merged if record is not None]
    missing = [name for name, record in zip(writer.names, merged, strict=True) if record is None]
    for name in writer.strangers():
        say(f"not of this cache, and refused by a run whose data.shards names it: {name}; remove it", "yellow")
    for name in sorted(writer.changed):
        say(f"made of what its source was before it changed, and therefore made again: {name}", "yellow")
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
        shapes = "" if writer.settings.shapes is None else f" in the shapes {sizes_of(writer.settings.shapes)}"
        say(
            f"{writer.folder} is complete{shapes}: data=latents 'data.shards={writer.folder}/*.tar' "
            "stage.moments._target_=ldm_train.stages.CachedMoments, and what else made the images"
        )


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def natural(text: str) -> int:
    """An option's whole number, at least 0."""
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 0 or more; change --workers")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Any = parser.add_argument
    help_text = "the autoencoder: anything that tools/convert.py reads"
    add("--checkpoint", metavar="SOURCE", type=Path, required=True, help=help_text)
    add_source_options(parser)
    help_text = "shards: a path, a URL, a glob or a brace pattern; may be repeated"
    add("--data", required=True, action="append", help=help_text)
    add("--output", type=Path, required=True, help="the folder for the cache; what is there already is kept")
    add_image_options(parser)
    add("--dtype", choices=DTYPES, default="float16", help="of the stored numbers (default: %(default)s)")
    help_text = "of the encoder's arithmetic, on a GPU (default: %(default)s)"
    add("--precision", choices=PRECISIONS, default="float32", help=help_text)
    add("--batch-size", type=positive, default=16, help="images encoded at a time (default: %(default)s)")
    add("--workers", type=natural, default=2, help="processes that decode (default: %(default)s)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what this machine has (default: %(default)s)")
    add("--task-index", type=int, default=0, metavar="I", help="which part of the shards is this task's")
    add("--num-tasks", type=positive, default=1, metavar="N", help="how many tasks share the work")
    add("--merge", action="store_true", help="encode nothing; write the manifest if all shards are there")
    help_text = "then compare N samples with their images; exit code 1 if they differ"
    add("--verify", type=positive, metavar="N", help=help_text)
    help_text = "make all shards anew, once for all tasks of a SLURM job; without SLURM, drop it to start a task again"
    add("--overwrite", action="store_true", help=help_text)
    help_text = "where copies of shards behind URLs lie, as data.cache_dir (default: a folder under TMPDIR)"
    add("--cache-dir", help=help_text)
    add("--cache-bytes", type=positive, default=100 << 30, help="as data.cache_bytes (default: %(default)s)")
    add("--storage-options", default="{}", metavar="JSON", help="as data.storage_options, for shards behind URLs")
    return parser.parse_args(argv)


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """How images are made before they are encoded."""
    add: Any = parser.add_argument
    add("--image-size", type=positive, required=True, help="side in pixels, of the square among the shapes")
    add("--crop", choices=("center",), default="center", help="where shapes are cut (default: %(default)s)")
    add("--buckets", type=positive, metavar="STEP", help="data.buckets.step, for data.buckets (default: squares)")
    help_text = "with --buckets, data.buckets.max_ratio (default: %(default)s)"
    add("--max-ratio", type=float, default=2.0, metavar="R", help=help_text)
    add("--flip", action="store_true", help="keep mirrored images as well, for data.flip=true; twice the size")
    add("--interpolation", choices=INTERPOLATIONS, default="bicubic", help="(default: %(default)s)")
    add("--max-pixels", type=positive, default=1 << 26, help="larger images are not decoded (default: %(default)s)")
    help_text = "keep segmentation maps, the members of this extension such as seg.png, for data.segmentation"
    add("--segmentation", metavar="EXTENSION", help=help_text)


def main(argv: list[str] | None = None) -> int:
    """0; 1 if --verify found a difference, or --merge or --verify no complete cache; 2 if something cannot be used."""
    console = Console(stderr=True)
    try:
        return cache_latents(parse(argv), console)
    except (ValueError, OSError, ShardReadError) as error:
        said = explained(error, "change --output or --data")
        console.print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2


if __name__ == "__main__":
    sys.exit(main())
