"""Turn captioned images into the shards that the trainings read (img2dataset's layout, see `ldm_train.data.writing`).

    python tools/make_shards.py photos/ --output shards/                        images with .txt or .json beside them
    python tools/make_shards.py photos.csv --output shards/ --image-field file  a .csv, .jsonl or .parquet table
    python tools/make_shards.py laion/ --output shards/ --resize 512            an img2dataset folder, tars or files

Images are copied byte for byte unless --resize or --format changes them. A segmentation map (.seg.png, as large as the
upright image) goes with its image and is resized with it, without mixing classes. Each refused input is named with its
reason, here and in `refused.jsonl`. The output appears only when it is complete, and the same input gives the same
bytes.
"""

import argparse
import hashlib
import io
import json
import random
import shutil
import struct
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ldm_train.data.sources import Refusal, Source, UnusableSourceError, list_sources
from ldm_train.data.storage import explained
from ldm_train.data.writing import MAX_SAMPLES_PER_SHARD, SHARD_FILE, ShardSample, ShardWriter

REFUSED = "refused.jsonl"
NAMED_ON_SCREEN = 50
# How each --format is encoded by PIL, and the extension it gets; `keep` takes the one of the file.
ENCODINGS: dict[str, tuple[str, dict[str, int]]] = {
    "jpg": ("JPEG", {"subsampling": 0}),
    "png": ("PNG", {"optimize": 1}),
    "webp": ("WEBP", {"method": 6}),
    "webp-lossless": ("WEBP", {"method": 6, "lossless": 1}),
}
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION = 0x0112  # the EXIF tag; from 5 on the image lies on its side
# What PIL's readers raise on damaged files.
DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)


@dataclass(frozen=True)
class ImageRules:
    """Which images are kept, and what becomes of them.

    Attributes:
        resize: shrink to this short side in pixels; larger images only, None for none.
        format: a key of `ENCODINGS`, or `keep`.
        quality: of jpg and webp, 1 to 100.
        min_size: refuse a shorter short side.
        max_pixels: refuse more, before decoding: a small file can decode to gigabytes.
        caption_field: the metadata's field with the caption, for want of a `.txt`.
        allow_no_caption: keep an image without caption, with an empty one.
    """

    resize: int | None = None
    format: str = "keep"
    quality: int = 95
    min_size: int = 1
    max_pixels: int = 64_000_000
    caption_field: str = "caption"
    allow_no_caption: bool = False


def prepare(source: Source, rules: ImageRules) -> ShardSample | Refusal:
    """Read, check and if wanted re-encode one source."""
    try:
        metadata = source.read_metadata()
        caption = source.read_caption(metadata, rules.caption_field)
        if not caption and not rules.allow_no_caption:
            raise UnusableSourceError(f"no caption: neither a .txt nor the field {rules.caption_field!r}")
        json.dumps([caption, metadata], ensure_ascii=False, default=str).encode()
        original = source.image.read()
        image = open_image(original, rules)
        data, extension, (width, height) = encode(original, image, rules)
        segmentation = segmentation_map(source, image, rules)
    except UnusableSourceError as error:
        return Refusal(source.name, str(error))
    except UnicodeEncodeError:
        return Refusal(source.name, "caption or metadata is not Unicode: half of a surrogate pair")
    except UnidentifiedImageError:
        return Refusal(source.name, "unreadable image: no JPEG, PNG or WebP header")
    except DAMAGE as error:
        return Refusal(source.name, f"unreadable image: {error}")
    facts: dict[str, Any] = {"url": None, "original_width": image.width, "original_height": image.height}
    facts |= {k: v for k, v in metadata.items() if k != rules.caption_field}
    facts |= {"width": width, "height": height, "sha256": hashlib.sha256(original).hexdigest(), "source": source.name}
    return ShardSample(data, extension, caption, facts, segmentation)


def open_image(data: bytes, rules: ImageRules) -> Image.Image:
    """Decode, after the header has shown that it is wanted."""
    image = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
    if image.width * image.height > rules.max_pixels:
        raise UnusableSourceError(f"too large: {image.width} x {image.height}, --max-pixels is {rules.max_pixels}")
    if min(image.size) < rules.min_size:
        raise UnusableSourceError(f"too small: {image.width} x {image.height}, --min-size is {rules.min_size}")
    image.load()
    return image


def encode(original: bytes, image: Image.Image, rules: ImageRules) -> tuple[bytes, str, tuple[int, int]]:
    """The member's bytes, extension and (width, height); the original's where nothing is to change."""
    shrink = is_to_shrink(image, rules)
    name = EXTENSIONS[image.format or ""]
    if not shrink and rules.format.split("-")[0] in ("keep", name):
        return original, name, image.size
    encoding, options = ENCODINGS[name if rules.format == "keep" else rules.format]
    picture = upright(image)
    if shrink:
        picture = shrunk(picture, rules.resize or 0)
    if encoding == "JPEG" and picture.mode == "RGBA":
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    quality = 100 if "lossless" in options else rules.quality
    buffer = io.BytesIO()
    picture.save(buffer, encoding, **({} if encoding == "PNG" else {"quality": quality}), **options)
    return buffer.getvalue(), EXTENSIONS[encoding], picture.size


