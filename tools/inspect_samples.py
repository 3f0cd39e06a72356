"""What `tools/inspect_shards.py` finds out: facts of samples, gathered in threads and merged.

Every sample is read once. Of its image only the header is looked at, unless it is among those that are to be decoded.
Facts of different samples are merged by adding counts and joining arrays of a few bytes a sample.
"""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from hashlib import blake2b
from io import BytesIO
from itertools import islice
from typing import NamedTuple

import numpy as np
from PIL import Image
from torch import Tensor

from ldm_train.data.index import CAPTION, IMAGE, ShardIndex
from ldm_train.data.quarantine import CaptionError, kind_of, reason_of
from ldm_train.data.shards import ShardReader, ShardReadError
from ldm_train.data.transforms import FORMATS, decode_rgb

CHUNK = 256  # samples a task
# What reading, decoding and parsing damaged members raises.
FAULTS = (OSError, ValueError, RuntimeError, SyntaxError, EOFError, IndexError, KeyError, Image.DecompressionBombError)


class Failure(NamedTuple):
    """A part of a sample that training could not use."""

    key: str
    kind: str
    error: str


@dataclass(frozen=True)
class Wanted:
    """What is looked at.

    Attributes:
        index: the samples.
        decode: (N,) bool, the rows whose images are decoded.
        max_pixels: the largest image that is decoded.
        caption_field: the metadata field that holds the caption; None takes the `.txt`.
        count_tokens: how many tokens a caption has; None where that is not asked.
    """

    index: ShardIndex
    decode: np.ndarray
    max_pixels: int
    caption_field: str | None = None
    count_tokens: Callable[[str], int] | None = None


@dataclass
class Facts:
    """What was found in some samples; `+=` merges.

    Attributes:
        samples: how many.
        decoded: of how many the image was decoded.
        formats: of images, counted.
        widths: of each image whose header could be read, in pixels.
        heights: likewise.
        lengths: characters of each caption.
        tokens: tokens of each caption, if they were asked for.
        caption_hashes: a hash of each caption that is not empty.
        without_caption: samples that have none at all.
        without_metadata: samples that have none.
        metadata_types: counted by field and JSON type.
        failures: what training could not use.
    """

    samples: int = 0
    decoded: int = 0
    formats: Counter[str] = field(default_factory=Counter)
    widths: "array[int]" = field(default_factory=lambda: array("i"))
    heights: "array[int]" = field(default_factory=lambda: array("i"))
    lengths: "array[int]" = field(default_factory=lambda: array("i"))
    tokens: "array[int]" = field(default_factory=lambda: array("i"))
    caption_hashes: "array[int]" = field(default_factory=lambda: array("q"))
    without_caption: int = 0
    without_metadata: int = 0
    metadata_types: Counter[tuple[str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def __iadd__(self, other: "Facts") -> "Facts":
        for each in fields(self):
            mine, theirs = getattr(self, each.name), getattr(other, each.name)
            if isinstance(mine, Counter):
                mine.update(theirs)
            elif isinstance(mine, int):
                setattr(self, each.name, mine + theirs)
            else:
                mine.extend(theirs)
        return self


def facts_of(wanted: Wanted, rows: np.ndarray, reader: ShardReader) -> Facts:
    """The facts of some rows of the index."""
    facts = Facts(samples=len(rows))
    for row in rows.tolist():
        found: dict[Failure, None] = {}  # a broken .json may fail twice
        for look in (_look_at_image, _look_at_metadata, _look_at_caption):
            try:
                look(facts, wanted, row, reader)
            except ShardReadError:
                raise
            except FAULTS as error:
                found[Failure(wanted.index.full_key(row), kind_of(error), reason_of(error))] = None
        facts.failures += found
    return facts


def _look_at_image(facts: Facts, wanted: Wanted, row: int, reader: ShardReader) -> None:
    data = wanted.index.read(reader, row, IMAGE)
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        facts.formats[str(image.format)] += 1
        facts.widths.append(image.width)
        facts.heights.append(image.height)
    if wanted.decode[row]:
        facts.decoded += 1
        decode_rgb(data, wanted.max_pixels)


def _look_at_metadata(facts: Facts, wanted: Wanted, row: int, reader: ShardReader) -> None:
    try:
        metadata = wanted.index.metadata(reader, row)
    except KeyError:
        facts.without_metadata += 1
        return
    facts.metadata_types.update((name, _json_type(value)) for name, value in metadata.items())


def _look_at_caption(facts: Facts, wanted: Wanted, row: int, reader: ShardReader) -> None:
    try:
        caption = _caption(wanted, row, reader)
    except KeyError:
        facts.without_caption += 1
        return
    facts.lengths.append(len(caption))
    if caption:
        facts.caption_hashes.append(
            int.from_bytes(blake2b(caption.encode(), digest_size=8).digest(), "little", signed=True)
        )
    if wanted.count_tokens is not None:
        facts.tokens.append(wanted.count_tokens(caption))


def _caption(wanted: Wanted, row: int, reader: ShardReader) -> str:
    if wanted.caption_field is None:
        return wanted.index.read(reader, row, CAPTION).decode("utf-8").strip()
    caption = wanted.index.metadata(reader, row)[wanted.caption_field]
    if not isinstance(caption, str):
        raise CaptionError(f"metadata field {wanted.caption_field!r} is {caption!r}, not a text")
    return caption.strip()


def _json_type(value: object) -> str:
    names = {bool: "true or false", int: "integer", float: "number", str: "text", list: "list", dict: "object"}
    return names.get(type(value), "null")


def gather(wanted: Wanted, rows: np.ndarray, workers: int) -> Iterator[Facts]:
    """The facts of the rows, a chunk at a time, made in threads: decoders let go of the interpreter's lock."""
    chunks = iter(np.array_split(rows, max(1, -(-len(rows) // CHUNK))))
    readers = [ShardReader(wanted.index.paths, wanted.index.storage) for _ in range(workers)]
    with ThreadPoolExecutor(workers) as pool:
        while window := list(islice(chunks, workers)):  # a reader is used by one thread at a time
            yield from pool.map(facts_of, [wanted] * len(window), window, readers)
    for reader in readers:
        reader.close()


def mixed_rows(index: ShardIndex, purpose: str) -> np.ndarray:
    """All rows in an order that the purpose and the keys decide alone: any beginning of it is a fair sample."""
    return np.argsort(index.key_hash(purpose), kind="stable")


def pictures(wanted: Wanted, rows: np.ndarray, count: int) -> Iterator[tuple[Tensor, str]]:
    """The first `count` images among the rows that can be decoded, (3, H, W) uint8, with their captions."""
    reader = ShardReader(wanted.index.paths, wanted.index.storage)
    for row in rows.tolist():
        if count == 0:
            break
        try:
            image = decode_rgb(wanted.index.read(reader, row, IMAGE), wanted.max_pixels)
        except FAULTS:
            continue
        try:
            caption = _caption(wanted, row, reader)
        except FAULTS:
            caption = ""
        yield image, caption
        count -= 1
    reader.close()
