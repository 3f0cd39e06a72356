"""An analytic world: data from a Gaussian, whose perfect denoiser is known."""

import pytest
import torch
from torch import nn

from ldm_train.batch import Conditioning
from ldm_train.diffusion import Denoised, Denoiser
from ldm_train.diffusion.process import noise_from_x_0

MEAN, STD = 0.7, 0.3


class GaussianDenoiser:
    """E[x_0 | x_t] for x_0 ~ N(mean, std^2): linear in x_t."""

    def __init__(self, schedule, mean=MEAN, std=STD, variance="posterior", fraction=None):
        self.schedule, self.mean, self.std = schedule, mean, std
        self.variance, self.fraction = variance, fraction

    def __call__(self, x_t, t, conditioning):
        alpha, sigma = self.schedule.scales(t, x_t.ndim, x_t.dtype)
        gain = alpha * self.std**2 / (alpha**2 * self.std**2 + sigma**2)
        x_0 = self.mean + gain * (x_t - alpha * self.mean)
        fraction = None if self.fraction is None else torch.full_like(x_t, self.fraction)
        return Denoised(x_0, noise_from_x_0(x_t, x_0, alpha, sigma), fraction)


class Oracle(nn.Module):
    """A network that knows the data and says what its denoiser wants to hear."""

    def __init__(self, x_0):
        super().__init__()
        self.x_0 = x_0
        self.denoiser: Denoiser

    def forward(self, x_t, t, conditioning):
        alpha, sigma = self.denoiser[0].schedule.scales(t, x_t.ndim)
        return self.denoiser[0].target(self.x_0, noise_from_x_0(x_t, self.x_0, alpha, sigma), t)


@pytest.fixture
def nothing():
    return Conditioning()


@pytest.fixture
def perfect():
    def make(x_0, schedule, prediction):
        network = Oracle(x_0)
        denoiser = Denoiser(network, schedule, prediction)
        network.denoiser = (denoiser,)  # a tuple, so that the two modules do not contain each other
        return denoiser

    return make


@pytest.fixture
def gaussian():
    return GaussianDenoiser


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)
