"""Where stage 2 gets the posterior's moments of an image from: the encoder, or a memory of what it said before.

The encoder is frozen, so an image that is never augmented has the same moments in every epoch; only the draw from the
posterior is new. For a data set that fits into memory the encoder then runs once an image instead of once a step.
"""

from typing import Protocol

import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.nn import Autoencoder

_TOLERANCE = 1e-6


class Moments(Protocol):
    """The contract: the moments of a batch's images, (B, k C, h, w), as `Autoencoder.moments` gives them."""

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """Moments of `batch["image"]`."""
        ...


class EncodedMoments:
    """Encodes each batch; right for every data set."""

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """Run the encoder."""
        return autoencoder.moments(batch["image"])


class RememberedMoments:
    """Encodes an image when its key is first met and remembers the result, on the host.

    An image that differs from the one remembered under its key, as augmentation makes it, is refused.
    """

    def __init__(self) -> None:
        self._moments: dict[str, Tensor] = {}
        self._sums: dict[str, float] = {}  # of each image, weighted by position: flips and shifts change it

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """Run the encoder on what is new; look the rest up."""
        image, keys = batch["image"], batch["key"]
        sums = _weighted_sum(image).tolist()
        new = [i for i, key in enumerate(keys) if key not in self._moments]
        if new:
            for i, moments in zip(new, autoencoder.moments(image[new]).float().cpu(), strict=True):
                self._moments[keys[i]], self._sums[keys[i]] = moments, sums[i]
        for key, found in zip(keys, sums, strict=True):
            if abs(found - self._sums[key]) > _TOLERANCE:
                raise ValueError(
                    f"image {key} is not what it was in an earlier epoch; remembered moments allow no augmentation; "
                    "set `data.crop=center` and `data.flip=false`, or `stage.moments._target_` to "
                    "ldm_train.stages.EncodedMoments"
                )
        return torch.stack([self._moments[key] for key in keys]).to(image.device)


def _weighted_sum(image: Tensor) -> Tensor:
    """(B, C, H, W) to (B,) float64; the mean over the image of its values times their row and column."""
    rows, columns = (torch.linspace(0, 1, size, dtype=torch.float64, device=image.device) for size in image.shape[-2:])
    return (image.double() * (2 * rows[:, None] + columns)).mean(dim=(1, 2, 3))
