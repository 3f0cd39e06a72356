"""The diffusion process as functions of tensors: add noise, and undo one step of it.

Forward (Ho et al. 2020, eq. 4), by reparameterisation with noise ~ N(0, I):

    x_t = alpha_t x_0 + sigma_t noise

Posterior of a less noisy s < t given x_t and x_0 (Ho et al. 2020, eq. 6 and 7, for s = t - 1), written for any pair so
that samplers may skip steps; alpha_{t|s} = alpha_t / alpha_s and sigma_{t|s}^2 = sigma_t^2 - alpha_{t|s}^2 sigma_s^2:

    mean     = (alpha_{t|s} sigma_s^2 x_t + alpha_s sigma_{t|s}^2 x_0) / sigma_t^2
             = (x_t - sigma_{t|s}^2 / sigma_t noise) / alpha_{t|s}                            (Ho et al. 2020, eq. 11)
    variance = sigma_s^2 sigma_{t|s}^2 / sigma_t^2

For s = t - 1, sigma_{t|s}^2 is beta_t and the variance is the papers' tilde-beta_t. A model's reverse step has the mean
of the posterior with its estimate in the place of x_0, and one of three variances:

    beta        sigma_{t|s}^2, right if x_0 ~ N(0, I)                               (Ho et al. 2020, section 3.2)
    posterior   tilde-beta, right if x_0 is one point                               (the same)
    learned     exp(v log beta + (1 - v) log tilde-beta), v from the network        (Nichol and Dhariwal 2021, eq. 15)

The three parameterisations of what a network may predict are linear in one another:

    noise = (x_t - alpha_t x_0) / sigma_t      v = alpha_t noise - sigma_t x_0      x_0 = alpha_t x_t - sigma_t v
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_train.diffusion.schedule import NoiseSchedule

Variance = Literal["posterior", "beta", "learned"]
VARIANCES: tuple[Variance, ...] = ("posterior", "beta", "learned")


class Gaussian(NamedTuple):
    """Mean, shaped like its variable, and variance, broadcastable to it."""

    mean: Tensor
    variance: Tensor


def add_noise(schedule: NoiseSchedule, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """Draw x_t ~ q(x_t | x_0) from given noise: (B, C, H, W) in the dtype of `x_0`; `t` is (B,) int64."""
    alpha_t, sigma_t = schedule.scales(t, x_0.ndim, torch.promote_types(x_0.dtype, torch.float32))
    return (alpha_t * x_0 + sigma_t * noise).to(x_0.dtype)


def one_step(schedule: NoiseSchedule, x_previous: Tensor, t: Tensor) -> Gaussian:
    """q(x_t | x_{t-1}), Ho et al. (2020), eq. 2; for t = 0 the previous state is x_0 itself."""
    alpha, sigma = _pair(schedule, t, t - 1, x_previous.ndim)
    beta = _step_variance(alpha, sigma).to(x_previous.dtype)
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
    step_variance = _step_variance(alpha, sigma)
    mean = (alpha_t / alpha_s * sigma_s**2 * x_t + alpha_s * step_variance * x_0) / sigma_t**2
    return Gaussian(mean, sigma_s**2 * step_variance / sigma_t**2)


def posterior_from_noise(
    x_t: Tensor, noise: Tensor, alpha: tuple[Tensor, Tensor], sigma: tuple[Tensor, Tensor]
) -> Gaussian:
    """q(x_s | x_t, x_0) for any s < t, of the x_0 that `noise` turned into x_t; undefined where alpha_t = 0.

    Args:
        x_t: (B, C, H, W) noisy data.
        noise: (B, C, H, W).
        alpha: (alpha_s, alpha_t), broadcastable to `x_t`.
        sigma: (sigma_s, sigma_t), broadcastable to `x_t`.

    Returns:
        Mean (B, C, H, W) and variance, equal to those of `posterior`.
    """
    (alpha_s, alpha_t), (sigma_s, sigma_t) = alpha, sigma
    step_variance = _step_variance(alpha, sigma)
    mean = alpha_s / alpha_t * (x_t - step_variance / sigma_t * noise)
    return Gaussian(mean, sigma_s**2 * step_variance / sigma_t**2)


def reverse_variance(
    schedule: NoiseSchedule,
    kind: Variance,
    t: Tensor,
    s: Tensor,
    ndim: int = 4,
    fraction: Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The variance of a model's reverse step p(x_s | x_t), for any s < t.

    Towards clean data tilde-beta is 0, which has no logarithm: there it is replaced by that of the schedule's second
    step, from t = 1 to 0 (Nichol and Dhariwal 2021, section 3.1). A sampler adds no noise in that step anyhow.

    Args:
        schedule: the noise schedule.
        kind: `beta`, `posterior` or `learned`.
        t: (B,) int64 times that are left.
        s: (B,) int64 times that are reached; -1 is clean data.
        ndim: dimensions of the variable.
        fraction: shaped like the variable, v of a learned variance.
        dtype: of the result.

    Returns:
        (B, 1, ..., 1), or shaped like `fraction` if learned.

    Raises:
        ValueError: if a learned variance comes without its fraction.
    """
    alpha, sigma = _pair(schedule, t, s, ndim)
    beta = _step_variance(alpha, sigma)
    if kind == "beta":
        return beta.to(dtype)
    least = schedule.betas[1] * (schedule.sigma[0] / schedule.sigma[1]) ** 2
    tilde_beta = torch.where(s.view(beta.shape) < 0, float(least), beta * (sigma[0] / sigma[1]) ** 2)
    if kind == "posterior":
        return tilde_beta.to(dtype)
    if fraction is None:
        raise ValueError(
            "the denoiser gave no variance fraction; allowed for a learned variance are denoisers that do; change "
            "`stage.denoiser.variance`"
        )
    low, high = (bound.log().to(dtype).expand_as(fraction) for bound in (tilde_beta, beta))
    return torch.lerp(low, high, fraction.to(dtype)).exp()


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


def _pair(
    schedule: NoiseSchedule, t: Tensor, s: Tensor, ndim: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(alpha_s, alpha_t) and (sigma_s, sigma_t), in float64: neighbours differ in the last digits of float32."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (schedule.scales(time, ndim, torch.float64) for time in (s, t))
    return (alpha_s, alpha_t), (sigma_s, sigma_t)


def _step_variance(alpha: tuple[Tensor, Tensor], sigma: tuple[Tensor, Tensor]) -> Tensor:
    """sigma_{t|s}^2."""
    (alpha_s, alpha_t), (sigma_s, sigma_t) = alpha, sigma
    return sigma_t**2 - (alpha_t / alpha_s) ** 2 * sigma_s**2
