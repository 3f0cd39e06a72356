"""From source shards to `.latent` members: the same pixels that a run on the images would see, encoded.

Batches are cut within a shard, from its beginning, so that what a shard becomes depends on that shard alone. With
aspect buckets each batch is of one shape: a window of so many batches is sorted by shape, encoded, and put back in
order, so that no more than a window waits in memory. A sample whose image cannot be decoded is no reason to stop: it
keeps its place, with the reason (`ldm_train.data.latent_member`).

Letters: B batch, V versions, C latent channels, k moments per channel, h and w size of the latents.
"""

import contextlib
import struct
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm_train.data.buckets import assign
from ldm_train.data.crops import Box, Shape, covering_box
from ldm_train.data.index import CAPTION, IMAGE, METADATA, SEGMENTATION, ShardIndex, build_index
from ldm_train.data.latent_member import DTYPES, UNKNOWN_SIZE, pack, pack_failure
from ldm_train.data.latent_settings import LatentSettings
from ldm_train.data.quarantine import reason_of
from ldm_train.data.scanning import Contents, scan
from ldm_train.data.shards import ShardReader
from ldm_train.data.storage import LOCAL_FILES, Storage
from ldm_train.data.transforms import cut, decode_rgb, resize, to_signed_unit
from ldm_train.nn import Autoencoder

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MEMBERS = {"txt": CAPTION, "json": METADATA}
_WINDOW = 32  # batches that are sorted by shape
_NO_BUCKET = -1
# What decoders raise on damaged bytes.
_DAMAGE = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    RuntimeError,
    struct.error,
    Image.DecompressionBombError,
)


class Picture(NamedTuple):
    """A source sample.

    Attributes:
        key: its name.
        members: what is copied, by extension.
        pixels: (3, H, W) uint8, or `None`.
        source_size: height and width of the image in the file; without pixels, what its head claims, if it is known.
        box: what was cut out of it.
        failure: why there are no pixels; `None` if there are.
    """

    key: str
    members: dict[str, bytes]
    pixels: Tensor | None
    source_size: Shape = UNKNOWN_SIZE
    box: Box = Box(0, 0, 0, 0)
    failure: str | None = None


class PictureBatch(NamedTuple):
    """Samples of one shard and of one shape.

    Attributes:
        shard: its number.
        rows: their rows in the index of the source, in ascending order.
        pictures: the samples.
    """

    shard: int
    rows: Sequence[int]
    pictures: list[Picture]

    def images(self) -> Tensor | None:
        """Those that could be decoded: (B, 3, H, W) float32 in [-1, 1]; `None` if there are none."""
        pixels = [picture.pixels for picture in self.pictures if picture.pixels is not None]
        return to_signed_unit(torch.stack(pixels)) if pixels else None


