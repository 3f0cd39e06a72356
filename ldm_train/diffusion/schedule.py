"""Noise schedules: how much of the image is left at each time.

The forward process is a Markov chain of T steps that adds Gaussian noise of variance beta_t (Ho et al. 2020, eq. 2):

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    q(x_t | x_0)     = N(alpha_t x_0, sigma_t^2 I)
    alpha_t          = sqrt(prod_{s<=t} (1 - beta_s)),  alpha_t^2 + sigma_t^2 = 1

Notation: `t` counts from 0 to T - 1, so `t = 0` is the paper's first noisy step. `alpha_t` and `sigma_t` scale signal
and noise; the papers' alpha-bar is `alpha_t ** 2`. Tables are computed in float64 and kept in float64 on the host;
`alpha` and `sigma` also travel with the module as float32 buffers, for use inside a training step.
"""

import math

import torch
from torch import Tensor, nn


class NoiseSchedule(nn.Module):
    """A variance-preserving schedule given by its betas.

    Args:
        betas: (T,) noise variance added by each step; each in (0, 1], and 1 only at the last.
        name: how errors and summaries call the schedule.

    Raises:
        ValueError: if `betas` is no increasing-noise sequence of that range.
    """

    alpha: Tensor
    sigma: Tensor

    def __init__(self, betas: Tensor, name: str = "betas") -> None:
        super().__init__()
        betas = betas.to(torch.float64)
        inside = betas.ndim == 1 and len(betas) > 1 and bool((betas > 0).all() and (betas[:-1] < 1).all())
        if not inside or betas[-1] > 1:
            raise ValueError(
                f"schedule {name!r}: betas of shape {tuple(betas.shape)} in [{betas.min():.3g}, {betas.max():.3g}]; "
                "allowed are at least two values in (0, 1), the last of which may be 1; change the `schedule` keys "
                "(`num_steps`, `beta_start`, `beta_end`)"
            )
        self.name = name
        self.betas = betas
        self.alpha_bar = torch.cumprod(1.0 - betas, dim=0)
        self.register_buffer("alpha", self.alpha_bar.sqrt().float(), persistent=False)
        self.register_buffer("sigma", (1.0 - self.alpha_bar).sqrt().float(), persistent=False)

    @property
    def num_steps(self) -> int:
        """T, the length of the forward chain."""
        return len(self.betas)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether x_T holds no signal at all (alpha_T = 0)."""
        return bool(self.alpha_bar[-1] == 0)

    def signal_to_noise(self) -> Tensor:
        """SNR(t) = alpha_t^2 / sigma_t^2, shape (T,), float64."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    def scales(self, t: Tensor, ndim: int) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for a batch of times.

        Args:
            t: (B,) int64 times in [0, T).
            ndim: dimensions of the tensors to be scaled.

        Returns:
            Two float32 tensors of shape (B, 1, ..., 1) with `ndim` dimensions.
        """
        shape = (-1, *(1,) * (ndim - 1))
        return self.alpha[t].view(shape), self.sigma[t].view(shape)

    def extra_repr(self) -> str:
        """The facts worth printing."""
        return f"{self.name}, num_steps={self.num_steps}, terminal_snr={self.signal_to_noise()[-1]:.3g}"


def linear_schedule(num_steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Betas that grow linearly (Ho et al. 2020, section 4)."""
    return NoiseSchedule(torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64), "linear")


def scaled_linear_schedule(
    num_steps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
) -> NoiseSchedule:
    """Betas whose square roots grow linearly, the schedule of latent and stable diffusion (Rombach et al. 2022).

    Args:
        num_steps: T.
        beta_start: first beta.
        beta_end: last beta.
        zero_terminal_snr: rescale so that alpha_T = 0, see `rescale_to_zero_terminal_snr`.

    Returns:
        The schedule.
    """
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64)
    schedule = NoiseSchedule(roots**2, "scaled_linear")
    return rescale_to_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def cosine_schedule(num_steps: int = 1000, offset: float = 0.008, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha-bar follows a squared cosine (Nichol and Dhariwal 2021, eq. 17).

    alpha-bar(t) = f(t) / f(0),  f(t) = cos^2((t / T + s) / (1 + s) * pi / 2),  beta_t clipped at `max_beta`

    Args:
        num_steps: T.
        offset: s, keeps the first beta from vanishing.
        max_beta: the clip, which keeps the last steps from a singularity.

    Returns:
        The schedule.
    """
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    return NoiseSchedule((1.0 - f[1:] / f[:-1]).clamp(max=max_beta), "cosine")


def rescale_to_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and stretch alpha_t so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    alpha = schedule.alpha_bar.sqrt()
    alpha = (alpha - alpha[-1]) * alpha[0] / (alpha[0] - alpha[-1])
    alpha_bar = alpha**2
    ratios = torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]])
    return NoiseSchedule(1.0 - ratios, f"{schedule.name}, zero terminal SNR")
