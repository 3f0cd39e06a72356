"""From a network's images to the bytes that metrics and picture files are made of, in one place and one way.

    byte = clamp(round(127.5 (x + 1)), 0, 255),        x in [-1, 1]

Truncation instead of rounding darkens every image by half a level, and a plain cast wraps 256 round to 0; both change a
Frechet distance.
"""

import torch
from torch import Tensor


def to_uint8(images: Tensor) -> Tensor:
    """Bytes of images (B, 3, H, W) that are float in [-1, 1], rounded and clamped; bytes are returned as they are.

    Raises:
        ValueError: the type is neither, or a value is not a finite number.
    """
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images of type {images.dtype} found; allowed are uint8 in [0, 255] and floats in [-1, 1].")
    if not bool(images.isfinite().all()):
        raise ValueError(
            "images with non-finite values found; allowed are floats in [-1, 1]: the sampler diverged, see "
            "`sampler`, `guidance.scale` and `trainer.precision`."
        )
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8)
