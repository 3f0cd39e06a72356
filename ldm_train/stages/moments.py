"""Where stage 2 gets the posterior's moments of an image from: the encoder, or a memory of what it said before.

The encoder is frozen, so an image that is never augmented has the same moments in every epoch; only the draw from the
posterior is new. For a data set that fits into memory the encoder then runs once an image instead of once a step.
"""

from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.nn import Autoencoder


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
    """Encodes an image when its pixels are first met and remembers the result, on the host.

    Args:
        max_images: images to remember at most.
    """

    def __init__(self, max_images: int = 50_000) -> None:
        self.max_images = max_images
        self._moments: dict[bytes, Tensor] = {}

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """Run the encoder on what is new; look the rest up.

        Raises:
            ValueError: if there are more different images than may be remembered.
        """
        image = batch["image"]
        keys = [blake2b(pixels.numpy().tobytes(), digest_size=16).digest() for pixels in image.cpu()]
        for i, key in enumerate(keys):
            if key not in self._moments:
                # One at a time: a convolution's rounding depends on how many images it is given, and after a resume an
                # image is met again in other company than before.
                self._moments[key] = autoencoder.moments(image[i : i + 1])[0].float().cpu()
        if len(self._moments) > self.max_images:
            raise ValueError(
                f"more than {self.max_images} different images to remember; allowed are small data sets without "
                "augmentation (`data.crop=center`, `data.flip=false`); set `stage.moments._target_` to "
                "ldm_train.stages.EncodedMoments, or raise `stage.moments.max_images`"
            )
        return torch.stack([self._moments[key] for key in keys]).to(image.device)
