"""The first stage as the second one sees it: images to normalised latents and back.

    x_0 = normalise(draw(moments(image))),   image = decode(x_0)

`Autoencoder` is one. `Pixels` is the one that does nothing, x_0 = image: for diffusion models of pixels (Ho et al.
2020), whose likelihood can be had in bits per dimension, and which the same code then trains.

Letters: B batch, C latent channels, H and W image height and width, h and w those of the latents.
"""

from typing import Protocol

import torch
from torch import Tensor, nn

from ldm_train.nn.regularizer import Regularized, Regularizer


class FirstStage(Protocol):
    """What stage 2, its conditioners and its callbacks ask of a first stage; see `Autoencoder` for the methods."""

    latent_channels: int
    downsampling_factor: int
    regularizer: Regularizer

    def moments(self, x: Tensor) -> Tensor:
        """What the regularizer reads, of images (B, 3, H, W)."""
        ...

    def normalise(self, z: Tensor) -> Tensor:
        """Raw latents to zero mean and unit variance."""
        ...

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) in [-1, 1] to normalised latents (B, C, h, w)."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """Normalised latents (B, C, h, w) to images (B, 3, H, W)."""
        ...

    def require_calibration(self) -> None:
        """Refuse latents of unknown scale."""
        ...


class Exact(Regularizer):
    """The regularizer of latents that are known exactly and cost nothing: moments = z."""

    moments_per_channel = 1

    def __init__(self) -> None:
        super().__init__(weight=0.0, reduction="mean")

    def forward(self, moments: Tensor, noise: Tensor | None = None) -> Regularized:
        """`moments` (B, C, h, w) as they are, at no loss."""
        return Regularized(moments, moments.new_zeros(len(moments)), self.reduction, {})

    def mode(self, moments: Tensor) -> Tensor:
        """The latents."""
        return moments

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """The latents; nothing is drawn."""
        return moments

    def variance(self, moments: Tensor) -> Tensor:
        """None: (B, C, h, w) zeros."""
        return torch.zeros_like(moments)

    def project(self, z: Tensor) -> Tensor:
        """The latents as they are."""
        return z


class Pixels(nn.Module):
    """Pixels as latents: f = 1, as many channels as the image has.

    Args:
        latent_channels: channels of an image.
    """

    downsampling_factor = 1

    def __init__(self, latent_channels: int = 3) -> None:
        super().__init__()
        self.latent_channels = latent_channels
        self.regularizer = Exact()

    def moments(self, x: Tensor) -> Tensor:
        """The image itself: (B, 3, H, W).

        Raises:
            ValueError: if it is of bytes.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"images are of type {x.dtype}; allowed are floating-point numbers in [-1, 1]; change `data` to one "
                "that gives them"
            )
        return x

    def normalise(self, z: Tensor) -> Tensor:
        """Images lie in [-1, 1] and stay there."""
        return z

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The image itself."""
        return x

    def decode(self, latents: Tensor) -> Tensor:
        """The image itself, unclamped, in float32."""
        return latents.float()

    def require_calibration(self) -> None:
        """Nothing to measure."""
