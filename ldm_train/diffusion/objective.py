"""The training objective: how far the network's prediction is from its target, and how much each time counts.

L_simple (Ho et al. 2020, eq. 14) draws t uniformly and noise ~ N(0, I), and takes the mean square of
target - prediction,

    L = E_{x_0, t, noise} [ w(t) || target - prediction ||^2 ],   w = 1

Min-SNR-gamma (Hang et al. 2023, eq. 8) caps what easy, nearly clean times contribute. Seen from x_0 the weight is
min(SNR, gamma); the square of another parameterisation's error is that of x_0 times a function of the SNR, hence

    x_0: min(SNR, gamma)      epsilon: min(SNR, gamma) / SNR      v: min(SNR, gamma) / (SNR + 1)

All draws are functions of (seed, epoch, sample id), see `ldm_train.randomness`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import Denoiser
from ldm_train.diffusion.process import add_noise
from ldm_train.randomness import Stream, normal, uniform


class DiffusionLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        per_example: (B,) weighted mean square error of each sample.
        t: (B,) the times drawn.
    """

    per_example: Tensor
    t: Tensor


class DiffusionObjective(nn.Module):
    """L_simple, optionally weighted by min-SNR-gamma.

    Args:
        min_snr_gamma: gamma, usually 5; `None` weighs all times alike.

    Raises:
        ValueError: if gamma is not positive.
    """

    def __init__(self, min_snr_gamma: float | None = None) -> None:
        super().__init__()
        if min_snr_gamma is not None and min_snr_gamma <= 0:
            raise ValueError(
                f"min_snr_gamma is {min_snr_gamma}; allowed are positive numbers (5 is usual) or null for no "
                "weighting; change `objective.min_snr_gamma`"
            )
        self.min_snr_gamma = min_snr_gamma

    def forward(
        self, denoiser: Denoiser, x_0: Tensor, conditioning: Conditioning, seed: int, epoch: int, sample_id: Tensor
    ) -> DiffusionLoss:
        """The loss of clean data (B, C, H, W) under the draws that belong to (seed, epoch, sample_id)."""
        t = self.draw_times(denoiser.schedule.num_steps, seed, epoch, sample_id)
        noise = normal(seed, epoch, sample_id, Stream.NOISE, tuple(x_0.shape[1:]))
        x_t = add_noise(denoiser.schedule, x_0, noise, t)
        prediction = denoiser.predict(x_t, t, conditioning)
        error = (prediction.float() - denoiser.target(x_0, noise, t)).square().flatten(1).mean(1)
        return DiffusionLoss(self.weight(denoiser, t) * error, t)

    def draw_times(self, num_steps: int, seed: int, epoch: int, sample_id: Tensor) -> Tensor:
        """One time per sample, uniform on {0, ..., T - 1}: (B,) int64."""
        return (uniform(seed, epoch, sample_id, Stream.TIMESTEP).double() * num_steps).long()

    def weight(self, denoiser: Denoiser, t: Tensor) -> Tensor:
        """w(t) for the denoiser's parameterisation: (B,) float32."""
        if self.min_snr_gamma is None:
            return torch.ones_like(t, dtype=torch.float32)
        snr = denoiser.schedule.signal_to_noise().to(t.device)[t]
        capped = snr.clamp(max=self.min_snr_gamma)
        # SNR = 0 occurs with zero terminal SNR, where epsilon is refused, so no division by zero is reached.
        divisor = {"x_0": torch.ones_like(snr), "epsilon": snr, "v": snr + 1}[denoiser.prediction]
        return (capped / divisor).float()
