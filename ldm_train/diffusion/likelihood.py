r"""How many bits a diffusion model needs for an image: the variational bound, term by term.

With q the forward chain and p the model's reverse chain (Ho et al. 2020, eq. 5, with its times from 1 to T),

    -log p(x_0) <= L_T + sum_{t=2}^{T} L_{t-1} + L_0

    L_T     = KL( q(x_T | x_0) || N(0, I) )                        the prior: does the chain end in noise
    L_{t-1} = KL( q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t) )      two Gaussians of one step
    L_0     = -log p(x_0 | x_1)                                    the decoder: the last step, to the data

Both Gaussians of a step have means that are linear in x_t and x_0 with the same coefficients, and p puts its estimate
in the place of x_0. So x_t drops out of their difference:

    2 L_{t-1} = k_t^2 (x_0 - estimate)^2 / v_t + r_t - log r_t - 1,    k_t = alpha_{t-1} beta_t / sigma_t^2
    r_t       = tilde-beta_t / v_t                                     tilde-beta_t = beta_t sigma_{t-1}^2 / sigma_t^2

where v_t is the variance of p: tilde-beta_t itself (r_t = 1), beta_t, or learned between the two. The code counts times
from 0, as everywhere: there L_t belongs to the step that leaves time `t`, and `t = 0` is the step to the data.

The decoder of 8-bit pixels integrates a Gaussian over the bin of each of the 256 values (eq. 13), so that the bound is
one on a probability. Latents are real numbers and their decoder is a density: the bound is one on a differential
log-likelihood, which moves with the scale of the latents, may be negative, and cannot be compared with that of pixels.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import DenoiserLike
from ldm_train.diffusion.process import Variance, add_noise, posterior, reverse_variance
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.randomness import SampleKeys, Stream, normal, uniform

Decoder = Literal["discrete", "gaussian"]

_HALF_BIN = 1.0 / 255.0  # 256 values over [-1, 1] lie 2 / 255 apart


class Bound(NamedTuple):
    """The variational bound of B examples, in bits per dimension.

    Attributes:
        total: (B,) the bound on -log2 p(x_0): prior, steps and decoder.
        prior: (B,) L_T.
        steps: (B,) the sum of L_t over t = 1 .. T - 1, or an unbiased estimate of it.
        decoder: (B,) L_0.
        times: (B, N) int64, ascending: where L_t was measured.
        terms: (B, N) L_t there.
    """

    total: Tensor
    prior: Tensor
    steps: Tensor
    decoder: Tensor
    times: Tensor
    terms: Tensor


def bound_term(
    schedule: NoiseSchedule,
    variance: Variance,
    x_0: Tensor,
    t: Tensor,
    x_0_estimate: Tensor,
    variance_fraction: Tensor | None = None,
    decoder: Decoder = "gaussian",
) -> Tensor:
    """L_t of each example, the decoder's L_0 where t = 0; differentiable in the estimate and in the fraction.

    Args:
        schedule: the noise schedule.
        variance: which variance the reverse step has, see `Denoiser`.
        x_0: (B, C, H, W) data; its dtype is the one computed in.
        t: (B,) int64 times.
        x_0_estimate: (B, C, H, W) the denoiser's estimate from x_t; detach it to learn the variance alone.
        variance_fraction: (B, C, H, W) of a learned variance: 0 is tilde-beta_t, 1 is beta_t.
        decoder: `discrete` for 8-bit pixels in [-1, 1], `gaussian` for latents.

    Returns:
        (B,) nats per dimension.

    Raises:
        ValueError: a variance is learned, and there is no fraction.
    """
    before = t - 1
    reverse, true = (
        reverse_variance(schedule, kind, t, before, x_0.ndim, variance_fraction, x_0.dtype).log()
        for kind in (variance, "posterior")
    )
    log_ratio = true - reverse
    error = (_gain(schedule, t, x_0) * (x_0 - x_0_estimate)).square() * (-reverse).exp()
    divergence = 0.5 * (error + torch.expm1(log_ratio) - log_ratio)
    is_last = (t == 0).view(-1, *(1,) * (x_0.ndim - 1))
    # Far from the data the decoder has no digits left, and a gradient that is no number survives being masked.
    decoded = -_LOG_LIKELIHOODS[decoder](x_0, torch.where(is_last, x_0_estimate, x_0), reverse)
    return torch.where(t == 0, decoded.flatten(1).mean(1), divergence.flatten(1).mean(1))


def _gain(schedule: NoiseSchedule, t: Tensor, like: Tensor) -> Tensor:
    """k_t: what one more in x_0 adds to the mean of q(x_{t-1} | x_t, x_0)."""
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (schedule.scales(time, like.ndim, torch.float64) for time in (t - 1, t))
    one = torch.ones_like(alpha_t)
    return posterior(one, torch.zeros_like(one), (alpha_s, alpha_t), (sigma_s, sigma_t)).mean.to(like.dtype)


def gaussian_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the density N(x; mean, variance), elementwise, in nats."""
    return -0.5 * ((x - mean).square() * (-log_variance).exp() + log_variance + math.log(2 * math.pi))


