"""Regularizers: what keeps the latent space of an autoencoder small, between its encoder and its decoder.

A regularizer turns the encoder's output into latents z with a loss on them. The Kullback-Leibler one (Kingma and
Welling 2014, appendix B) reads mean and log-variance of a diagonal Gaussian posterior from 2C channels,

    z = mean + exp(logvar / 2) noise,     KL(q || N(0, I)) = 1/2 sum (mean^2 + exp(logvar) - 1 - logvar)

The contract: `moments_per_channel` tells the autoencoder how many channels to produce for each latent channel,
`forward(moments, noise)` returns latents, a loss per example and values to log, `mode(moments)` the likeliest latents.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

_LOG_VARIANCE_RANGE = (-30.0, 20.0)


class Regularized(NamedTuple):
    """A regularizer's result.

    Attributes:
        z: (B, C, h, w) latents, before normalisation.
        loss: (B,) the regularizer's loss, summed over the latents of each example.
        log: scalars to log, by name.
    """

    z: Tensor
    loss: Tensor
    log: dict[str, Tensor]


class KLRegularizer(nn.Module):
    """Pulls a diagonal Gaussian posterior towards N(0, I)."""

    moments_per_channel = 2

    def forward(self, moments: Tensor, noise: Tensor | None) -> Regularized:
        """Draw latents.

        Args:
            moments: (B, 2C, h, w) means, then log-variances (clamped to [-30, 20]).
            noise: (B, C, h, w) standard normal; `None` takes the mean.

        Returns:
            Latents, the KL divergence of each example, and its mean under `kl`.
        """
        mean, log_variance = self._split(moments)
        z = mean if noise is None else mean + torch.exp(0.5 * log_variance) * noise
        kl = 0.5 * (mean.square() + log_variance.exp() - 1.0 - log_variance).flatten(1).sum(1)
        return Regularized(z, kl, {"kl": kl.mean()})

    def mode(self, moments: Tensor) -> Tensor:
        """The posterior mean: (B, C, h, w)."""
        return self._split(moments)[0]

    def variance(self, moments: Tensor) -> Tensor:
        """The posterior variance: (B, C, h, w)."""
        return self._split(moments)[1].exp()

    def _split(self, moments: Tensor) -> tuple[Tensor, Tensor]:
        mean, log_variance = moments.chunk(2, dim=1)
        return mean, log_variance.clamp(*_LOG_VARIANCE_RANGE)
