"""The autoencoder's loss: how far is the reconstruction off, how far are the latents from their prior, who sees it?

Rombach et al. 2022, eq. 25; Esser et al. 2021, eq. 6:

    L = R(|x - x_hat|^p + LPIPS weight * LPIPS(x, x_hat)) + regularizer + generator term + discriminator term

with p = 1 or 2 and R the sum over an image's pixel values, or their mean, as the regularizer's weight asks for; then
the mean over images. LPIPS is one number an image, added to each of its pixel values as in the published models. The
discriminator term trains the discriminator alone and the others the autoencoder alone, see `ldm_train.nn.adversarial`,
so one backward pass gives each its own gradients.

Letters: B batch, H and W height and width.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from ldm_train.nn.adversarial import AdversarialLoss, Clock
from ldm_train.nn.perceptual import LPIPS
from ldm_train.nn.regularizer import Reduction, Regularized


class AutoencoderLossTerms(NamedTuple):
    """The total to differentiate, and its terms by the names they are logged under; all scalars."""

    total: Tensor
    log: dict[str, Tensor]


class AutoencoderLoss(nn.Module):
    """Pixel, perceptual, regularizer's and adversarial loss.

    Args:
        pixel_norm: 1 for absolute, 2 for square errors.
        perceptual: LPIPS with its weight, or `None`.
        adversarial: a discriminator and how it is used, or `None`.
    """

    def __init__(
        self,
        pixel_norm: Literal[1, 2] = 1,
        perceptual: LPIPS | None = None,
        adversarial: AdversarialLoss | None = None,
    ) -> None:
        super().__init__()
        if pixel_norm not in (1, 2):
            raise ValueError(f"pixel_norm is {pixel_norm}; allowed are 1 and 2; change `stage.loss.pixel_norm`")
        self.pixel_norm = pixel_norm
        self.perceptual = perceptual
        self.adversarial = adversarial

    def forward(
        self, x: Tensor, reconstruction: Tensor, regularized: Regularized, last_weight: Tensor, clock: Clock
    ) -> AutoencoderLossTerms:
        """The loss of a training step.

        Args:
            x: (B, 3, H, W) images in [-1, 1].
            reconstruction: (B, 3, H, W) what the autoencoder makes of them.
            regularized: the latents and their loss.
            last_weight: the decoder's last weight, at which adversarial and reconstruction gradients are balanced.
            clock: how far the run is; decides what the discriminator does.
        """
        reconstruction = reconstruction.float()
        difference, log = self._difference(x, reconstruction, regularized.reduction)
        terms = self._with_regularizer(difference, log, regularized)
        if self.adversarial is None:
            return terms
        added = self.adversarial(x, reconstruction, difference, last_weight, clock)
        return AutoencoderLossTerms(terms.total + added.generator + added.discriminator, terms.log | added.log)

    def without_adversary(self, x: Tensor, reconstruction: Tensor, regularized: Regularized) -> AutoencoderLossTerms:
        """The loss by which validation judges: one that means the same at every step."""
        difference, log = self._difference(x, reconstruction.float(), regularized.reduction)
        return self._with_regularizer(difference, log, regularized)

    def _difference(self, x: Tensor, reconstruction: Tensor, reduction: Reduction) -> tuple[Tensor, dict[str, Tensor]]:
        pixel = (torch.abs(x - reconstruction) ** self.pixel_norm).flatten(1).mean(1).mean()
        values = x[0].numel() if reduction == "sum" else 1
        difference, log = values * pixel, {"loss_pixel": values * pixel.detach()}
        if self.perceptual is not None and self.perceptual.weight:
            perceptual = self.perceptual(x, reconstruction).mean()
            difference = difference + values * self.perceptual.weight * perceptual
            log["loss_perceptual"] = perceptual.detach()
        return difference, log

    @staticmethod
    def _with_regularizer(difference: Tensor, log: dict[str, Tensor], regularized: Regularized) -> AutoencoderLossTerms:
        regularizer = regularized.loss.float().mean()
        return AutoencoderLossTerms(difference + regularizer, log | {"loss_regularizer": regularizer.detach()})
