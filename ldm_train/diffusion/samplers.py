"""Samplers: from noise to data in a few evaluations of a denoiser.

A sampler walks down a sequence of times T - 1 = t_0 > t_1 > ... and, at each, replaces x_t by a sample of an estimate
of x_s, s the next time. With the denoiser's x_0 and noise (Song et al. 2021, eq. 12),

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - tau^2) noise + tau z,   z ~ N(0, I)
    tau = eta sqrt(variance of q(x_s | x_t, x_0))

eta = 0 is the deterministic DDIM, eta = 1 has the marginals of ancestral DDPM sampling. After the last time comes
clean data (alpha = 1, sigma = 0). Initial noise is given and z is keyed by the image's own seed, so an image depends
neither on its batch nor on the number of processes.
"""

import math
from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import DenoiserLike
from ldm_train.diffusion.process import posterior
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.randomness import Stream, normal

Spacing = Literal["leading", "linspace", "trailing"]
SPACINGS: tuple[Spacing, ...] = ("leading", "linspace", "trailing")


def sampling_times(num_train_steps: int, num_steps: int, spacing: Spacing) -> list[int]:
    """The times a sampler visits, descending.

    Args:
        num_train_steps: T of the schedule.
        num_steps: how many times to visit, at most T.
        spacing: `leading` is every (T // num_steps)-th time counted from 1, as in the published latent diffusion code;
            `linspace` reaches both ends; `trailing` counts from T - 1 down, which a schedule with zero terminal SNR
            needs (Lin et al. 2024, table 2).

    Returns:
        `num_steps` distinct times in [0, T).

    Raises:
        ValueError: for more steps than times, fewer than one, or an unknown spacing.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(
            f"num_steps is {num_steps}; allowed are 1 to {num_train_steps}, the length of the noise schedule; "
            "change `sampler.num_steps`"
        )
    if spacing == "leading":
        times = [1 + i * (num_train_steps // num_steps) for i in range(num_steps)]
        return (
            [min(t, num_train_steps - 1) for t in reversed(times)] if num_steps < num_train_steps else _all(num_steps)
        )
    if spacing == "linspace":
        return [round(t) for t in torch.linspace(num_train_steps - 1, 0, num_steps, dtype=torch.float64).tolist()]
    if spacing == "trailing":
        return [math.ceil(num_train_steps * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]
    raise ValueError(f"spacing {spacing!r} is unknown; allowed are {', '.join(SPACINGS)}; change `sampler.spacing`")


def _all(num_steps: int) -> list[int]:
    return list(range(num_steps - 1, -1, -1))


class DDIMSampler:
    """Denoising diffusion implicit models (Song et al. 2021).

    Args:
        num_steps: evaluations of the denoiser.
        eta: 0 deterministic, 1 ancestral.
        spacing: how the times are spread, see `sampling_times`.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
    """

    def __init__(
        self, num_steps: int = 50, eta: float = 0.0, spacing: Spacing = "trailing", clip_x_0: float | None = None
    ) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta is {eta}; allowed are 0 (DDIM) to 1 (ancestral); change `sampler.eta`")
        self.num_steps = num_steps
        self.eta = eta
        self.spacing: Spacing = spacing
        self.clip_x_0 = clip_x_0

    @torch.no_grad()
    def __call__(
        self,
        denoiser: DenoiserLike,
        x_T: Tensor,
        conditioning: Conditioning,
        seed: int,
        image_seeds: Tensor,
    ) -> Tensor:
        """Turn noise into data.

        Args:
            denoiser: any denoiser, guided or not.
            x_T: (B, C, H, W) standard normal noise.
            conditioning: for the B images.
            seed: the run's seed.
            image_seeds: (B,) int64, the images' own seeds, which key the noise z of eta > 0.

        Returns:
            (B, C, H, W) float32.
        """
        x_t = x_T.float()
        for step, t, alpha, sigma in _transitions(denoiser.schedule, self.num_steps, self.spacing, x_t.device):
            x_0, noise = denoiser(x_t, torch.full_like(image_seeds, t), conditioning)
            if self.clip_x_0 is not None:
                x_0 = x_0.clamp(-self.clip_x_0, self.clip_x_0)
                noise = (x_t - alpha[1] * x_0) / sigma[1]
            tau = self.eta * posterior(x_0, x_t, alpha, sigma).variance.sqrt()
            x_t = alpha[0] * x_0 + (sigma[0] ** 2 - tau**2).clamp(min=0).sqrt() * noise
            if self.eta > 0:
                x_t = x_t + tau * normal(seed, step, image_seeds, Stream.SAMPLING, tuple(x_t.shape[1:]))
        return x_t


class DDPMSampler(DDIMSampler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over all times or a respaced few: DDIM with eta = 1."""

    def __init__(self, num_steps: int = 1000, spacing: Spacing = "trailing", clip_x_0: float | None = None) -> None:
        super().__init__(num_steps, eta=1.0, spacing=spacing, clip_x_0=clip_x_0)


def _transitions(
    schedule: NoiseSchedule, num_steps: int, spacing: Spacing, device: torch.device
) -> Iterator[tuple[int, int, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]]:
    """Steps (number from 1, time t, (alpha_s, alpha_t), (sigma_s, sigma_t)); scales from the float64 tables."""
    times = sampling_times(schedule.num_steps, num_steps, spacing)
    alpha_bar = [schedule.alpha_bar[t] for t in times] + [torch.ones((), dtype=torch.float64)]
    alpha = [a.sqrt().float().to(device) for a in alpha_bar]
    sigma = [(1.0 - a).sqrt().float().to(device) for a in alpha_bar]
    for i, t in enumerate(times):
        yield i + 1, t, (alpha[i + 1], alpha[i]), (sigma[i + 1], sigma[i])
