"""Which part of an image is shown: a box in its pixels, which is then resized to the shape that is wanted.

The largest box of the wanted aspect ratio covers the image's shorter extent, and slides along the other:

    b_h, b_w = H, H w / h   if the image is wider than the shape, W / H >= w / h,   else   W h / w, W

An Inception-style crop (Szegedy et al. 2015, "Going deeper with convolutions", section 6) draws a share s of the area
and an aspect ratio r instead, b_w b_h = s W H and b_w / b_h = r, so that objects come in many sizes and a little
stretched; log r is uniform, so that wide and tall are equally likely.

The numbers that place a box are functions of (seed, epoch, sample id) and are given by the caller: uniform on [0, 1),
the first for the place along the longer side, the second for the mirroring, which is not a crop's affair, more only
where a crop asks for them. A box is cut out before it is resized, so that no pixel outside of it is resized.

A JPEG can be decoded at 1/r of its size, r = 1, 2, 4 or 8, from the lowest frequencies of its blocks of 8 x 8. With a
reducing gap g it is, as far as the box keeps g times the pixels of the shape along both sides:

    r = max { r : b_h >= r g h  and  b_w >= r g w }

Letters: H and W height and width of the image, h and w those of the wanted shape, b_h and b_w those of the box.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

REDUCTIONS = (8, 4, 2)
PLACE, FLIP = 0, 1  # what the first two numbers of a sample are for


class Shape(NamedTuple):
    """Height and width in pixels."""

    height: int
    width: int


class Box(NamedTuple):
    """A part of an image, in its pixels."""

    top: int
    left: int
    height: int
    width: int


class Margins(NamedTuple):
    """What a crop cuts off above, to the left and to the right of the box, in pixels of the resized image."""

    top: int
    left: int
    right: int


class Crop(Protocol):
    """What the data set asks of a crop.

    Attributes:
        draws: how many numbers it reads, those for `PLACE` and `FLIP` included; 0 if the box is always the same.
    """

    draws: int

    def __call__(self, image: Shape, shape: Shape, draws: Sequence[float]) -> Box:
        """The box of an upright image that is resized to `shape`."""
        ...


class CenterCrop:
    """The largest box of the shape's aspect ratio, in the middle."""

    draws = 0

    def __call__(self, image: Shape, shape: Shape, draws: Sequence[float]) -> Box:
        """The box; reads no numbers."""
        return covering_box(image, shape, 0.5)


class RandomCrop:
    """The largest box of the shape's aspect ratio, anywhere along the longer side."""

    draws = 1

    def __call__(self, image: Shape, shape: Shape, draws: Sequence[float]) -> Box:
        """The box; reads the number for `PLACE`."""
        return covering_box(image, shape, draws[PLACE])


class RandomResizedCrop:
    """A box of a drawn area and aspect ratio, anywhere in the image.

    Nothing is drawn twice: where a ratio does not fit into the image at the drawn area, the range of ratios is cut to
    those that do; where none does, the nearest ratio is taken, and as much area as it allows.

    Args:
        area: least and largest share of the image's area.
        ratio: least and largest aspect ratio of the box, width by height, as a factor of the shape's: 1 stretches
            nothing.

    Raises:
        ValueError: if a range is out of order or impossible.
    """

    draws = 5  # place, mirroring, area, ratio, place along the other side

    def __init__(self, area: Sequence[float] = (0.08, 1.0), ratio: Sequence[float] = (3 / 4, 4 / 3)) -> None:
        _check_range("area", area, 1.0, "two numbers above 0 and up to 1, the smaller first")
        _check_range("ratio", ratio, math.inf, "two numbers above 0, the smaller first")
        self.area, self.ratio = (area[0], area[1]), (ratio[0], ratio[1])

    def __call__(self, image: Shape, shape: Shape, draws: Sequence[float]) -> Box:
        """The box; reads five numbers."""
        place, _, share_draw, ratio_draw, other_place = draws[: self.draws]
        pixels = _between(self.area, share_draw) * image.height * image.width
        upright = shape.width / shape.height
        low, high = self.ratio[0] * upright, self.ratio[1] * upright
        # b_w = sqrt(A r) <= W and b_h = sqrt(A / r) <= H bound the ratios that fit.
        fit_low, fit_high = pixels / image.height**2, image.width**2 / pixels
        low, high = (min(max(bound, fit_low), fit_high) for bound in (low, high))
        ratio = math.exp(_between((math.log(low), math.log(high)), ratio_draw))
        ratio = min(max(ratio, self.ratio[0] * upright), self.ratio[1] * upright)
        pixels = min(pixels, ratio * image.height**2, image.width**2 / ratio)
        width = _side(math.sqrt(pixels * ratio), image.width)
        height = _side(math.sqrt(pixels / ratio), image.height)
        along, across = (place, other_place) if image.width >= image.height else (other_place, place)
        return Box(_slide(across, image.height - height), _slide(along, image.width - width), height, width)


