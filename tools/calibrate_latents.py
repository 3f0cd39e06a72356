r"""Measure the latents of an autoencoder from elsewhere, so that stage 2 can normalise them.

    python tools/calibrate_latents.py --checkpoint kl-f8.ckpt --autoencoder kl_f8 --data 'shards/*.tar' \
        --image-size 256 --num-images 4096 --output kl_f8.ckpt
    python tools/calibrate_latents.py --checkpoint sd/vae --data 'shards/*.tar' --image-size 256 --output vae.ckpt

Whatever `tools/convert.py` reads can be measured; the output is a checkpoint of ours with mean and standard deviation
of each latent channel (`--scalar`: mean 0 and one standard deviation for all, as published). The images are a fixed
choice, centre-cropped; the posterior's variance counts, but nothing is drawn (`ldm_train.metrics.latents`).
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from convert import OURS, SUFFIXES, add_source_options, check_target, read, source_of, write
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from ldm_train.data import ImageTextDataModule
from ldm_train.data.locations import expand_shards
from ldm_train.data.storage import ShardReadError, explained
from ldm_train.metrics import LatentStatistics
from ldm_train.nn import Autoencoder


@torch.no_grad()
def measure(autoencoder: Autoencoder, batches: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (C,) of the raw latents of batches (B, 3, H, W) of images in [-1, 1]."""
    device = autoencoder.latent_std.device
    statistics = LatentStatistics(autoencoder.latent_channels, with_divergence=False).to(device)
    for images in batches:
        moments = autoencoder.moments(images.to(device))
        statistics.update(autoencoder.regularizer.mode(moments), autoencoder.regularizer.variance(moments))
    summary = statistics.compute()
    # torchmetrics makes scalars of one channel's.
    return summary.mean.view(-1), summary.std.view(-1)


def pooled(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """Statistics (C,) of channels to those of all values together, as published: mean 0, one standard deviation.

    The published rule divides by the standard deviation over all values and subtracts nothing.
    """
    variance = std.square().mean() + mean.var(correction=0)
    return torch.zeros_like(mean), variance.sqrt().expand_as(std)


def calibrate(arguments: argparse.Namespace, console: Console) -> None:
    """Run the tool.

    Raises:
        FileNotFoundError: if a file is not there.
        OSError: if a file cannot be read, or the disk refuses the output.
        ShardReadError: if a shard cannot be read.
        ValueError: if something cannot be used.
    """
    if arguments.output.suffix not in SUFFIXES[OURS]:
        raise ValueError(f"{arguments.output} is no name of a checkpoint; allowed are names in .ckpt; change --output")
    check_target(arguments.output, "--output")
    expand_shards(arguments.data, "--data")
    autoencoder, node, _ = read(source_of(arguments, arguments.checkpoint))
    if arguments.image_size % (factor := autoencoder.downsampling_factor):
        raise ValueError(
            f"the image size is {arguments.image_size}; allowed are multiples of {factor}, by which this autoencoder "
            "divides it; change --image-size"
        )
    data = ImageTextDataModule(arguments.data, arguments.image_size, arguments.batch, seed=0)
    found = len(data.train_index)
    if found < arguments.num_images:
        console.print(f"there are {found} images, which are all taken", highlight=False)
    number = min(found, arguments.num_images)
    images = (batch["image"] for batch in data.reference_batches(number, arguments.batch))
    mean, std = measure(autoencoder.to(arguments.device), shown(images, number, console))
    if arguments.scalar:
        mean, std = pooled(mean, std)
    autoencoder.calibrate(mean.float(), std.float())
    write(arguments.output, OURS, node, autoencoder.cpu())
    for channel, (m, s) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
        console.print(f"channel {channel}: mean {m:+.4f}, standard deviation {s:.4f}", highlight=False)
    console.print(f"{arguments.output}: set stage.autoencoder.checkpoint to it", highlight=False, soft_wrap=True)


def shown(batches: Iterable[Tensor], number: int, console: Console) -> Iterator[Tensor]:
    """The batches, with a bar that counts `number` images."""
    columns = (TextColumn("images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("images", total=number)
        for batch in batches:
            yield batch
            progress.advance(task, len(batch))


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    help_text = "the autoencoder: anything that tools/convert.py reads"
    add("--checkpoint", metavar="SOURCE", type=Path, required=True, help=help_text)
    add_source_options(parser)
    add("--data", required=True, action="append", help="shards: a path, a glob or a brace pattern; may be repeated")
    add("--image-size", type=positive, required=True, help="side in pixels")
    add("--num-images", type=positive, default=4096, help="images to measure (default: %(default)s)")
    add("--batch", type=positive, default=16, help="images encoded at a time (default: %(default)s)")
    add("--scalar", action="store_true", help="mean 0 and one standard deviation for all channels, as published")
    add("--output", type=Path, required=True, help="the checkpoint to write (.ckpt)")
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    add("--device", choices=devices, default=devices[0], help="what this machine has (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0, or 2 if something cannot be used."""
    console = Console(stderr=True)
    try:
        calibrate(parse(argv), console)
    except (ValueError, OSError, ShardReadError) as error:
        said = explained(error, "change --output or --data")
        console.print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
