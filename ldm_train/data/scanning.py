"""One shard, scanned: its complete samples as columns, a row each, and a line for everything else in it.

A sample is the members of a shard that share a name up to the first dot. Members are told apart by their extension and
kept as places: byte offset and size. Width and height, where they are asked for, are those of the upright image as it
is decoded; they are read from the image files' headers, one short read each (the whole file for WebP); cached latents
name those of their source. Where img2dataset's parquet has them for every sample, and agrees with some headers, it
saves these reads.
"""

import io
import json
import os
import struct
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from PIL import Image

from ldm_train.data.latent_member import EXTENSION, HEADER_SIZE, source_size
from ldm_train.data.locations import beside
from ldm_train.data.parquet import MetadataTable, read_table
from ldm_train.data.shards import Member, scan_shard
from ldm_train.data.storage import ShardReadError, Storage

IMAGE, CAPTION, METADATA, SEGMENTATION = 0, 1, 2, 3
KINDS = ("image", "caption (.txt)", "metadata (.json)", "segmentation map")
UNKNOWN = -1
_IMAGES = ("jpg", "jpeg", "png", "webp", EXTENSION)  # the last: an image encoded, see `ldm_train.data.latents`
_KIND_OF_EXTENSION = dict.fromkeys(_IMAGES, IMAGE) | {"txt": CAPTION, "json": METADATA}
_ABSENT = (0, -1)
_LARGEST = {IMAGE: 1 << 30, CAPTION: 1 << 20, METADATA: 1 << 24, SEGMENTATION: 1 << 30}  # bytes that a worker will read
_FORMATS = ("JPEG", "PNG", "WEBP")
_ORIENTATION = 0x0112  # the EXIF tag; from 5 on the image lies on its side
# What Pillow raises on damaged headers; the decoder names the sample when its turn comes.
_DAMAGE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, Image.DecompressionBombError)
_HEADER = 4096
_COMPARED = 8


@dataclass(frozen=True)
class Contents:
    """What an index holds of each sample.

    Attributes:
        required: the kinds of members without which a sample is incomplete.
        segmentation: the extension of segmentation maps, in lower case, without which a sample is incomplete too;
            None: they are not indexed.
        dimensions: whether width and height are indexed.
    """

    required: tuple[int, ...] = (IMAGE, CAPTION)
    segmentation: str | None = None
    dimensions: bool = False

    @property
    def kinds(self) -> dict[str, int]:
        """The kind of member behind each extension."""
        own = {} if self.segmentation is None else {self.segmentation: SEGMENTATION}
        return _KIND_OF_EXTENSION | own

    @property
    def width(self) -> int:
        """K, the kinds of members that are indexed."""
        return 3 if self.segmentation is None else 4


class ShardScan(NamedTuple):
    """What a shard holds: n samples of K members.

    Attributes:
        places: (n, K, 2) int64 byte offset and size of each member, (0, -1) where there is none.
        keys: the samples' names.
        dimensions: (n, 2) int32 width and height in pixels, -1 where they could not be read; None if not asked for.
        promised: the number of samples that the stats file promises; None if there is none.
        damage: a line for each thing that was left out.
    """

    places: np.ndarray
    keys: list[bytes]
    dimensions: np.ndarray | None
    promised: int | None
    damage: list[str]


def scan(location: str, contents: Contents, storage: Storage) -> ShardScan:
    """Scan a shard by reading its tar headers.

    Args:
        location: the shard.
        contents: what is wanted.
        storage: where it lies.

    Raises:
        OSError: if it cannot be read.
        ShardReadError: if it cannot be fetched.
    """
    members, damage = scan_shard(location, storage)
    required = contents.required if contents.segmentation is None else (*contents.required, SEGMENTATION)
    samples, incomplete = _group(members, contents.kinds, required, contents.width)
    promised = _promised(location, storage)
    if promised not in (None, len(samples)):
        incomplete.append(f"{len(samples)} complete samples where the stats file promises {promised}")
    places = np.array(list(samples.values()), dtype=np.int64).reshape(-1, contents.width, 2)
    dimensions = _dimensions(location, list(samples), places[:, IMAGE], storage) if contents.dimensions else None
    return ShardScan(places, [key.encode() for key in samples], dimensions, promised, damage + incomplete)