def discrete_log_likelihood(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """Log of the probability that N(mean, variance) gives an 8-bit pixel (Ho et al. 2020, eq. 13), elementwise.

    The bins are 2 / 255 wide around the 256 values; the outermost reach to infinity, so that all probabilities add up
    to one.

    Args:
        x: pixels, k / 127.5 - 1 for k = 0 .. 255.
        mean: broadcastable to `x`.
        log_variance: broadcastable to `x`.

    Returns:
        Nats, shaped like `x` and of its dtype; computed in float64, where they and their gradients are finite up to
        some 10^6 standard deviations from the mean.
    """
    inverse_std = (-0.5 * log_variance.double()).exp()
    distance = x.double() - mean.double()
    upper, lower = (distance + _HALF_BIN) * inverse_std, (distance - _HALF_BIN) * inverse_std
    first, last = x < -1.0 + _HALF_BIN, x > 1.0 - _HALF_BIN
    # Phi(b) - Phi(a) = Phi(-a) - Phi(-b): in the lower tail small probabilities keep their digits.
    mirrored = last | (~first & (upper + lower > 0))
    upper, lower = torch.where(mirrored, -lower, upper), torch.where(mirrored, -upper, lower)
    log_upper = torch.special.log_ndtr(upper)
    log_ratio = torch.where(first | last, -math.inf, torch.special.log_ndtr(lower) - log_upper)
    return (log_upper + (-torch.expm1(log_ratio)).log()).to(x.dtype)


_LOG_LIKELIHOODS: Mapping[Decoder, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "discrete": discrete_log_likelihood,
    "gaussian": gaussian_log_likelihood,
}


def prior_term(schedule: NoiseSchedule, x_0: Tensor) -> Tensor:
    """L_T, the divergence of q(x_T | x_0) from N(0, I): (B,) nats per dimension for data (B, C, H, W)."""
    alpha_bar = float(schedule.alpha_bar[-1])
    divergence = 0.5 * (alpha_bar * x_0.square() - alpha_bar - math.log1p(-alpha_bar))
    return divergence.flatten(1).mean(1)


@torch.no_grad()
def variational_bound(
    denoiser: DenoiserLike,
    x_0: Tensor,
    conditioning: Conditioning,
    keys: SampleKeys,
    decoder: Decoder,
    num_times: int | None = None,
    clip_x_0: float | None = None,
) -> Bound:
    """The bound of each example, with one evaluation of the denoiser for each time.

    The noise of an example at a time belongs to its keys, so neither the batch nor the number of processes matters.

    Args:
        denoiser: any denoiser.
        x_0: (B, C, H, W) pixels or latents.
        conditioning: for the B examples.
        keys: whose noise it is.
        decoder: `discrete` for 8-bit pixels in [-1, 1], `gaussian` for latents.
        num_times: how many of the times 1 .. T - 1 are looked at; they are cut into as many equal strata, and of each
            one time is drawn for each example and stands for all of it. `None` takes all times and estimates nothing
            but the expectation over the noise.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip], as a sampler of pixels does.

    Returns:
        The bound, in float64.

    Raises:
        ValueError: `num_times` is not in 1 .. T - 1.
    """
    schedule = denoiser.schedule
    edges = strata(schedule.num_steps - 1, num_times).to(x_0.device)
    first, widths = edges[:-1], edges.diff()
    # Each draw of an epoch has a number of its own: the times, the decoder's noise, and the noise of each term.
    draws = itertools.count(keys.epoch * (len(widths) + 2))
    position = uniform(keys.seed, next(draws), keys.sample_id, Stream.BOUND, (len(widths),)).double()
    times = first + (position * widths).long()

    def bits(t: Tensor) -> Tensor:
        noise = normal(keys.seed, next(draws), keys.sample_id, Stream.BOUND, tuple(x_0.shape[1:]))
        denoised = denoiser(add_noise(schedule, x_0.float(), noise, t), t, conditioning)
        estimate = denoised.x_0 if clip_x_0 is None else denoised.x_0.clamp(-clip_x_0, clip_x_0)
        fraction = denoised.variance_fraction
        nats = bound_term(schedule, denoiser.variance, x_0.double(), t, estimate.double(), fraction, decoder)
        return nats / math.log(2.0)

    prior = prior_term(schedule, x_0.double()) / math.log(2.0)
    decoded = bits(torch.zeros_like(times[:, 0]))
    terms = torch.stack([bits(t) for t in times.unbind(1)], dim=1)
    steps = (terms * widths).sum(1)
    return Bound(prior + steps + decoded, prior, steps, decoded, times, terms)


def strata(num_terms: int, num_times: int | None) -> Tensor:
    """Strata of the times 1 .. num_terms, as equal as whole numbers can be.

    Args:
        num_terms: how many times there are.
        num_times: how many strata; `None` is one for each time.

    Returns:
        (num_times + 1,) int64: the first time of each stratum, and the end of the last.

    Raises:
        ValueError: for more strata than times, or none.
    """
    num_times = num_terms if num_times is None else num_times
    if not 1 <= num_times <= num_terms:
        raise ValueError(
            f"num_times is {num_times}; allowed are 1 to {num_terms}, the steps of the noise schedule between prior "
            "and decoder, or null for all of them; change `callbacks.likelihood.num_times`"
        )
    return 1 + torch.arange(num_times + 1) * num_terms // num_times
