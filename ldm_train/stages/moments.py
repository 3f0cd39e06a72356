"""Where stage 2 gets the posterior's moments of an image from: the encoder, or what it said before.

The encoder is frozen, so an image has the same moments in every epoch; only the draw from the posterior is new. For a
data set that fits into memory and is never augmented the encoder then runs once an image instead of once a step; for a
large one it runs once and for all, and its moments come with the batches (`ldm_train.data.latents`).
"""

from hashlib import blake2b
from typing import Protocol

import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch, LatentFacts
from ldm_train.checkpoint import encoder_digest
from ldm_train.nn import Autoencoder, FirstStage


class Moments(Protocol):
    """The contract: the moments of a batch's images, (B, k C, h, w), as `Autoencoder.moments` gives them."""

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """Moments of a batch's images."""
        ...

    def check(self, autoencoder: FirstStage, facts: LatentFacts | None) -> None:
        """Refuse, with ValueError, data that do not fit; `facts` are of cached latents, `None` of images."""
        ...


class EncodedMoments:
    """Encodes each batch; right for every data set of images."""

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """Run the encoder."""
        return autoencoder.moments(batch["image"])

    def check(self, autoencoder: FirstStage, facts: LatentFacts | None) -> None:
        """Images are needed."""
        refuse_cached(facts, "set `stage.moments._target_` to ldm_train.stages.CachedMoments")


class RememberedMoments:
    """Encodes an image when its pixels are first met and remembers the result, on the host.

    For small data sets: each step waits for its device twice, and its images travel to the host and back.

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

    def check(self, autoencoder: FirstStage, facts: LatentFacts | None) -> None:
        """Images are needed."""
        refuse_cached(facts, "set `stage.moments._target_` to ldm_train.stages.CachedMoments")


class CachedMoments:
    """Takes the moments that the batches of a latent cache bring along; the encoder never runs."""

    def __call__(self, autoencoder: Autoencoder, batch: ImageTextBatch) -> Tensor:
        """The batch's moments, in float32."""
        return batch["moments"].float()

    def check(self, autoencoder: FirstStage, facts: LatentFacts | None) -> None:
        """Moments are needed, of this very encoder."""
        if facts is None:
            raise ValueError(
                "`stage.moments` takes cached latents, and the data are images; allowed are `data=latents` with the "
                "shards that tools/cache_latents.py writes; change `data`, or set `stage.moments._target_` to "
                "ldm_train.stages.EncodedMoments"
            )
        own = encoder_digest(autoencoder)  # type: ignore[arg-type]  # every first stage is a module
        if own != facts.encoder:
            raise ValueError(
                f"the latents in {facts.folder} come from another encoder (sha256 {facts.encoder[:12]}) than "
                f"`stage.autoencoder.checkpoint` has ({own[:12]}); allowed is the same one; change "
                "`stage.autoencoder.checkpoint` or `data.shards`, or encode with this one: python "
                "tools/cache_latents.py --checkpoint AUTOENCODER --data SHARDS --image-size SIZE --output FOLDER"
            )
        ours = (
            autoencoder.downsampling_factor,
            autoencoder.latent_channels,
            autoencoder.regularizer.moments_per_channel,
        )
        theirs = (facts.factor, facts.latent_channels, facts.moments_per_channel)
        if ours != theirs:
            raise ValueError(
                f"the latents in {facts.folder} have (f, C, k) = {theirs}; allowed is what `autoencoder` makes, "
                f"{ours}; change `autoencoder` or `data.shards`"
            )


def refuse_cached(facts: LatentFacts | None, remedy: str) -> None:
    """Refuse, with ValueError, cached latents where the pixels of images are needed."""
    if facts is not None:
        raise ValueError(
            f"the data are the cached latents in {facts.folder}, and images are needed; allowed are shards of images, "
            f"such as `data=webdataset`; change `data`, or {remedy}"
        )
