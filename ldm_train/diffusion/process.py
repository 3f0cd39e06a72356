"""The diffusion process as functions of tensors: add noise, and undo one step of it.

Forward (Ho et al. 2020, eq. 4), by reparameterisation with noise ~ N(0, I):

    x_t = alpha_t x_0 + sigma_t noise

Posterior of a less noisy s < t given x_t and x_0 (Ho et al. 2020, eq. 6 and 7, for s = t - 1), written for any pair so
that samplers may skip steps; alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2:

    mean     = (alpha_{t|s} sigma_s^2 x_t + alpha_s sigma_{t|s}^2 x_0) / sigma_t^2
    variance = sigma_s^2 sigma_{t|s}^2 / sigma_t^2

The three parameterisations of what a network may predict are linear in one another:

    noise = (x_t - alpha_t x_0) / sigma_t      v = alpha_t noise - sigma_t x_0      x_0 = alpha_t x_t - sigma_t v
"""

from typing import NamedTuple

from torch import Tensor

from ldm_train.diffusion.schedule import NoiseSchedule


class Gaussian(NamedTuple):
    """Mean, shaped like its variable, and variance, broadcastable to it."""

    mean: Tensor
    variance: Tensor


def add_noise(schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Draw x_t ~ q(x_t | x_0) from given noise: (B, C, H, W) in the dtype of `x_0`; `t` is (B,) int64."""
    alpha_t, sigma_t = schedule.scales(t, x_0.ndim)
    return (alpha_t * x_0 + sigma_t * noise).to(x_0.dtype)


def one_step(schedule: NoiseSchedule, x_previous: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_{t-1}), Ho et al. (2020), eq. 2; for t = 0 the previous state is x_0 itself."""
    beta = schedule.betas.to(x_previous.device)[t].to(x_previous.dtype).view(-1, *(1,) * (x_previous.ndim - 1))
    return Gaussian((1.0 - beta).sqrt() * x_previous, beta)


def posterior(x_0: Tensor, x_t: Tensor, alpha: tuple[Tensor, Tensor], sigma: tuple[Tensor, Tensor]) -> Gaussian:
    """q(x_s | x_t, x_0) for any s < t.

    Args:
        x_0: (B, C, H, W) clean data.
        x_t: (B, C, H, W) noisy data.
        alpha: (alpha_s, alpha_t), broadcastable to `x_0`.
        sigma: (sigma_s, sigma_t), broadcastable to `x_0`.

    Returns:
        Mean (B, C, H, W) and variance; at alpha_s = 1 they are `x_0` and 0.
    """
    (alpha_s, alpha_t), (sigma_s, sigma_t) = alpha, sigma
    ratio = alpha_t / alpha_s
    step_variance = sigma_t**2 - ratio**2 * sigma_s**2
    mean = (ratio * sigma_s**2 * x_t + alpha_s * step_variance * x_0) / sigma_t**2
    return Gaussian(mean, sigma_s**2 * step_variance / sigma_t**2)


def noise_from_x_0(x_t: Tensor, x_0: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The noise that turns `x_0` into `x_t`."""
    return (x_t - alpha_t * x_0) / sigma_t


def x_0_from_noise(x_t: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The data that `noise` turned into `x_t`; undefined where alpha_t = 0."""
    return (x_t - sigma_t * noise) / alpha_t


def velocity(x_0: Tensor, noise: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """V = alpha_t noise - sigma_t x_0 (Salimans and Ho 2022, appendix D)."""
    return alpha_t * noise - sigma_t * x_0


def x_0_from_velocity(x_t: Tensor, v: Tensor, alpha_t: Tensor, sigma_t: Tensor) -> Tensor:
    """The inverse of `velocity` given x_t: alpha_t x_t - sigma_t v."""
    return alpha_t * x_t - sigma_t * v
