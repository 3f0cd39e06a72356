r"""What the latents of an autoencoder look like over a data set: their moments, and which codes of a codebook they use.

`LatentStatistics` sums over images the posterior's mean m and variance v of each latent value; per channel,

    latent_mean = E[m],    latent_std^2 = E[v] + E[m^2] - E[m]^2            (law of total variance)

is what draws from the posterior have, without drawing. The divergence of a channel from N(0, 1) is the sum over the
h w positions of 1/2 (m^2 + v - 1 - log v) (Kingma and Welling 2014, appendix B), averaged over images: a channel that
stays near zero nats carries nothing.

`CodebookUsage` counts codes; with p_k the share of latents that take code k,

    usage = share of codes with p_k > 0,    perplexity = exp(-sum_k p_k log p_k)  in [1, K].

All sums are float64 or integers and go over all ranks. Letters: B batch, C latent channels, h and w height and width
of the latents, K codes.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from ldm_train.nn.codebook import code_counts, perplexity


class LatentSummary(NamedTuple):
    """Statistics of each latent channel, float64; torchmetrics makes scalars of them where C = 1.

    Attributes:
        mean: (C,) mean of the latents.
        std: (C,) standard deviation of draws from the posterior.
        divergence: (C,) nats an image, or `None` if it was not asked for.
    """

    mean: Tensor
    std: Tensor
    divergence: Tensor | None


class LatentStatistics(Metric):
    """Mean, standard deviation and divergence of each latent channel.

    Args:
        num_channels: C.
        with_divergence: the divergence from N(0, 1) too; only for posteriors that have a variance.
    """

    is_differentiable = False
    full_state_update = False

    num_images: Tensor
    num_values: Tensor
    sum_mean: Tensor
    sum_square: Tensor
    sum_variance: Tensor
    sum_divergence: Tensor

    def __init__(self, num_channels: int, with_divergence: bool) -> None:
        super().__init__()
        self.with_divergence = with_divergence
        for name in ("num_images", "num_values"):
            self.add_state(name, torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
        for name in ("sum_mean", "sum_square", "sum_variance", "sum_divergence"):
            self.add_state(name, torch.zeros(num_channels, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, mean: Tensor, variance: Tensor) -> None:
        """Adds this rank's posteriors: their means and variances, each (B, C, h, w)."""
        m, v = mean.detach().double(), variance.detach().double()
        self.num_images += len(m)
        self.num_values += m[:, 0].numel()
        self.sum_mean += _over_images_and_positions(m)
        self.sum_square += _over_images_and_positions(m.square())
        self.sum_variance += _over_images_and_positions(v)
        if self.with_divergence:
            self.sum_divergence += _over_images_and_positions(0.5 * (m.square() + v - 1.0 - v.log()))

    def compute(self) -> LatentSummary:
        """The statistics over all ranks' images.

        Raises:
            ValueError: there were none.
        """
        if not int(self.num_images):
            raise ValueError(
                "latent statistics were asked for after 0 images; allowed are 1 or more; change "
                "`callbacks.calibration.num_images` or `data.shards`"
            )
        mean = self.sum_mean / self.num_values
        variance = (self.sum_variance + self.sum_square) / self.num_values - mean.square()
        # Rounding may leave a constant channel just below zero.
        std = variance.clamp(min=0).sqrt()
        return LatentSummary(mean, std, self.sum_divergence / self.num_images if self.with_divergence else None)


class CodebookSummary(NamedTuple):
    """How a codebook is used, float64 scalars.

    Attributes:
        usage: share of the codes that were taken at least once.
        perplexity: number of equally frequent codes with the same entropy.
    """

    usage: Tensor
    perplexity: Tensor


class CodebookUsage(Metric):
    """Share and perplexity of the codes that a data set takes.

    Args:
        codebook_size: K.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    counts: Tensor

    def __init__(self, codebook_size: int) -> None:
        super().__init__()
        self.add_state("counts", torch.zeros(codebook_size, dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, indices: Tensor) -> None:
        """Adds this rank's codes, integers in [0, K) of any shape."""
        self.counts += code_counts(indices.flatten(), len(self.counts))

    def compute(self) -> CodebookSummary:
        """Usage and perplexity over all ranks' latents."""
        return CodebookSummary((self.counts > 0).double().mean(), perplexity(self.counts))


def _over_images_and_positions(values: Tensor) -> Tensor:
    """(B, C, h, w) to the sum (C,) of each channel."""
    return values.sum(dim=(0, 2, 3))
