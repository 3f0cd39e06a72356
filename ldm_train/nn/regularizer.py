"""Regularizers: what keeps the latent space of an autoencoder small, between its encoder and its decoder.

A regularizer turns the encoder's output into latents z with a loss on them. The Kullback-Leibler one (Kingma and
Welling 2014, appendix B) reads mean and log-variance of a diagonal Gaussian posterior from 2C channels,

    z = mean + exp(logvar / 2) noise,     KL(q || N(0, I)) = 1/2 sum (mean^2 + exp(logvar) - 1 - logvar)

The vector-quantised one is in `ldm_train.nn.vector_quantizer`.

A weight of the regularizer's loss means nothing without what it is weighed against: `reduction` says whether that is
the pixel loss summed over an image (the published KL models, 1e-6) or averaged over its values (the published VQ
models, 1). `equivalent_weight` converts.

Letters: B batch, C latent channels, h and w height and width of the latents, k moments per channel.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

Reduction = Literal["sum", "mean"]


class Regularized(NamedTuple):
    """A regularizer's result.

    Attributes:
        z: (B, C, h, w) latents, before normalisation, as the decoder reads them.
        loss: (B,) weighted loss of each example, summed or averaged over its latents as `reduction` says.
        reduction: how the pixel loss must be reduced for the two to be added.
        log: scalars to log, by name.
        indices: (B, h, w) codes of a codebook, if there is one.
    """

    z: Tensor
    loss: Tensor
    reduction: Reduction
    log: dict[str, Tensor]
    indices: Tensor | None = None


class Regularizer(nn.Module, ABC):
    """The contract of all regularizers.

    Args:
        weight: weight of its loss, relative to a pixel loss reduced the same way.
        reduction: `sum` over the latents of an image, or `mean`.

    Attributes:
        moments_per_channel: channels that the encoder produces for each latent channel, k.
        codebook_size: codes there are, or `None`.
    """

    moments_per_channel: int
    codebook_size: int | None = None

    def __init__(self, weight: float, reduction: Reduction) -> None:
        super().__init__()
        if not 0 <= weight < math.inf:
            raise ValueError(
                f"the regularizer's weight is {weight}; allowed are numbers from 0; change "
                "`autoencoder.regularizer.weight`"
            )
        if reduction not in ("sum", "mean"):
            raise ValueError(
                f"reduction is {reduction!r}; allowed are sum and mean; change `autoencoder.regularizer.reduction`"
            )
        self.weight = weight
        self.reduction = reduction

    @abstractmethod
    def forward(self, moments: Tensor, noise: Tensor | None) -> Regularized:
        """Latents and their loss.

        Args:
            moments: (B, k C, h, w) the encoder's output.
            noise: (B, C, h, w) standard normal, keyed by sample, for whatever is drawn; `None`: nothing is.
        """

    @abstractmethod
    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """A draw from the posterior, for stage 2 to learn; the mode where nothing is drawn: (B, C, h, w)."""

    @abstractmethod
    def mode(self, moments: Tensor) -> Tensor:
        """The likeliest latents: (B, C, h, w)."""

    @abstractmethod
    def variance(self, moments: Tensor) -> Tensor:
        """The posterior variance, zero where nothing is drawn: (B, C, h, w)."""

    @abstractmethod
    def project(self, z: Tensor) -> Tensor:
        """Latents (B, C, h, w), as generated, to what the decoder was trained on: the same shape."""

    def reduced(self, values: Tensor) -> Tensor:
        """(B, ...) values of each latent to the weighted loss (B,) of each example."""
        flat = values.flatten(1)
        return self.weight * (flat.sum(1) if self.reduction == "sum" else flat.mean(1))

    def equivalent_weight(self, pixels: int, latents: int) -> float:
        """The weight that means the same under the other reduction, for so many values per image."""
        ratio = latents / pixels
        return self.weight * (ratio if self.reduction == "sum" else 1 / ratio)


class KLRegularizer(Regularizer):
    """Pulls a diagonal Gaussian posterior towards N(0, I).

    Args:
        weight: weight of the divergence.
        reduction: see `Regularizer`.
        posterior: the decoder is trained on a `sample` of the posterior, or on its `mean`.
        log_variance_range: log-variances are clamped to it.
    """

    moments_per_channel = 2

    def __init__(
        self,
        weight: float = 1e-6,
        reduction: Reduction = "sum",
        posterior: Literal["sample", "mean"] = "sample",
        log_variance_range: Sequence[float] = (-30.0, 20.0),
    ) -> None:
        super().__init__(weight, reduction)
        if posterior not in ("sample", "mean"):
            raise ValueError(
                f"posterior is {posterior!r}; allowed are sample and mean; change `autoencoder.regularizer.posterior`"
            )
        if len(log_variance_range) != 2 or not log_variance_range[0] < log_variance_range[1]:
            raise ValueError(
                f"log_variance_range is {list(log_variance_range)}; allowed is a lower and a higher number; change "
                "`autoencoder.regularizer.log_variance_range`"
            )
        self.posterior = posterior
        self.log_variance_range = tuple(log_variance_range)

    def forward(self, moments: Tensor, noise: Tensor | None) -> Regularized:
        """Draw latents.

        Args:
            moments: (B, 2C, h, w) means, then log-variances.
            noise: (B, C, h, w) standard normal; `None` takes the mean.

        Returns:
            Latents, the weighted KL divergence of each example, and the mean divergence of an example under `kl`.
        """
        mean, log_variance = self._split(moments)
        z = mean if noise is None or self.posterior == "mean" else self.draw(moments, noise)
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance)
        return Regularized(z, self.reduced(kl), self.reduction, {"kl": kl.detach().flatten(1).sum(1).mean()})

    def draw(self, moments: Tensor, noise: Tensor) -> Tensor:
        """Mean + std noise, whatever the decoder is trained on: (B, C, h, w)."""
        mean, log_variance = self._split(moments)
        return mean + torch.exp(0.5 * log_variance) * noise

    def mode(self, moments: Tensor) -> Tensor:
        """The posterior mean: (B, C, h, w)."""
        return self._split(moments)[0]

    def variance(self, moments: Tensor) -> Tensor:
        """The posterior variance: (B, C, h, w)."""
        return self._split(moments)[1].exp()

    def project(self, z: Tensor) -> Tensor:
        """Every point is allowed: `z` itself."""
        return z

    def _split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = moments.float().chunk(2, dim=1)
        return mean, log_variance.clamp(*self.log_variance_range)
