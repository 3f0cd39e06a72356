"""What `tools/benchmark.py data` measures: images a second that one core loads from shards.

A *contender* makes batches of all images of some shards, in a shuffled order: (B, 3, H, H), float32 in [-1, 1] or the
bytes that become these on the device, or the moments of cached latents (B, 8, H / 8, H / 8) float16. Those of the same
shards take turns batch by batch, so that whatever slows the machine down slows all; the clock is the processor's own. A
round is one epoch of each, hence of the same images; figures are medians over rounds, as are ratios.
"""

import argparse
import io
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import cache_latents
import make_shards
import numpy as np
import torch
import webdataset
from hydra.utils import instantiate
from PIL import Image, ImageFilter
from rich.console import Console
from rich.progress import Progress, track
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Normalize, Resize, ToTensor

from ldm_train.batch import ImageTextBatch
from ldm_train.data import ImageTextDataModule, LatentCache, ShardReader, build_index, expand_shards
from ldm_train.data.index import IMAGE
from ldm_train.data.latent_member import unpack
from ldm_train.data.transforms import center_square, decode_rgb, to_signed_unit
from ldm_train.data.writing import ShardSample, ShardWriter
from ldm_train.nn import Autoencoder

EMOJI = Path(__file__).parents[1] / "ldm_train" / "assets" / "noto_emoji"
SHORT_SIDES, ASPECTS, QUALITY = (300, 900), (2 / 3, 3 / 2), 90
PER_SHARD = 64
ORIGINAL, RESIZED, LATENTS = "original", "resized", "latents"
PLAIN, PLAIN_ORIGINAL, LIMIT = "webdataset + PIL", "webdataset + PIL, from the originals", "the limit"
OURS, OURS_REDUCED, OURS_CONVERTED = "ldm_train", "ldm_train, data.reducing_gap=1", "ldm_train, converted as well"
# As many moments an image as Stable Diffusion's; what the encoder makes of it does not matter here.
AUTOENCODER = {
    "_target_": "ldm_train.nn.Autoencoder",
    "regularizer": {"_target_": "ldm_train.nn.KLRegularizer", "weight": 1e-6},
    "latent_channels": 4,
    "channels": 8,
    "channel_multipliers": [1, 1, 1, 1],
    "num_res_blocks": 1,
    "attention_factors": [],
    "middle_attention": False,
    "norm_groups": 4,
}


@dataclass(frozen=True)
class DataRow:
    """One line of the table: a contender on some shards."""

    shards: str
    name: str
    images_per_second: float
    milliseconds_per_image: float
    of_plain: float | None
    of_plain_from_originals: float
    of_limit: float