NAMED_CROPS: dict[str, Crop] = {"center": CenterCrop(), "random": RandomCrop()}


def crop_of(crop: str | Crop) -> Crop:
    """The crop that `data.crop` names, `center` or `random`, or is.

    Raises:
        ValueError: if it is another name.
    """
    if not isinstance(crop, str):
        return crop
    if crop not in NAMED_CROPS:
        raise ValueError(
            f"`data.crop` is {crop!r}; it must be one of {tuple(NAMED_CROPS)}, or a node with a `_target_` such as "
            "ldm_train.data.RandomResizedCrop."
        )
    return NAMED_CROPS[crop]


def covering_box(image: Shape, shape: Shape, place: float = 0.5) -> Box:
    """The largest box of the shape's aspect ratio; `place` in [0, 1) slides it along the other side, 0.5: the centre.

    Ratios are compared in whole numbers, so that a square box is exactly square.
    """
    if image.width * shape.height >= image.height * shape.width:
        width = _side(image.height * shape.width / shape.height, image.width)
        return Box(0, _slide(place, image.width - width), image.height, width)
    height = _side(image.width * shape.height / shape.width, image.height)
    return Box(_slide(place, image.height - height), 0, height, image.width)


def reduction(box: Box, shape: Shape, gap: float | None) -> int:
    """By how much an image may be decoded smaller: r of the module's equation, 1 without a gap.

    Args:
        box: what is shown of it, in its own pixels.
        shape: at which size.
        gap: g.
    """
    if gap is None:
        return 1
    fits = (r for r in REDUCTIONS if box.height >= r * gap * shape.height and box.width >= r * gap * shape.width)
    return next(fits, 1)


def reduced(box: Box, by: int, image: Shape) -> Box:
    """A box in the pixels of an image that was decoded `by` times as small, to the nearest of them.

    Args:
        box: in pixels of the whole image.
        by: r.
        image: the size of the smaller one, whose sides are rounded up.
    """
    if by == 1:
        return box
    top, left = (min(round(begin / by), side - 1) for begin, side in zip(box[:2], image, strict=True))
    bottom, right = round((box.top + box.height) / by), round((box.left + box.width) / by)
    return Box(top, left, max(min(bottom, image.height) - top, 1), max(min(right, image.width) - left, 1))


def margins(image: Shape, box: Box, shape: Shape) -> Margins:
    """What the box cuts off, in pixels of the image as it would be if all of it were resized like the box."""
    down, across = shape.height / box.height, shape.width / box.width
    right = image.width - box.left - box.width
    return Margins(round(box.top * down), round(box.left * across), round(right * across))


def _side(length: float, most: int) -> int:
    return min(max(round(length), 1), most)


def _slide(place: float, room: int) -> int:
    """One of the `room` + 1 places from 0, all equally likely."""
    return int(place * (room + 1))


def _between(bounds: Sequence[float], draw: float) -> float:
    return bounds[0] + (bounds[1] - bounds[0]) * draw


def _check_range(key: str, bounds: Sequence[float], most: float, allowed: str) -> None:
    if len(bounds) != 2 or not 0.0 < bounds[0] <= bounds[-1] <= most or not math.isfinite(bounds[-1]):
        raise ValueError(f"{key} is {list(bounds)}; allowed are {allowed}; change `data.crop.{key}`")
