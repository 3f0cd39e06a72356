"""From source shards to `.latent` members: the same pixels that a run on the images would see, encoded.

Batches are cut within a shard, from its beginning, so that what a shard becomes depends on that shard alone. A sample
whose image cannot be decoded is no reason to stop: it keeps its place, with the reason (`ldm_train.data.latents`).

Letters: B batch, V versions, C latent channels, k moments per channel, h and w size of the latents.
"""

import contextlib
import struct
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ldm_train.data.crops import Box, Shape, covering_box
from ldm_train.data.index import CAPTION, IMAGE, METADATA, ShardIndex, build_index
from ldm_train.data.latents import DTYPES, LatentSettings, pack, pack_failure
from ldm_train.data.quarantine import reason_of
from ldm_train.data.shards import ShardReader
from ldm_train.data.transforms import cut, decode_rgb, resize, to_signed_unit
from ldm_train.nn import Autoencoder

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}
_MEMBERS = {"txt": CAPTION, "json": METADATA}
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
        source_size: height and width of the image in the file.
        box: what was cut out of it.
        failure: why there are no pixels; `None` if there are.
    """

    key: str
    members: dict[str, bytes]
    pixels: Tensor | None
    source_size: Shape = Shape(0, 0)
    box: Box = Box(0, 0, 0, 0)
    failure: str | None = None


class PictureBatch(NamedTuple):
    """Neighbouring samples of one shard, `shard` being its number."""

    shard: int
    pictures: list[Picture]

    def images(self) -> Tensor | None:
        """Those that could be decoded: (B, 3, H, W) float32 in [-1, 1]; `None` if there are none."""
        pixels = [picture.pixels for picture in self.pictures if picture.pixels is not None]
        return to_signed_unit(torch.stack(pixels)) if pixels else None


class SourceImages(Dataset[PictureBatch]):
    """All samples with an image, as squares, in batches within shards; an empty shard gives an empty batch.

    Args:
        paths: the shards.
        settings: how the images are made.
        batch_size: B.
        max_pixels: the largest image that is decoded.
    """

    def __init__(self, paths: Sequence[str], settings: LatentSettings, batch_size: int, max_pixels: int) -> None:
        # Whatever else a run asks of a sample, a caption or metadata, it asks again of the cache.
        self.index: ShardIndex = build_index(paths, (IMAGE,))
        self.settings, self.max_pixels = settings, max_pixels
        self.shape = Shape(settings.image_size, settings.image_size)
        self.reader = ShardReader(self.index.paths)
        starts = self.index.starts.tolist()
        self._batches = [
            (shard, range(first, min(first + batch_size, end)))
            for shard, (begin, end) in enumerate(pairwise(starts))
            for first in range(begin, max(end, begin + 1), batch_size)
        ]

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, number: int) -> PictureBatch:
        if number >= len(self):
            raise IndexError(number)
        shard, rows = self._batches[number]
        return PictureBatch(shard, [self.picture(row) for row in rows])

    def left_out(self, shard: int) -> list[str]:
        """What in a shard is no sample with an image, a line each."""
        return [damage.reason for damage in self.index.damage if damage.shard == self.index.names[shard]]

    def picture(self, row: int) -> Picture:
        """The sample of a row."""
        sizes = self.index.places(np.array([row]))[1][0]
        members = {
            extension: self.index.read(self.reader, row, kind)
            for extension, kind in _MEMBERS.items()
            if sizes[kind] >= 0
        }
        key, data = self.index.key(row), self.index.read(self.reader, row, IMAGE)
        try:
            image = decode_rgb(data, self.max_pixels)
        except _DAMAGE as error:
            return Picture(key, members, None, failure=reason_of(error))
        size = Shape(*image.shape[-2:])
        box = covering_box(size, self.shape)
        pixels = resize(cut(image, box), self.shape, self.settings.interpolation)
        return Picture(key, members, pixels, size, box)


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
            return Entry(picture, pack_failure(picture.failure), None)
        own = next(moments)
        return Entry(picture, pack(own, picture.source_size, picture.box), own)

    return [entry(picture) for picture in pictures]
