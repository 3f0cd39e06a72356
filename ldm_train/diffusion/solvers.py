r"""Samplers that solve the probability-flow equation, whose marginals are those of the diffusion.

In the coordinates of Karras et al. (2022), y = x_t / alpha_t and u = sigma_t / alpha_t, it says that y moves along its
noise (ibid., eq. 1 and 3, where D is the denoiser's x_0),

    dy / du = (y - D) / u = noise

Euler's step follows the noise as it is at its start; Heun's (ibid., algorithm 1) takes the mean of those at its start
and at its end. Back in x_t,

    Euler   x_s = alpha_s x_0 + sigma_s noise                                               which is DDIM's, eta = 0
    Heun    x_s = Euler's + alpha_s (u_s - u_t) / 2 (noise at Euler's x_s - noise at x_t)

DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2) solves the equation of x_t exactly if x_0 is linear in
lambda = log(alpha_t / sigma_t), and finds the slope from the step before. With h = lambda_s - lambda_t,

    x_s = sigma_s / sigma_t x_t - alpha_s (e^{-h} - 1) (x_0 + h / (2 h_before) (x_0 - x_0 before))

Where a second order needs what is infinite, lambda of clean data or u without signal, the step is of the first order.

`churn` makes Euler's and Heun's stochastic (Karras et al. 2022, algorithm 2): before each step the forward process
raises u by the factor 1 + min(churn / num_steps, sqrt(2) - 1), or as far below it as the schedule has a time.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ldm_train.diffusion.samplers import FinalAlpha, Images, Level, Sampler, Spacing, Step, level


class EulerSampler(Sampler):
    """First-order steps along the noise: DDIM, or with `churn` the stochastic sampler of Karras et al. (2022).

    Args:
        num_steps: evaluations of the denoiser.
        spacing: how the times are spread, see `sampling_times`.
        churn: S_churn of algorithm 2, from 0, deterministic, to 0.41 `num_steps`, above which nothing changes.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
        final_alpha: `one` or `first`, see `Sampler`.

    Raises:
        ValueError: for a negative churn.
    """

    def __init__(
        self,
        num_steps: int = 50,
        spacing: Spacing = "trailing",
        churn: float = 0.0,
        clip_x_0: float | None = None,
        final_alpha: FinalAlpha = "one",
    ) -> None:
        super().__init__(num_steps, spacing, clip_x_0, final_alpha)
        self.churn = _checked_churn(churn)

    def walk(self, images: Images, x: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """One evaluation a step."""
        for step in steps:
            x, t = _raised(images, x, step, self.churn / self.num_steps)
            s = step.s
            x_0, noise, _ = images.denoise(x, t)
            x = s.alpha * x_0 + s.sigma * noise
            yield x, x_0


class HeunSampler(Sampler):
    """Second-order steps by the trapezoidal rule.

    Args:
        num_steps: steps, of two evaluations of the denoiser each; the last has one.
        spacing: how the times are spread, see `sampling_times`.
        churn: as in `EulerSampler`.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
        final_alpha: `one` or `first`, see `Sampler`.

    Raises:
        ValueError: for a negative churn.
    """

    def __init__(
        self,
        num_steps: int = 25,
        spacing: Spacing = "trailing",
        churn: float = 0.0,
        clip_x_0: float | None = None,
        final_alpha: FinalAlpha = "one",
    ) -> None:
        super().__init__(num_steps, spacing, clip_x_0, final_alpha)
        self.churn = _checked_churn(churn)

    def walk(self, images: Images, x: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """Euler's step, corrected by what is found at its end."""
        for step in steps:
            x, t = _raised(images, x, step, self.churn / self.num_steps)
            s = step.s
            x_0, noise, _ = images.denoise(x, t)
            x = s.alpha * x_0 + s.sigma * noise
            if s.t >= 0 and t.alpha > 0:
                change = images.denoise(x, s).noise - noise
                x = x + s.alpha * (s.noise_to_signal - t.noise_to_signal) / 2.0 * change
            yield x, x_0


class DPMSolverSampler(Sampler):
    """DPM-Solver++(2M): second order at one evaluation a step, but for the first step and the last.

    Args:
        num_steps: evaluations of the denoiser.
        spacing: how the times are spread, see `sampling_times`.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
        final_alpha: `one` or `first`, see `Sampler`.
    """

    def __init__(
        self,
        num_steps: int = 25,
        spacing: Spacing = "trailing",
        clip_x_0: float | None = None,
        final_alpha: FinalAlpha = "one",
    ) -> None:
        super().__init__(num_steps, spacing, clip_x_0, final_alpha)

    def walk(self, images: Images, x: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """Extrapolates x_0 from this step's estimate and the one before."""
        before: tuple[Tensor, Tensor] | None = None
        for number, t, s in steps:
            x_0 = images.denoise(x, t).x_0
            h = s.half_log_snr - t.half_log_snr
            extrapolated = x_0
            if before is not None and number < self.num_steps:
                x_0_before, h_before = before
                extrapolated = x_0 + h / (2.0 * h_before) * (x_0 - x_0_before)
            x = s.sigma / t.sigma * x - s.alpha * torch.expm1(-h) * extrapolated
            before = x_0, h
            yield x, x_0


def _raised(images: Images, x: Tensor, step: Step, churn: float) -> tuple[Tensor, Level]:
    """The state and level after more noise: those of the step's t without churn, or where the schedule has no room."""
    t, schedule = step.t, images.denoiser.schedule
    most = (1.0 + min(churn, math.sqrt(2.0) - 1.0)) * t.noise_to_signal
    raised = level(schedule, max(t.t, int((schedule.sigma <= most * schedule.alpha).sum()) - 1))
    if churn == 0 or raised.t == t.t:
        return x, t
    kept = raised.alpha / t.alpha
    added = (raised.sigma**2 - kept**2 * t.sigma**2).sqrt()
    return kept * x + added * images.noise(step.number, x), raised


def _checked_churn(churn: float) -> float:
    if churn < 0:
        raise ValueError(f"churn is {churn}; allowed are numbers from 0, deterministic; change `sampler.churn`")
    return churn