def _group(
    members: list[Member], kinds: dict[str, int], required: Sequence[int], width: int
) -> tuple[dict[str, list[tuple[int, int]]], list[str]]:
    """Complete samples of a shard by key, an (offset, size) for each kind; a line for each incomplete or double one."""
    samples: dict[str, list[tuple[int, int]]] = {}
    spoiled: dict[str, str] = {}
    for name, offset, size in members:
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        kind = kinds.get(extension.lower())
        if kind is None:
            continue
        key = folder + slash + stem
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = [_ABSENT] * width
        elif sample[kind] is not _ABSENT:
            spoiled[key] = f"{key}: more than one {KINDS[kind]}"
        if size > _LARGEST[kind]:
            spoiled[key] = f"{key}: the {KINDS[kind]} has {size} bytes, more than {_LARGEST[kind]}"
        sample[kind] = (offset, size)
    for key, sample in samples.items():
        missing = [KINDS[kind] for kind in required if sample[kind] is _ABSENT]
        if missing:
            spoiled[key] = f"{key}: no {' and no '.join(missing)}"
        elif sample[IMAGE][1] == 0:
            spoiled[key] = f"{key}: the image is empty"
    spoiled |= _dotted(members, kinds, required, samples)
    return {key: sample for key, sample in samples.items() if key not in spoiled}, list(spoiled.values())


def _dotted(
    members: list[Member], kinds: dict[str, int], required: Sequence[int], samples: Container[str]
) -> dict[str, str]:
    """A line for each name that would be a sample if keys ended at the last dot, and is none."""
    found: dict[str, set[int | None]] = {}
    for name, _, _ in members:
        stem, _, extension = name.rpartition(".")
        folder, slash, file = stem.rpartition("/")
        if "." in file and folder + slash + file.partition(".")[0] not in samples:
            found.setdefault(stem, set()).add(kinds.get(extension.lower()))
    return {
        stem: f"{stem}: no sample, because a key ends at its first dot" for stem in found if found[stem] >= {*required}
    }


def _promised(location: str, storage: Storage) -> int | None:
    """The number of samples that img2dataset's `<shard>_stats.json` says it wrote."""
    try:
        with os.fdopen(storage.open(beside(location, "_stats.json")), "rb") as file:
            return int(json.load(file)["successes"])
    except (OSError, ShardReadError, ValueError, KeyError, TypeError):
        return None


def _dimensions(location: str, keys: list[str], images: np.ndarray, storage: Storage) -> np.ndarray:
    """(n, 2) int32 width and height of the images at the places (n, 2)."""
    told = _told_dimensions(read_table(location, ("width", "height"), storage), keys)
    fd = storage.open(location)
    try:
        if told is not None:
            some = np.unique(np.linspace(0, len(keys) - 1, _COMPARED).astype(np.int64))
            if all(_upright_size(fd, *images[row].tolist()) == tuple(told[row].tolist()) for row in some):
                return told
        sizes = [_upright_size(fd, offset, size) for offset, size in images.tolist()]
    finally:
        os.close(fd)
    return np.array(sizes, dtype=np.int32).reshape(-1, 2)


def _told_dimensions(table: MetadataTable, keys: list[str]) -> np.ndarray | None:
    """What the metadata says, if it says it for every sample."""
    rows = [table.get(key, {}) for key in keys]
    sizes = [(row.get("width"), row.get("height")) for row in rows]
    if not sizes or not all(isinstance(side, int) and 0 < side < 2**31 for size in sizes for side in size):
        return None
    return np.array(sizes, dtype=np.int32)


class _Part(io.RawIOBase):
    """The bytes of a file from `offset` on, as a file of their own."""

    def __init__(self, fd: int, offset: int, size: int) -> None:
        self._fd, self._offset, self._size, self._position = fd, offset, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, start + offset)
        return self._position

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        wanted = max(0, min(len(buffer), self._size - self._position))
        data = os.pread(self._fd, wanted, self._offset + self._position)
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def _upright_size(fd: int, offset: int, size: int) -> tuple[int, int]:
    """Width and height of an image file as it is decoded, or was; (-1, -1) if its header cannot be read."""
    with suppress(*_DAMAGE):
        file = io.BufferedReader(_Part(fd, offset, size), _HEADER)
        if (cached := source_size(file.peek(HEADER_SIZE))) is not None:
            return (cached.width, cached.height) if all(cached) else (UNKNOWN, UNKNOWN)
        with Image.open(file, formats=_FORMATS) as image:
            lies = "exif" in image.info and image.getexif().get(_ORIENTATION, 1) >= 5
            return (image.height, image.width) if lies else image.size
    return UNKNOWN, UNKNOWN
