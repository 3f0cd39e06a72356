"""Every sampler turns N(0, I) into the data's Gaussian when its denoiser is perfect."""

from itertools import pairwise

import pytest
import torch

from ldm_train.diffusion import DDIMSampler, DDPMSampler, cosine_schedule, linear_schedule, sampling_times
from ldm_train.randomness import Stream, normal

from .conftest import MEAN, STD

COUNT = 20_000
SEEDS = torch.arange(COUNT)
SAMPLERS = [
    DDIMSampler(200),
    DDIMSampler(200, eta=0.5),
    DDIMSampler(200, spacing="linspace"),
    DDPMSampler(250),
    DDPMSampler(1000),
]


def sample(sampler, denoiser, nothing, seeds=SEEDS):
    x_T = normal(1, 0, seeds, Stream.SAMPLING, (1, 1, 1))
    return sampler(denoiser, x_T, nothing, 1, seeds).flatten()


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: f"{type(s).__name__}-{s.num_steps}-{s.eta}-{s.spacing}")
def test_an_analytic_gaussian_is_recovered(sampler, gaussian, nothing):
    x = sample(sampler, gaussian(linear_schedule()), nothing).double()
    assert float(x.mean()) == pytest.approx(MEAN, abs=4 * STD / COUNT**0.5 + 0.002)
    # A step replaces the reverse distribution by the posterior of one estimate, an error of first order in its length.
    assert float(x.std()) == pytest.approx(STD, rel=0.02 + 12 / sampler.num_steps)


def test_ddim_converges_with_first_order(gaussian, nothing):
    """The deterministic map is known in closed form: halving the step halves its error."""
    denoiser, seeds = gaussian(cosine_schedule()), torch.arange(64)
    x_T = normal(1, 0, seeds, Stream.SAMPLING, (1, 1, 1)).flatten().double()
    alpha, sigma = denoiser.schedule.alpha_bar[-1].sqrt(), (1 - denoiser.schedule.alpha_bar[-1]).sqrt()
    exact = MEAN + STD * (x_T - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
    errors = [
        float((sample(DDIMSampler(n), denoiser, nothing, seeds).double() - exact).abs().mean()) for n in (20, 40, 80)
    ]
    assert errors[0] / errors[1] == pytest.approx(2.0, rel=0.15)
    assert errors[1] / errors[2] == pytest.approx(2.0, rel=0.15)


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_image_depends_on_its_seed_and_not_on_its_batch(eta, gaussian, nothing):
    sampler, denoiser = DDIMSampler(10, eta=eta), gaussian(linear_schedule())
    together = sample(sampler, denoiser, nothing, torch.arange(8))
    alone = torch.cat([sample(sampler, denoiser, nothing, torch.tensor([i])) for i in range(8)])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
    assert len(together.unique()) == 8


def test_leading_times_are_those_of_the_published_code():
    assert sampling_times(1000, 50, "leading") == list(range(981, 0, -20))


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 7, 27, 50, 101, 500, 501, 999, 1000])
def test_times_are_distinct_descending_and_in_range(spacing, num_steps):
    times = sampling_times(1000, num_steps, spacing)
    assert len(times) == num_steps
    assert all(a > b for a, b in pairwise(times))
    assert 0 <= times[-1] <= times[0] <= 999
    if spacing != "leading":
        assert times[0] == 999


@pytest.mark.parametrize(("num_steps", "spacing"), [(0, "trailing"), (1001, "leading"), (5, "middle")])
def test_impossible_times_are_refused(num_steps, spacing):
    with pytest.raises(ValueError, match=r"allowed are .* change `sampler"):
        sampling_times(1000, num_steps, spacing)


def test_eta_out_of_range_is_refused():
    with pytest.raises(ValueError, match=r"change `sampler\.eta`"):
        DDIMSampler(10, eta=1.5)
