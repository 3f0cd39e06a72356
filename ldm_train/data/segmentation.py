"""Segmentation maps: a class for each pixel of an image, for models that are conditioned on them.

A map is either read from a member of the sample, a single-channel PNG beside the image whose values are the classes, or
made of the image's pixels. It is cropped and mirrored with its image, and made smaller without mixing classes. `VOID`
stands for pixels of no class.

Letters: H and W height and width.
"""

import io
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ldm_train.data.quarantine import SegmentationError

VOID = -1
_MODES = ("1", "L", "P", "I", "I;16")
_MAX_CLASSES = 1 << 15  # maps are kept as int16

# sRGB bytes of typical examples, in the order in which languages acquire the terms.
_COLOUR_TERMS = {
    "black": (0, 0, 0),
    "white": (255, 255, 255),
    "red": (214, 30, 40),
    "green": (40, 150, 60),
    "yellow": (255, 214, 30),
    "blue": (30, 100, 210),
    "brown": (120, 72, 40),
    "purple": (128, 50, 160),
    "pink": (245, 150, 180),
    "orange": (245, 130, 30),
    "grey": (128, 128, 128),
}
_WEIGHTS = torch.tensor([0.5, 1.0, 1.0])
_LINEAR_TO_LMS = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
_LMS_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)


class PixelClassifier(Protocol):
    """A map that is made of the pixels: it needs no labels."""

    num_classes: int

    def __call__(self, pixels: Tensor) -> Tensor:
        """The classes (H, W) int16 of an image (3, H, W) uint8, mirrored where the image is mirrored."""
        ...


class SegmentationMember:
    """The map is a member of the sample: a PNG of one channel, grey or palette, as large as the upright image.

    Args:
        num_classes: classes are numbered from 0 to `num_classes` - 1.
        extension: what follows the sample's key in the member's name: `000000001.seg.png` holds the map of 000000001.
        void: the value that marks pixels of no class, often 255; `None`: there is none.

    Raises:
        ValueError: if there are no classes or too many, or the extension is another member's.
    """

    def __init__(self, num_classes: int, extension: str = "seg.png", void: int | None = None) -> None:
        if not 1 <= num_classes < _MAX_CLASSES:
            raise ValueError(
                f"num_classes is {num_classes}; allowed are 1 to {_MAX_CLASSES - 1}; change "
                "`data.segmentation.num_classes`"
            )
        if not extension.endswith(".png") or extension.startswith("."):
            raise ValueError(
                f"extension is {extension!r}; allowed are two-part names of PNG files such as seg.png, for .png alone "
                "is the image; change `data.segmentation.extension`"
            )
        self.num_classes, self.extension, self.void = num_classes, extension.lower(), void

    def decode(self, data: bytes, height: int, width: int) -> Tensor:
        """The classes of an image.

        Args:
            data: the PNG file.
            height: the image's H.
            width: the image's W.

        Returns:
            (H, W) int16.

        Raises:
            SegmentationError: if the file is of another size or kind, or holds a value that is no class.
        """
        with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
            if image.size != (width, height):
                raise SegmentationError(
                    f"the map is {image.width} x {image.height} where the image is {width} x {height}; both must be of "
                    "one size; mend the `data.segmentation.extension` members"
                )
            if image.mode not in _MODES:
                raise SegmentationError(
                    f"the map has the channels {image.mode}; allowed is a PNG of one channel, grey or palette, whose "
                    "values are the classes; mend the `data.segmentation.extension` members"
                )
            values = np.asarray(image).astype(np.int32)
        is_void = np.zeros_like(values, dtype=bool) if self.void is None else values == self.void
        largest = int(values.max(where=~is_void, initial=0))
        if largest >= self.num_classes:
            raise SegmentationError(
                f"the map holds the value {largest}; allowed are 0 to {self.num_classes - 1}; change "
                "`data.segmentation.num_classes`, or name it as `data.segmentation.void`"
            )
        return torch.from_numpy(np.where(is_void, VOID, values).astype(np.int16))


class ColourRegions:
    """The map says which basic colour term names each pixel: the nearest of typical examples in Oklab.

    The eleven terms of Berlin and Kay, "Basic Color Terms" (1969): black, white, red, green, yellow, blue, brown,
    purple, pink, orange, grey. Distances are Euclidean in Oklab (Ottosson, "A perceptual color space for image
    processing", 2020) with lightness counting half: dark blue is blue rather than black, pale grey is not pink. So data
    without labels give maps that are real: parts of a drawing have a colour each.

    Args:
        num_classes: how many of the terms, the first ones.

    Raises:
        ValueError: if there are not so many terms.
    """

    def __init__(self, num_classes: int = len(_COLOUR_TERMS)) -> None:
        if not 2 <= num_classes <= len(_COLOUR_TERMS):
            raise ValueError(
                f"num_classes is {num_classes}; allowed are 2 to {len(_COLOUR_TERMS)} colour terms; change "
                "`data.segmentation.num_classes`"
            )
        self.num_classes = num_classes
        self.terms = tuple(_COLOUR_TERMS)[:num_classes]
        examples = torch.tensor([_COLOUR_TERMS[term] for term in self.terms], dtype=torch.uint8)
        self._examples = oklab(examples) * _WEIGHTS  # (K, 3)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The classes (H, W) int16 of an image (3, H, W) uint8 sRGB."""
        colours = oklab(pixels.permute(1, 2, 0)) * _WEIGHTS  # (H, W, 3)
        # |a - b|^2 = |a|^2 - 2 a b + |b|^2, of which the first term is the same for all b.
        distance = self._examples.square().sum(-1) - 2.0 * colours @ self._examples.T  # (H, W, K)
        return distance.argmin(-1).to(torch.int16)


def oklab(rgb: Tensor) -> Tensor:
    """Oklab coordinates (..., 3) float32 (lightness, green to red, blue to yellow) of sRGB bytes (..., 3) uint8."""
    encoded = rgb.to(torch.float32) / 255.0
    linear = torch.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)
    lms = linear @ _matrix(_LINEAR_TO_LMS).T
    return lms ** (1.0 / 3.0) @ _matrix(_LMS_TO_OKLAB).T


def _matrix(rows: Sequence[Sequence[float]]) -> Tensor:
    return torch.tensor(rows, dtype=torch.float32)