class SourceImages(Dataset[PictureBatch]):
    """All samples with an image, in their shapes, in batches within shards; an empty shard gives an empty batch.

    Args:
        paths: the shards.
        settings: how the images are made.
        batch_size: B.
        storage: where the shards lie.
    """

    def __init__(
        self,
        paths: Sequence[str],
        settings: LatentSettings,
        batch_size: int,
        storage: Storage = LOCAL_FILES,
    ) -> None:
        # Whatever else a run asks of a sample, a caption or metadata, it asks again of the cache.
        is_bucketed = settings.shapes is not None
        self.index: ShardIndex = build_index(paths, (IMAGE,), storage=storage, dimensions=is_bucketed)
        self.settings, self.storage = settings, storage
        self.reader = ShardReader(self.index.paths, storage)
        self._buckets = self._assigned()
        self._maps: tuple[int, dict[str, list[int]]] = (-1, {})
        self._batches = [
            (shard, rows)
            for shard, (begin, end) in enumerate(pairwise(self.index.starts.tolist()))
            for first in range(begin, max(end, begin + 1), _WINDOW * batch_size)
            for rows in self._cut(first, min(first + _WINDOW * batch_size, end), batch_size)
        ]

    def _assigned(self) -> np.ndarray:
        """(N,) the bucket of each row, `_NO_BUCKET` where the size of the image cannot be read."""
        buckets = np.zeros(len(self.index), dtype=np.int32)
        if self.settings.shapes is not None:
            dimensions = self.index.dimensions(np.arange(len(self.index)))
            is_known = (dimensions > 0).all(axis=1)
            buckets[~is_known] = _NO_BUCKET
            buckets[is_known] = assign(dimensions[is_known], self.settings.shapes)
        return buckets

    def _cut(self, begin: int, end: int, batch_size: int) -> Iterator[np.ndarray]:
        """The rows from `begin` to `end` in batches of one bucket; one without rows if there are none."""
        if begin == end:
            yield np.arange(0)
        for bucket in np.unique(self._buckets[begin:end]):
            rows = begin + np.flatnonzero(self._buckets[begin:end] == bucket)
            for first in range(0, len(rows), batch_size):
                yield rows[first : first + batch_size]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> PictureBatch:
        if number >= len(self):
            raise IndexError(number)
        shard, rows = self._batches[number]
        return PictureBatch(shard, rows.tolist(), [self.picture(row) for row in rows.tolist()])

    def left_out(self, shard: int) -> list[str]:
        """What in a shard is no sample with an image, a line each."""
        return [damage.reason for damage in self.index.damage if damage.shard == self.index.names[shard]]

    def picture(self, row: int) -> Picture:
        """The sample of a row."""
        key, data = self.index.key(row), self.index.read(self.reader, row, IMAGE)
        members, claimed = self._members(row, key), self._claimed_size(row)
        if self._buckets[row] == _NO_BUCKET:
            return Picture(key, members, None, failure="its width and height cannot be read, so it is in no bucket")
        try:
            image = decode_rgb(data, self.settings.max_pixels)
        except _DAMAGE as error:
            return Picture(key, members, None, claimed, failure=reason_of(error))
        size, shape = Shape(*image.shape[-2:]), self.settings.all_shapes[self._buckets[row]]
        box = covering_box(size, shape)
        return Picture(key, members, resize(cut(image, box), shape, self.settings.interpolation), size, box)

    def _claimed_size(self, row: int) -> Shape:
        """What the head of an image says of its size, if that was asked."""
        if self.settings.shapes is None:
            return UNKNOWN_SIZE
        width, height = self.index.dimensions(np.array([row]))[0].tolist()
        return Shape(height, width)

    def _members(self, row: int, key: str) -> dict[str, bytes]:
        """What is copied: caption, metadata and map, as far as they are there."""
        sizes = self.index.places(np.array([row]))[1][0]
        members = {
            extension: self.index.read(self.reader, row, kind)
            for extension, kind in _MEMBERS.items()
            if sizes[kind] >= 0
        }
        if self.settings.segmentation is not None:
            shard = self.index.shard_of(row)
            if self._maps[0] != shard:
                self._maps = shard, self._places_of_maps(self.index.paths[shard], self.settings.segmentation)
            if (place := self._maps[1].get(key)) is not None:
                members[self.settings.segmentation] = self.reader.read(shard, *place)
        return members

    def _places_of_maps(self, path: str, extension: str) -> dict[str, list[int]]:
        """Offset and size of the map of each sample of a shard that has one; to have none is no damage."""
        found = scan(path, Contents((IMAGE,), extension), self.storage)
        return {
            key.decode(): place for key, place in zip(found.keys, found.places[:, SEGMENTATION].tolist(), strict=True)
        }


class MomentsEncoder:
    """Images to moments as a cache keeps them.

    Args:
        autoencoder: on its device, in evaluation mode.
        settings: of the cache.
    """

    def __init__(self, autoencoder: Autoencoder, settings: LatentSettings) -> None:
        self.autoencoder, self.settings = autoencoder, settings
        self.device = autoencoder.latent_std.device

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Moments of images (B, 3, H, W) in [-1, 1]: (B, V, k C, h, w) as they are stored, on the host.

        Raises:
            ValueError: if they are not finite, or too large for the type they are stored in.
        """
        versions = [images, images.flip(-1)] if self.settings.flip else [images]
        with self._precision():
            moments = torch.stack([self.autoencoder.moments(version.to(self.device)) for version in versions], dim=1)
        stored = moments.to(DTYPES[self.settings.dtype])
        if not bool(stored.isfinite().all()):
            raise ValueError(
                f"moments reach {float(moments.abs().max()):g}, which is not finite in --dtype {self.settings.dtype} "
                f"(encoded in --precision {self.settings.precision}); allowed are finite numbers; change --dtype to "
                "bfloat16 or float32, or --precision to float32"
            )
        return stored.cpu()

    def _precision(self) -> contextlib.AbstractContextManager[Any]:
        dtype = PRECISIONS[self.settings.precision]
        return contextlib.nullcontext() if dtype is None else torch.autocast(self.device.type, dtype)


class Entry(NamedTuple):
    """A sample of a cache: its source, its `.latent` member, and the moments (V, k C, h, w) in it, if it has any."""

    picture: Picture
    latent: bytes
    moments: Tensor | None


def entries(encoder: MomentsEncoder, pictures: Sequence[Picture], images: Tensor | None) -> list[Entry]:
    """The samples of a batch; `images` (B, 3, H, W) are those of the pictures that could be decoded, in their order."""
    moments = iter(() if images is None else encoder(images))

    def entry(picture: Picture) -> Entry:
        if picture.failure is not None:
            return Entry(picture, pack_failure(picture.failure, picture.source_size), None)
        own = next(moments)
        return Entry(picture, pack(own, picture.source_size, picture.box), own)

    return [entry(picture) for picture in pictures]


def in_order(numbered: Iterable[tuple[int, Entry]], first: int) -> Iterator[Entry]:
    """Entries with their rows, which come a little out of order, in the order of the rows, from `first` on."""
    waiting: dict[int, Entry] = {}
    for row, entry in numbered:
        waiting[row] = entry
        while first in waiting:
            yield waiting.pop(first)
            first += 1
