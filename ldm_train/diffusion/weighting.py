"""How much each time counts in the training loss.

A network that predicts the noise, the velocity or the data makes one and the same mistake about x_0, seen in different
units. With x_t given, the three square errors are proportional:

    |noise error|^2 = SNR |x_0 error|^2        |v error|^2 = (SNR + 1) |x_0 error|^2        SNR = alpha_t^2 / sigma_t^2

so a weight that a paper gives for one of them is a weight for all of them. Here are the weights of the x_0 error, which
`from_x_0` divides by the factor of the prediction that is in use:

    MinSNR              min(SNR, gamma)                                                  Hang et al. 2023, section 3.4
    P2                  SNR / (k + SNR)^gamma                                            Choi et al. 2022, eq. 8
    Debiased            sqrt(SNR)                                                        Yu et al. 2024
    VariationalBound    k_t^2 / (2 variance),  k_t = alpha_{t-1} beta_t / sigma_t^2      Ho et al. 2020, eq. 12

`Uniform`, L_simple (Ho et al. 2020, eq. 14), is the exception: 1 on the network's own output, whatever that is.
"""

from abc import ABC, abstractmethod
from typing import Literal

import torch
from torch import Tensor

from ldm_train.diffusion.denoiser import Prediction
from ldm_train.diffusion.process import Variance, reverse_variance
from ldm_train.diffusion.schedule import NoiseSchedule


def from_x_0(weight: Tensor, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
    """Turn the weight of a square error of x_0 into that of the same error of another prediction.

    Args:
        weight: (T,) float64, of the error of x_0.
        schedule: the noise schedule.
        prediction: whose error is to be weighted.

    Returns:
        (T,) float64; not a number for `epsilon` where a schedule has no signal, which no denoiser combines.
    """
    if prediction == "x_0":
        return weight
    snr = schedule.signal_to_noise()
    return weight / (snr if prediction == "epsilon" else snr + 1.0)


class Weighting(ABC):
    """A weight for each time.

    Attributes:
        variance: of the reverse step that the weight is made for; `None` if it has nothing to do with one.
    """

    variance: Variance | None = None

    @abstractmethod
    def weight(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """The factor of the mean square error of a prediction at each time: (T,) float64."""


class Uniform(Weighting):
    """L_simple: all times count alike in the units of the network's output."""

    def weight(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """Ones."""
        return torch.ones_like(schedule.betas)


class MinSNR(Weighting):
    """Min-SNR-gamma: what nearly clean times, where x_0 is easy, may cost is capped.

    Args:
        gamma: the cap of the signal-to-noise ratio, usually 5.

    Raises:
        ValueError: if it is not positive.
    """

    def __init__(self, gamma: float = 5.0) -> None:
        _require(gamma > 0, "gamma", gamma, "positive numbers, 5 is usual")
        self.gamma = gamma

    def weight(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """min(SNR, gamma), of an x_0 error."""
        return from_x_0(schedule.signal_to_noise().clamp(max=self.gamma), schedule, prediction)


class P2(Weighting):
    """Perception-prioritised: times at which only imperceptible detail is left to learn count less.

    Formulated as L_simple of the noise divided by (k + SNR)^gamma.

    Args:
        gamma: strength; 0 is L_simple of the noise.
        k: keeps the weight finite where there is no signal, and sets from which SNR on it falls.

    Raises:
        ValueError: if gamma is negative or k is not positive.
    """

    def __init__(self, gamma: float = 1.0, k: float = 1.0) -> None:
        _require(gamma >= 0, "gamma", gamma, "numbers from 0, 0.5 and 1 are usual")
        _require(k > 0, "k", k, "positive numbers, 1 is usual")
        self.gamma = gamma
        self.k = k

    def weight(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """SNR / (k + SNR)^gamma, of an x_0 error."""
        snr = schedule.signal_to_noise()
        return from_x_0(snr / (self.k + snr) ** self.gamma, schedule, prediction)


class Debiased(Weighting):
    """L_simple of the noise divided by sqrt(SNR): early, noisy times, where the error of x_0 is large, count more."""

    def weight(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """sqrt(SNR), of an x_0 error."""
        return from_x_0(schedule.signal_to_noise().sqrt(), schedule, prediction)


class VariationalBound(Weighting):
    """The bound itself: the weighted error is what an estimate adds to L_t, in nats per dimension.

    Half the squared distance of the means of q(x_{t-1} | x_t, x_0) and of the model's reverse step, over the variance
    of that step; at t = 0, where the mean of the step is the estimate, likewise of the Gaussian decoder. T times the
    mean loss over the times is the bound, up to a constant.

    Args:
        variance: of the reverse step, `posterior` or `beta`, as the denoiser has it.

    Raises:
        ValueError: for another variance: a learned one is no function of the time alone.
    """

    def __init__(self, variance: Literal["posterior", "beta"] = "posterior") -> None:
        found = f"{variance!r}"
        _require(variance in ("posterior", "beta"), "variance", found, "posterior and beta, as of `stage.denoiser`")
        self.variance = variance

    def weight(self, schedule: NoiseSchedule, prediction: Prediction) -> Tensor:
        """k_t^2 / (2 variance), of an x_0 error."""
        assert self.variance is not None
        t = torch.arange(schedule.num_steps)
        (alpha_t, sigma_t), (alpha_s, sigma_s) = (schedule.scales(time, 1, torch.float64) for time in (t, t - 1))
        k = alpha_s * (1.0 - (alpha_t / alpha_s * sigma_s / sigma_t) ** 2)
        variance = reverse_variance(schedule, self.variance, t, t - 1, ndim=1, dtype=torch.float64)
        return from_x_0(k**2 / (2.0 * variance), schedule, prediction)


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {found}; allowed are {allowed}; change `objective.weighting.{key}`")
