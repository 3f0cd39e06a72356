"""One `.latent` member: the moments of an image's posterior, and where in the source image they come from.

A header of 64 bytes, then (V, k C, h, w) little-endian numbers; version 0 is the image as it is, version 1 its mirror
image. A sample whose image could not be decoded has no versions, and the reason in the place of numbers. The header
names the size of the source image, so that an index knows it without the image (`ldm_train.data.scanning`).

Letters: V versions, C latent channels, k moments per channel, h and w size of the latents.
"""

import struct
from typing import NamedTuple

import torch
from torch import Tensor

from ldm_train.data.crops import Box, Shape

EXTENSION = "latent"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
UNKNOWN_SIZE = Shape(0, 0)

_MAGIC = b"LATENTS\1"
_HEADER = struct.Struct("<8s4H8I16x")  # magic; dtype, V, k C, unused; h, w, source size, crop box
HEADER_SIZE = _HEADER.size
_CODES = {name: code for code, name in enumerate(DTYPES, start=1)}
_NAMES = {code: name for name, code in _CODES.items()}
TOOL = "python tools/cache_latents.py --checkpoint AUTOENCODER --data SHARDS --image-size SIZE --output FOLDER"


class DamagedSampleError(ValueError):
    """The image of this sample could not be decoded when the cache was made."""


class Cached(NamedTuple):
    """What a `.latent` member holds.

    Attributes:
        moments: (V, k C, h, w), of the type they are stored in.
        source_size: height and width of the upright source image in pixels.
        box: what was cut out of it, in its pixels.
    """

    moments: Tensor
    source_size: Shape
    box: Box


def pack(moments: Tensor, source_size: Shape, box: Box) -> bytes:
    """A `.latent` member of moments (V, k C, h, w) on the host; see `Cached` for the rest."""
    name = str(moments.dtype).removeprefix("torch.")
    versions, channels, height, width = moments.shape
    header = _HEADER.pack(_MAGIC, _CODES[name], versions, channels, 0, height, width, *source_size, *box)
    return header + moments.contiguous().view(torch.uint8).numpy().tobytes()


def pack_failure(reason: str, source_size: Shape = UNKNOWN_SIZE) -> bytes:
    """The member of a sample that has no moments, why, and the size that the head of its image claims."""
    return _HEADER.pack(_MAGIC, *[0] * 6, *source_size, *[0] * 4) + reason.encode()


def unpack(data: bytes) -> Cached:
    """Read a `.latent` member.

    Raises:
        DamagedSampleError: if it says that there are no moments.
        ValueError: if it is no such member, or cut.
    """
    if len(data) < HEADER_SIZE or not data.startswith(_MAGIC):
        raise ValueError(
            f"{len(data)} bytes that are no cached latents; allowed are `.latent` members; make them by {TOOL}"
        )
    _, code, versions, channels, _, height, width, *place = _HEADER.unpack_from(data)
    if versions == 0:
        raise DamagedSampleError(data[HEADER_SIZE:].decode(errors="replace"))
    dtype, count = DTYPES[_NAMES[code]], versions * channels * height * width
    if len(data) != HEADER_SIZE + count * dtype.itemsize:
        raise ValueError(f"{len(data)} bytes where {count} numbers of {dtype} belong: the member is cut")
    values = torch.frombuffer(bytearray(data), dtype=dtype, offset=HEADER_SIZE)
    return Cached(values.view(versions, channels, height, width), Shape(*place[:2]), Box(*place[2:]))


def source_size(data: bytes) -> Shape | None:
    """Height and width of the upright source image, of the first `HEADER_SIZE` bytes of a member or more.

    Returns:
        The size, `UNKNOWN_SIZE` where not even the head of the image could be read; None: these bytes are no member.
    """
    if len(data) < HEADER_SIZE or not data.startswith(_MAGIC):
        return None
    return Shape(*_HEADER.unpack_from(data)[7:9])
