"""From the bytes of an image file to pixels of a shape.

Decoding: libjpeg-turbo for plain JPEG files, which it can decode at a part of their size, torchvision for plain WebP,
Pillow for what needs care: EXIF orientation, transparency (over white), CMYK, 16 bits, palettes, animations (the first
frame). The header is judged before a pixel is decoded, so that a small file that claims to be huge costs nothing. A cut
file is refused, never completed with grey. Colour profiles are ignored: values are taken as sRGB. Resizing: torch's
antialiased uint8 kernel, several times as fast as Pillow's. The part that is shown is cut out before it is resized, so
that an image 1 pixel high does not become a mile long.
"""

import io
from collections.abc import Callable
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import simplejpeg
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

from ldm_train.data.crops import Box, Shape, covering_box

FORMATS = ("JPEG", "PNG", "WEBP")
_PLAIN_MODES = ("RGB", "L")
_ORIENTATION = 0x0112
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended and progressive Huffman-coded JPEG
_START_OF_SCAN = 0xDA
_RECORDS_WITH_CARE = {0xE1: b"Exif", 0xE2: b"MPF\0"}  # orientation; several pictures in one file
_WITHOUT_LENGTH = (0x00, 0x01, *range(0xD0, 0xDA), 0xFF)


class ImageTooLargeError(ValueError):
    """An image's header claims more pixels than allowed."""


class Decoded(NamedTuple):
    """A picture, and what it is of.

    Attributes:
        pixels: (3, H / r, W / r) uint8 sRGB, upright; sides are rounded up.
        size: H and W, those of the whole image.
        reduction: r.
    """

    pixels: Tensor
    size: Shape
    reduction: int


def decode_rgb(data: bytes, max_pixels: int = 1 << 26) -> Tensor:
    """Decode a JPEG, PNG or WebP file, told apart by its content and not by its name.

    Args:
        data: the file.
        max_pixels: the largest width x height that is decoded.

    Returns:
        (3, H, W) uint8 sRGB, upright.
    """
    return decode_reduced(data, lambda size: 1, max_pixels).pixels


def decode_reduced(data: bytes, reduction: Callable[[Shape], int], max_pixels: int = 1 << 26) -> Decoded:
    """Decode a file as `decode_rgb` does, but a plain JPEG at a part of its size.

    Args:
        data: the file.
        reduction: by which power of two up to 8 an image of some size may be smaller.
        max_pixels: the largest width x height that is decoded, before it is reduced.
    """
    if (size := plain_jpeg_size(data)) is not None:
        _require(size, max_pixels)
        upright = Shape(*reversed(size))
        by = reduction(upright)
        with suppress(ValueError):  # Pillow reads some kinds of JPEG that libjpeg-turbo's own interface refuses
            return Decoded(_decode_jpeg(data, upright, by), upright, by)
    whole = _decode_whole(data, max_pixels)
    return Decoded(whole, Shape(*whole.shape[-2:]), 1)


def _decode_whole(data: bytes, max_pixels: int) -> Tensor:
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        _require(image.size, max_pixels)
        if _is_plain(image):
            with suppress(RuntimeError, ValueError):
                pixels = _decode_jpeg(data) if image.format == "JPEG" else _decode_webp(data)
                if pixels.dtype == torch.uint8:  # 16-bit files come as uint16
                    return pixels
        return _decode_with_care(image)


def plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of a JPEG that shows what it stores, by its markers (ITU-T T.81, annex B).

    That is: 8 bits, grey or three components, no EXIF record that could turn it, one picture. None: something else, or
    unclear; Pillow, which takes several times as long to open a file, has to look.
    """
    if data[:2] != b"\xff\xd8":
        return None
    place, size = 2, None
    while place + 4 <= len(data) and data[place] == 0xFF:
        kind, length = data[place + 1], int.from_bytes(data[place + 2 : place + 4], "big")
        if kind == _START_OF_SCAN:
            return size
        record = _RECORDS_WITH_CARE.get(kind)
        if kind in _WITHOUT_LENGTH or length < 2 or (record is not None and data.startswith(record, place + 4)):
            return None
        if kind in _FRAMES:
            precision, components = data[place + 4 : place + 5], data[place + 9 : place + 10]
            if precision != b"\x08" or components not in (b"\x01", b"\x03"):
                return None
            height = int.from_bytes(data[place + 5 : place + 7], "big")
            size = int.from_bytes(data[place + 7 : place + 9], "big"), height
        place += 2 + length
    return None


def _require(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise ImageTooLargeError(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")


def _decode_jpeg(data: bytes, size: tuple[int, int] = (0, 0), by: int = 1) -> Tensor:
    """Decode a JPEG of a size at 1 / `by` of it; ValueError if it is damaged or of an uncommon kind."""
    height, width = (-(-side // by) for side in size)
    pixels = simplejpeg.decode_jpeg(
        data, fastdct=False, fastupsample=False, min_height=height, min_width=width, min_factor=by
    )
    return torch.from_numpy(pixels).permute(2, 0, 1)


def _decode_webp(data: bytes) -> Tensor:
    return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)


def _is_plain(image: Image.Image) -> bool:
    """Whether a fast decoder gives the picture a person sees; it ignores orientation, transparency and frames.

    No PNG is plain: torchvision's decoder crashes the process on damaged data instead of raising an error.
    """
    return (
        image.format != "PNG"
        and image.mode in _PLAIN_MODES
        and not image.has_transparency_data
        and not getattr(image, "is_animated", False)
        and ("exif" not in image.info or image.getexif().get(_ORIENTATION, 1) == 1)
    )


def _decode_with_care(image: Image.Image) -> Tensor:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip at 255
        image = Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8))
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer)
    rgb = image.convert("RGB")
    pixels = torch.frombuffer(bytearray(rgb.tobytes()), dtype=torch.uint8)
    return pixels.view(rgb.height, rgb.width, 3).permute(2, 0, 1)


def cut(image: Tensor, box: Box) -> Tensor:
    """The pixels (..., h, w) of an image or map (..., H, W) inside of a box, without a copy."""
    return image[..., box.top : box.top + box.height, box.left : box.left + box.width]


def resize(image: Tensor, shape: Shape, interpolation: str = "bicubic") -> Tensor:
    """An image (3, H, W) uint8 at (3, h, w), antialiased; `bicubic` or `bilinear`."""
    if image.shape[-2:] == shape:
        return image.contiguous()
    return F.interpolate(image[None], size=shape, mode=interpolation, antialias=True)[0].contiguous()


def resize_classes(classes: Tensor, shape: Shape) -> Tensor:
    """A map (H, W) of classes at (h, w): each pixel takes the class at its centre."""
    rows, columns = (
        (torch.arange(new) * 2 + 1) * old // (2 * new) for new, old in zip(shape, classes.shape, strict=True)
    )
    return classes[rows[:, None], columns]


def center_square(image: Tensor, size: int) -> Tensor:
    """The largest square in the middle of an image (3, H, W) uint8 at (3, size, size)."""
    shape = Shape(size, size)
    return resize(cut(image, covering_box(Shape(*image.shape[-2:]), shape)), shape)


def to_signed_unit(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]: (2 x - 255) / 255, the same bits on every device."""
    # Exact up to the one rounding of the product. A division would be one by the reciprocal on some devices.
    return images.float().mul_(2.0).sub_(255.0).mul_(1.0 / 255.0)