def segmentation_map(source: Source, image: Image.Image, rules: ImageRules) -> bytes | None:
    """The source's segmentation map, at the size that its image will have when it stands upright; None if none."""
    if source.segmentation is None:
        return None
    data = source.segmentation.read()
    lies = image.getexif().get(ORIENTATION, 1) >= 5
    width, height = reversed(image.size) if lies else image.size
    try:
        classes = Image.open(io.BytesIO(data), formats=("PNG",))
        if classes.size == (width, height):  # else it may be huge
            classes.load()
    except DAMAGE as error:
        raise UnusableSourceError(f"unreadable .seg.png: {error}") from error
    if classes.size != (width, height) or len(classes.getbands()) != 1:
        found = f"{classes.width} x {classes.height}, {classes.mode}"
        raise UnusableSourceError(f"its .seg.png is {found}; it must be {width} x {height} of one channel")
    if not is_to_shrink(image, rules):
        return data
    buffer = io.BytesIO()
    classes.resize(scaled((width, height), rules.resize or 0), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def is_to_shrink(image: Image.Image, rules: ImageRules) -> bool:
    """Whether --resize changes an image."""
    return rules.resize is not None and min(image.size) > rules.resize


def upright(image: Image.Image) -> Image.Image:
    """As RGB or RGBA, turned as its EXIF says."""
    if image.mode.startswith("I"):  # 16 bits, which PIL would clip instead of scale
        image = image.point(lambda value: value / 256).convert("L")
    image = ImageOps.exif_transpose(image)
    return image.convert("RGBA" if image.has_transparency_data else "RGB")


def shrunk(image: Image.Image, side: int) -> Image.Image:
    """The short side at `side` pixels; colour is averaged in proportion to alpha, so that edges get no fringe."""
    size = scaled(image.size, side)
    if image.mode == "RGBA":
        return image.convert("RGBa").resize(size, Image.Resampling.LANCZOS).convert("RGBA")
    return image.resize(size, Image.Resampling.LANCZOS)


def scaled(size: tuple[int, int], side: int) -> tuple[int, int]:
    """A width and height in proportion, the smaller of them at `side`."""
    scale = side / min(size)
    return round(size[0] * scale), round(size[1] * scale)


def prepared(sources: Iterable[Source], rules: ImageRules, workers: int) -> Iterator[ShardSample | Refusal]:
    """`prepare` every source in several threads (PIL lets go of the interpreter's lock), results in order."""
    remaining = iter(sources)
    with ThreadPoolExecutor(workers) as pool:
        while window := list(islice(remaining, 32 * workers)):  # bounded, so that memory is
            yield from pool.map(prepare, window, [rules] * len(window))


def write_shards(
    sources: list[Source], folder: Path, rules: ImageRules, samples_per_shard: int, workers: int, console: Console
) -> tuple[int, list[Refusal]]:
    """Write the sources into a folder under a progress bar; how many were kept, and which were not."""
    kept, refusals = 0, []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with ShardWriter(folder, samples_per_shard) as writer, Progress(*columns, console=console) as progress:
        bar = progress.add_task("images", total=len(sources))
        for result in prepared(sources, rules, workers):
            if isinstance(result, Refusal):
                refusals.append(result)
            else:
                writer.write(result)
                kept += 1
            progress.update(bar, advance=1, description=f"images, {len(refusals)} refused")
    return kept, refusals


def written_before(output: Path) -> list[Path]:
    """The files in a folder that an earlier run of this tool may have left."""
    return [path for path in output.iterdir() if path.name == REFUSED or SHARD_FILE.fullmatch(path.name)]


def check_output(output: Path, source: Path, overwrite: bool) -> None:
    """Refuse an output whose files would be lost or mixed with others.

    Raises:
        ValueError: with what was found, what is allowed and what to change.
    """
    there, here = output.resolve(), source.resolve()
    if there.is_relative_to(here) or here.is_relative_to(there):
        raise ValueError(f"{output} and the input {source} overlap; allowed: separate folders; change --output.")
    if output.exists() and not output.is_dir():
        raise ValueError(f"{output} is a file; allowed: a new or empty folder; change --output.")
    if not overwrite and output.exists() and any(path.name != REFUSED for path in output.iterdir()):
        raise ValueError(
            f"{output} is not empty; allowed: a new or empty folder, or --overwrite, which replaces the shards in it "
            "and leaves other files alone; change --output."
        )


def publish(staging: Path, output: Path, kept: int) -> None:
    """Move what was written into the output, replacing an earlier run's files if there are new ones.

    What is new is there before anything old goes, so that a kill in between loses no image.
    """
    output.mkdir(parents=True, exist_ok=True)
    before = written_before(output) if kept else []
    new = sorted(staging.iterdir(), key=lambda path: (path.suffix == ".tar", path.name))
    for path in new:
        path.replace(output / path.name)
    names = {path.name for path in new}
    for path in before:
        if path.name not in names:
            path.unlink()


def report(refusals: list[Refusal], console: Console, output: Path) -> None:
    """Name the refused, all or the first and a count per reason."""
    for refusal in refusals[:NAMED_ON_SCREEN]:
        console.print(
            f"refused {refusal.source}: {refusal.reason}", style="yellow", markup=False, highlight=False, soft_wrap=True
        )
    if len(refusals) > NAMED_ON_SCREEN:
        console.print(f"... {len(refusals)} refused in all, each named in {output / REFUSED}:", style="yellow")
        for reason, number in Counter(refusal.reason.split(":")[0] for refusal in refusals).most_common():
            console.print(f"{number:8d} {reason}", style="yellow", markup=False)


def make_shards(arguments: argparse.Namespace, console: Console) -> int:
    """Run the tool; how many samples were kept.

    Raises:
        OSError: if a file cannot be read, or the disk refuses the output.
        ValueError: if the input or the output cannot be used.
    """
    output: Path = arguments.output
    check_output(output, arguments.source, arguments.overwrite)
    sources, refusals = list_sources(arguments.source, arguments.image_field, arguments.image_root)
    if arguments.shuffle_seed is not None:
        random.Random(arguments.shuffle_seed).shuffle(sources)
    rules = ImageRules(**{rule.name: getattr(arguments, rule.name) for rule in fields(ImageRules)})
    Image.MAX_IMAGE_PIXELS = None  # --max-pixels takes its place
    staging = output.resolve().with_name(f".{output.resolve().name}.partial")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        kept, unusable = write_shards(sources, staging, rules, arguments.samples_per_shard, arguments.workers, console)
        refusals += unusable
        if refusals:
            lines = (json.dumps(refusal._asdict(), ensure_ascii=False) + "\n" for refusal in refusals)
            (staging / REFUSED).write_text("".join(lines), encoding="utf-8")
        publish(staging, output, kept)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    report(refusals, console, output)
    return kept


def positive(text: str) -> int:
    """An option's whole number, at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 or more")
    return number


def percent(text: str) -> int:
    """The option's whole number, 1 to 100."""
    if not 1 <= (number := int(text)) <= 100:
        raise argparse.ArgumentTypeError(f"{number} is given; allowed: 1 to 100; change --quality")
    return number


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("source", type=Path, help="a folder of images, a table, or an img2dataset folder")
    add("--output", type=Path, required=True, help="the folder for the shards")
    add("--overwrite", action="store_true", help="replace the shards in --output")
    add("--samples-per-shard", type=positive, default=MAX_SAMPLES_PER_SHARD)
    add("--shuffle-seed", type=int, help="mix the order, the same way for the same number (default: by name)")
    add("--image-field", default="image", help="a table's column with the image paths (default: %(default)s)")
    add("--caption-field", default="caption", help="the column or .json field with the captions (default: %(default)s)")
    add(
        "--image-root", type=Path, help="what a table's paths are relative to, and must not leave (default: its folder)"
    )
    add("--resize", type=positive, metavar="PIXELS", help="shrink larger images to this short side")
    add("--format", choices=("keep", *ENCODINGS), default="keep", help="encode images anew (default: %(default)s)")
    add("--quality", type=percent, default=95, help="of jpg and webp (default: %(default)s)")
    add("--min-size", type=positive, default=1, metavar="PIXELS", help="refuse images with a smaller short side")
    add(
        "--max-pixels", type=positive, default=ImageRules.max_pixels, help="refuse larger images (default: %(default)s)"
    )
    add("--allow-no-caption", action="store_true", help="keep images without caption, for training an autoencoder")
    add("--workers", type=positive, default=4, help="threads (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0 if anything was kept, 1 if nothing was, 2 if input or output cannot be used."""
    arguments = parse(argv)
    console = Console(stderr=True)
    try:
        kept = make_shards(arguments, console)
    except (ValueError, OSError) as error:
        said = explained(error, "change --output or the first argument")
        console.print(f"error: {said}", style="red", markup=False, highlight=False, soft_wrap=True)
        return 2
    if not kept:
        console.print(
            f"error: nothing in {arguments.source} could be kept; allowed: .jpg, .png or .webp images with captions; "
            f"see {arguments.output / REFUSED}, or give --allow-no-caption or a smaller --min-size.",
            style="red",
            markup=False,
            highlight=False,
            soft_wrap=True,
        )
        return 1
    console.print(f"{kept} samples in {arguments.output}", soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
