"""From the bytes of an image file to a square of pixels.

Decoding: torchvision where the file is plain, Pillow for what needs care: EXIF orientation, transparency (over white),
CMYK, 16 bits, palettes, animations (the first frame). The header is judged before a pixel is decoded, so that a small
file that claims to be huge costs nothing. Resizing: torch's antialiased uint8 kernel, several times as fast as
Pillow's. The square is cut out before it is resized, so that an image 1 pixel high does not become a mile long.
"""

import io
from contextlib import suppress

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image

FORMATS = ("JPEG", "PNG", "WEBP")
_PLAIN_MODES = ("RGB", "L")
_ORIENTATION = 0x0112


class ImageTooLargeError(ValueError):
    """An image's header claims more pixels than allowed."""


def decode_rgb(data: bytes, max_pixels: int = 1 << 26) -> Tensor:
    """Decode a JPEG, PNG or WebP file, told apart by its content and not by its name.

    Args:
        data: the file.
        max_pixels: the largest width x height that is decoded.

    Returns:
        (3, H, W) uint8 sRGB, upright.
    """
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:
        width, height = image.size
        if width * height > max_pixels:
            raise ImageTooLargeError(f"{width} x {height} pixels are more than data.max_pixels={max_pixels}")
        if _is_plain(image):
            with suppress(RuntimeError):  # Pillow reads some kinds of JPEG that torchvision refuses
                pixels = decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), mode=ImageReadMode.RGB)
                if pixels.dtype == torch.uint8:  # 16-bit files come as uint16
                    return pixels
        return _decode_with_care(image)


def _is_plain(image: Image.Image) -> bool:
    """Whether torchvision gives the picture a person sees; it ignores orientation, transparency and frames.

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


def crop_square(image: Tensor, place: float = 0.5) -> Tensor:
    """The largest square of (C, H, W); `place` in [0, 1) slides it along the longer side, 0.5 is the centre."""
    height, width = image.shape[-2:]
    side = min(height, width)
    begin = int(place * (max(height, width) - side + 1))
    return image[..., begin : begin + side, :] if height > width else image[..., begin : begin + side]


def resize(image: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """A square (3, side, side) uint8 image at (3, size, size), antialiased; `bicubic` or `bilinear`."""
    if image.shape[-1] == size:
        return image.contiguous()
    return F.interpolate(image[None], size=(size, size), mode=interpolation, antialias=True)[0].contiguous()


def resize_classes(classes: Tensor, size: int) -> Tensor:
    """A square map (side, side) of classes at (size, size): each pixel takes the class at its centre."""
    centres = (torch.arange(size) * 2 + 1) * classes.shape[-1] // (2 * size)
    return classes[centres[:, None], centres]


def flip_where(images: Tensor, flip: Tensor) -> Tensor:
    """Mirror those of B images or maps (B, ..., H, W) left to right for which `flip` (B,) is true."""
    return torch.where(flip.reshape(-1, *[1] * (images.dim() - 1)), images.flip(-1), images)


def to_signed_unit(images: Tensor) -> Tensor:
    """uint8 in [0, 255] to float32 in [-1, 1]: x / 127.5 - 1."""
    # NumPy stays on one thread: torch's would queue behind those that train.
    values = np.divide(images.numpy(), np.float32(127.5), dtype=np.float32)
    values -= 1.0
    return torch.from_numpy(values)