def collage(number: int, stickers: list[Image.Image]) -> Image.Image:
    """A picture with the smooth surfaces, edges and grain of a photograph: things on a gradient, and noise."""
    random = np.random.default_rng(number)
    short, aspect = random.integers(*SHORT_SIDES, endpoint=True), np.exp(random.uniform(*np.log(ASPECTS)))
    size = (round(short * max(aspect, 1)), round(short * max(1 / aspect, 1)))
    coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    picture = coarse.resize(size, Image.Resampling.BICUBIC)
    for choice in random.integers(len(stickers), size=random.integers(5, 12)):
        side = int(short * random.uniform(0.15, 0.6))
        sticker = stickers[choice].resize((side, side), Image.Resampling.BICUBIC)
        sticker = sticker.rotate(random.uniform(-40, 40), Image.Resampling.BICUBIC)
        picture.paste(sticker, tuple(random.integers(-side // 3, np.array(size) - side // 2).tolist()), sticker)
    grain = random.normal(0.0, 5.0, (size[1], size[0], 1)) + random.normal(0.0, 2.0, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(picture) + grain).clip(0, 255).astype(np.uint8))


def write_pictures(folder: Path, count: int, console: Console) -> None:
    """Shards of `count` JPEG files with short sides of 300 to 900 pixels."""
    index = build_index(expand_shards(str(EMOJI / "*.tar")))
    reader = ShardReader(index.paths)
    stickers = [_cut_out(index.read(reader, row, IMAGE)) for row in range(0, len(index), 8)]
    folder.mkdir(parents=True)
    with ShardWriter(folder, PER_SHARD) as writer:
        for number in track(range(count), "pictures", console=console):
            picture, buffer = collage(number, stickers), io.BytesIO()
            picture.save(buffer, "JPEG", quality=QUALITY)
            facts = {"width": picture.width, "height": picture.height}
            writer.write(ShardSample(buffer.getvalue(), "jpg", f"collage number {number}", facts))


def _cut_out(data: bytes) -> Image.Image:
    """An emoji whose white surroundings are see-through."""
    image = Image.fromarray(decode_rgb(data).permute(1, 2, 0).numpy())
    alpha = image.convert("L").point(lambda value: 0 if value > 250 else 255).filter(ImageFilter.MinFilter(3))
    image.putalpha(alpha)
    return image


def prepare(folder: Path, count: int, image_size: int, console: Console) -> dict[str, str]:
    """The shards to measure on, made where they are missing: name -> pattern.

    Raises:
        ValueError: if the folder holds other shards.
    """
    original = folder / f"{ORIGINAL}_{count}"
    resized, latents = (folder / f"{name}_{count}_{image_size}" for name in (RESIZED, LATENTS))
    if not original.exists():
        partial = original.with_name(f".{original.name}.partial")
        write_pictures(partial, count, console)
        partial.rename(original)
    size = str(image_size)
    if not resized.exists() and make_shards.main([str(original), "--output", str(resized), "--resize", size]):
        raise ValueError(f"{original} cannot be resized; allowed are whole shards; delete it, or change --shards")
    if not latents.exists():
        write_latents(f"{original}/*.tar", latents, size)
    return {ORIGINAL: f"{original}/*.tar", RESIZED: f"{resized}/*.tar", LATENTS: f"{latents}/*.tar"}


def write_latents(pattern: str, folder: Path, image_size: str) -> None:
    """Cached latents of the images of some shards, by an encoder of random weights.

    Raises:
        ValueError: if the tool refuses them.
    """
    model: Autoencoder = instantiate(AUTOENCODER)
    model.calibrate(torch.zeros(model.latent_channels), torch.ones(model.latent_channels))
    state = {f"autoencoder.{name}": value for name, value in model.state_dict().items()}
    with TemporaryDirectory() as place:
        checkpoint = Path(place) / "autoencoder.ckpt"
        torch.save({"state_dict": state, "config": {"autoencoder": AUTOENCODER}}, checkpoint)
        options = ["--checkpoint", str(checkpoint), "--image-size", image_size, "--workers", "0", "--device", "cpu"]
        if cache_latents.main(["--data", pattern, "--output", str(folder), *options]):
            raise ValueError(
                f"no latents can be cached of images of {image_size} pixels; allowed are multiples of 8; change "
                "--image-size"
            )


def plain(pattern: str, image_size: int, batch: int) -> Iterator[Tensor]:
    """WebDataset and PIL as their users write it."""
    transform = Compose(
        [
            Resize(image_size, InterpolationMode.BICUBIC),
            CenterCrop(image_size),
            ToTensor(),
            Normalize([0.5] * 3, [0.5] * 3),
        ]
    )
    urls = list(expand_shards(pattern))
    pipeline = webdataset.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(1000, seed=0).decode("pil")
    for images, _ in pipeline.to_tuple("jpg", "txt").map_tuple(transform, str).batched(batch):
        yield images


def ours(loader: DataLoader[ImageTextBatch]) -> Iterator[Tensor]:
    """The loader of the trainings, in this process."""
    for loaded in loader:
        yield loaded["moments"] if "moments" in loaded else loaded["image"]


def image_limit(files: list[Tensor], image_size: int, batch: int) -> Iterator[Tensor]:
    """Files that lie in memory decoded by torchvision, resized by torch, and nothing else."""
    for begin in range(0, len(files), batch):
        images = [
            center_square(decode_image(file, ImageReadMode.RGB), image_size) for file in files[begin : begin + batch]
        ]
        yield torch.stack(images)


def latent_limit(files: list[bytes], batch: int) -> Iterator[Tensor]:
    """Cached latents that lie in memory, taken apart and put together, and nothing else."""
    for begin in range(0, len(files), batch):
        yield torch.stack([unpack(file).moments[0] for file in files[begin : begin + batch]])


def contenders(
    patterns: dict[str, str], shards: str, image_size: int, batch: int
) -> dict[str, Callable[[], Iterator[Tensor]]]:
    """What takes turns on the shards of a name: name -> what starts an epoch."""
    pattern, files = patterns[shards], files_of(patterns[shards])

    def loader(**options: Any) -> Callable[[], Iterator[Tensor]]:  # noqa: ANN401 (of the constructor)
        loads = ImageTextDataModule(pattern, image_size, batch, seed=0, **options).train_dataloader()
        return lambda: ours(loads)

    def from_originals() -> Iterator[Tensor]:
        return plain(patterns[ORIGINAL], image_size, batch)

    if shards == LATENTS:
        limit = {OURS: loader(latents=LatentCache()), LIMIT: lambda: latent_limit(files, batch)}
        return {PLAIN_ORIGINAL: from_originals, **limit}
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    as_bytes = loader()
    both = {
        OURS: as_bytes,
        OURS_CONVERTED: lambda: map(to_signed_unit, as_bytes()),
        LIMIT: lambda: image_limit(tensors, image_size, batch),
    }
    if shards == ORIGINAL:
        return {PLAIN_ORIGINAL: from_originals, OURS_REDUCED: loader(reducing_gap=1.0), **both}
    return {PLAIN_ORIGINAL: from_originals, PLAIN: lambda: plain(pattern, image_size, batch), **both}


def files_of(pattern: str) -> list[bytes]:
    """The image files of the shards, mixed; they and all other bytes beside them are in the page cache then."""
    index = build_index(expand_shards(pattern))
    reader = ShardReader(index.paths)
    for path in index.paths:
        Path(path).read_bytes()
    rows = np.random.default_rng(0).permutation(len(index)).tolist()
    return [index.read(reader, row, IMAGE) for row in rows]


def timed_epochs(starts: dict[str, Callable[[], Iterator[Tensor]]], images: int) -> dict[str, float]:
    """Seconds of the processor for an epoch of each contender, taking turns batch by batch.

    Raises:
        ValueError: if one makes another number of images, which would make it look faster.
    """
    seconds, made = dict.fromkeys(starts, 0.0), dict.fromkeys(starts, 0)
    running = {name: start() for name, start in starts.items()}
    while running:
        for name, epoch in list(running.items()):
            begin = time.process_time()
            batch = next(epoch, None)
            seconds[name] += time.process_time() - begin
            if batch is None:
                del running[name]
            else:
                made[name] += len(batch)
    if set(made.values()) != {images}:
        raise ValueError(f"epochs of {made} images; allowed: {images} each; make --images a multiple of --batch")
    return seconds


def rows_of(shards: str, rounds: list[dict[str, float]], images: int) -> list[DataRow]:
    """A row for each contender: medians over rounds."""

    def ratio(other: str, name: str) -> float:
        return statistics.median(seconds[other] / seconds[name] for seconds in rounds)

    rows = []
    for name in rounds[0]:
        each = statistics.median(seconds[name] for seconds in rounds) / images
        of_plain = ratio(PLAIN, name) if PLAIN in rounds[0] else None
        ratios = of_plain, ratio(PLAIN_ORIGINAL, name), ratio(LIMIT, name)
        rows.append(DataRow(shards, name, 1 / each, 1e3 * each, *ratios))
    return rows


def benchmark_data(arguments: argparse.Namespace, console: Console) -> tuple[list[DataRow], dict[str, object]]:
    """Measure loading from the shards in a folder, which are made if they are not there.

    Returns:
        The rows, and what they were measured of and on.

    Raises:
        ValueError: if the shards do not fit.
    """
    if arguments.images % arguments.batch:
        raise ValueError(
            f"--images is {arguments.images}; allowed are multiples of --batch, which is {arguments.batch}, so that "
            "all make the same images; change --images"
        )
    torch.set_num_threads(1)
    patterns = prepare(arguments.shards, arguments.images, arguments.image_size, console)
    rows: list[DataRow] = []
    megabytes: dict[str, float] = {}
    with Progress(console=console) as progress:
        bar = progress.add_task("rounds", total=len(patterns) * (1 + arguments.rounds))
        for shards, pattern in patterns.items():
            starts = contenders(patterns, shards, arguments.image_size, arguments.batch)
            rounds = []
            for _ in range(1 + arguments.rounds):
                rounds.append(timed_epochs(starts, arguments.images))
                progress.advance(bar)
            rows += rows_of(shards, rounds[1:], arguments.images)  # the first warms up
            megabytes[shards] = sum(Path(path).stat().st_size for path in expand_shards(pattern)) / 1e6
    facts = {
        "images": arguments.images,
        "image_size": arguments.image_size,
        "batch": arguments.batch,
        "rounds": arguments.rounds,
        "short_sides": SHORT_SIDES,
        "quality": QUALITY,
        "megabytes": megabytes,
        "page_cache": "warm",
        "clock": "CPU time of one process with one thread",
        "torch": torch.__version__,
        "webdataset": webdataset.__version__,
    }
    return rows, facts
