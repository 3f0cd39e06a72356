"""The autoencoder's loss: how far the reconstruction is off, and how far the latents are from their prior.

    L = sum over pixels of |x - x_hat|^p  +  kl_weight * regularizer loss,   p = 1 or 2        (per image, then mean)

The published models sum over pixels and over latents, so their `kl_weight` of 1e-6 is relative to a sum over 196,608
values at 256 px. `reduction: mean` divides both sums by their number of values; `equivalent_kl_weight` converts.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm_train.nn.regularizer import Regularized


class AutoencoderLossTerms(NamedTuple):
    """The total and its terms, scalars."""

    total: Tensor
    pixel: Tensor
    regularizer: Tensor


class AutoencoderLoss(nn.Module):
    """Pixel loss plus weighted regularizer loss.

    Args:
        pixel_norm: 1 for absolute, 2 for square errors.
        kl_weight: weight of the regularizer's loss, relative to `reduction`.
        reduction: `sum` over pixels and latents of an image as published, or `mean`.
    """

    def __init__(
        self, pixel_norm: Literal[1, 2] = 1, kl_weight: float = 1e-6, reduction: Literal["sum", "mean"] = "sum"
    ) -> None:
        super().__init__()
        if pixel_norm not in (1, 2):
            raise ValueError(f"pixel_norm is {pixel_norm}; allowed are 1 and 2; change `stage.loss.pixel_norm`")
        if reduction not in ("sum", "mean"):
            raise ValueError(f"reduction is {reduction!r}; allowed are sum and mean; change `stage.loss.reduction`")
        self.pixel_norm = pixel_norm
        self.kl_weight = kl_weight
        self.reduction = reduction

    def forward(self, x: Tensor, reconstruction: Tensor, regularized: Regularized) -> AutoencoderLossTerms:
        """Compare images (B, 3, H, W) with their reconstructions."""
        error = torch.abs(x - reconstruction.float()) ** self.pixel_norm
        pixel, regularizer = error.flatten(1).sum(1).mean(), regularized.loss.float().mean()
        if self.reduction == "mean":
            pixel, regularizer = pixel / x[0].numel(), regularizer / regularized.z[0].numel()
        return AutoencoderLossTerms(pixel + self.kl_weight * regularizer, pixel, regularizer)

    def equivalent_kl_weight(self, pixels: int, latents: int) -> float:
        """The weight that means the same under the other reduction, for so many values per image."""
        ratio = latents / pixels
        return self.kl_weight * (ratio if self.reduction == "sum" else 1 / ratio)
