"""Aspect buckets: a few shapes of nearly one area, so that an image is cut as little as its aspect ratio allows.

Every side is a multiple of a step, which the networks need: the autoencoder's downsampling factor times that of the
U-Net. For each height h the width is the largest multiple with h w <= size^2; transposed shapes complete the set:

    w(h) = step floor(size^2 / (h step)),   h <= size,   w / h <= max_ratio

An image belongs to the bucket whose ratio is nearest, | log(W / H) - log(w / h) | least; it is resized to cover the
shape and what overhangs is cut (Podell et al. 2023, "SDXL", section 2.3; NovelAI 2022). A batch is of one bucket, and
the set is fixed for a run, so that a compiled network is compiled once for each shape.

Letters: H and W height and width of an image, h and w of a bucket, N images, K buckets.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from ldm_train.data.crops import Shape

_CHUNK = 1 << 20  # rows whose ratios are held at a time


def bucket_shapes(image_size: int, step: int, max_ratio: float = 2.0) -> list[Shape]:
    """The shapes, from the tallest to the widest; the square is among them.

    Args:
        image_size: side of the square; no shape has more pixels.
        step: every side is a multiple of it.
        max_ratio: the longer side by the shorter one, at most.

    Returns:
        K shapes, an odd number, K = 1 where `max_ratio` leaves the square alone.

    Raises:
        ValueError: if an argument is out of its range, or the step does not divide the size.
    """
    if step < 1 or image_size < step or image_size % step:
        raise ValueError(
            f"image_size is {image_size} and the buckets' step {step}; allowed are sizes that are multiples of the "
            "step; change `image_size` or `data.buckets.step`"
        )
    if not max_ratio >= 1.0:  # NaN is neither
        raise ValueError(
            f"max_ratio is {max_ratio}; allowed are numbers from 1, 1 for squares alone; change "
            "`data.buckets.max_ratio`"
        )
    height_of: dict[int, int] = {}
    for height in range(step, image_size + 1, step):
        width = image_size**2 // (height * step) * step
        if width <= max_ratio * height:
            height_of[width] = height  # of two heights for one width the larger one, which comes later, has more area
    wide = [Shape(height, width) for width, height in height_of.items()]
    tall = [Shape(width, height) for height, width in wide]
    return sorted({*wide, *tall}, key=lambda shape: shape.width / shape.height)


def assign(dimensions: np.ndarray, shapes: Sequence[Shape]) -> np.ndarray:
    """The bucket of each image: the nearest by the logarithm of the aspect ratio, the taller one of two as near.

    Args:
        dimensions: (N, 2) int32 width and height, those of the stored image. EXIF orientation may swap them when it
            is decoded; such an image is cut more than it need be, but comes in its bucket's shape all the same.
        shapes: K shapes, from the tallest to the widest.

    Returns:
        (N,) uint8 or uint16 numbers of shapes.

    Raises:
        ValueError: if the size of an image is not known.
    """
    ratios = np.log([shape.width / shape.height for shape in shapes])
    borders = (ratios[1:] + ratios[:-1]) / 2
    buckets = np.empty(len(dimensions), dtype=np.min_scalar_type(len(shapes)))
    unknown, first = 0, -1
    for begin in range(0, len(dimensions), _CHUNK):
        width, height = np.asarray(dimensions[begin : begin + _CHUNK], dtype=np.float64).T
        is_known = (width > 0) & (height > 0)
        if not is_known.all():
            first = begin + int(np.argmin(is_known)) if first < 0 else first
            unknown += int((~is_known).sum())
            continue
        buckets[begin : begin + _CHUNK] = np.searchsorted(borders, np.log(width / height), side="left")
    if unknown:
        raise ValueError(
            f"the size of {unknown} of {len(dimensions)} images is not known, row {first} being the first; aspect "
            "buckets need the width and height of every image; leave such samples out by `data.filters`, index the "
            "shards again, or set `data.buckets` to null"
        )
    return buckets


@dataclass(frozen=True)
class AspectBuckets:
    """How images are spread over shapes, as `data.buckets` says.

    Attributes:
        step: every side is a multiple of it.
        max_ratio: the longer side by the shorter one, at most.
    """

    step: int = 64
    max_ratio: float = 2.0

    def shapes(self, image_size: int) -> list[Shape]:
        """The shapes for images of about `image_size`^2 pixels, see `bucket_shapes`."""
        return bucket_shapes(image_size, self.step, self.max_ratio)


class ShapeOfRow:
    """The shape of each row of an index.

    Args:
        shapes: K shapes.
        buckets: (N,) numbers of shapes.
    """

    def __init__(self, shapes: Sequence[Shape], buckets: np.ndarray) -> None:
        self.shapes, self.buckets = list(shapes), buckets

    def __call__(self, row: int) -> Shape:
        """The shape in which a row is delivered."""
        return self.shapes[self.buckets[row]]


def next_alike(shape_of: Callable[[int], Shape], row: int, start: int, rows: int) -> int:
    """The first row of the shape of `row` from `start` on, around the end of `rows` rows.

    What takes the place of a damaged sample comes in the shape that its bucket has: no image is cut more than it need
    be, and one of which only the latents in that shape are left can stand in.
    """
    shape = shape_of(row)
    return next(candidate % rows for candidate in range(start, start + rows) if shape_of(candidate % rows) == shape)
