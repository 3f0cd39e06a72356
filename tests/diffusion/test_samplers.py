"""Every sampler turns N(0, I) into the data's Gaussian when its denoiser is perfect."""

import math
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from torch import nn

from ldm_train.diffusion import (
    DDIMSampler,
    DDPMSampler,
    Denoiser,
    DPMSolverSampler,
    EulerSampler,
    HeunSampler,
    NoiseSchedule,
    Sampler,
    linear_schedule,
    sampling_times,
)
from ldm_train.randomness import Stream, normal

from .conftest import MEAN, STD

COUNT = 8_000
SEEDS = torch.arange(COUNT)
# How far the standard deviation may be off at the last time visited: of first order c / N, of second c / N^2.
SAMPLERS = [
    (DDIMSampler(200), 4.5 / 200),
    (DDIMSampler(200, eta=0.5), 5.5 / 200),
    (DDIMSampler(200, spacing="linspace"), 4.5 / 200),
    (DDPMSampler(250), 10.5 / 250),
    (EulerSampler(200), 4.5 / 200),
    (EulerSampler(200, churn=20.0), 9.5 / 200),
    (HeunSampler(50), 15 / 50**2),
    (HeunSampler(50, churn=5.0), 32 / 50**2),
    (DPMSolverSampler(50), 40 / 50**2),
]
EVERY_KIND = [
    DDPMSampler(10),
    DDIMSampler(10),
    DDIMSampler(10, eta=1.0),
    EulerSampler(10),
    EulerSampler(10, churn=4.0),
    HeunSampler(10),
    HeunSampler(10, churn=4.0),
    DPMSolverSampler(10),
]


def name(sampler):
    if not isinstance(sampler, Sampler):
        return None
    options = [f"{key}={value}" for key, value in vars(sampler).items() if key in ("num_steps", "eta", "churn")]
    return "-".join([type(sampler).__name__, *options, sampler.spacing])


def sample(sampler, denoiser, nothing, seeds=SEEDS):
    x_T = normal(1, 0, seeds, Stream.SAMPLING, (1, 1, 1))
    return sampler(denoiser, x_T, nothing, 1, seeds).flatten()


class TestGaussian:
    @pytest.mark.parametrize(("sampler", "most"), SAMPLERS, ids=name)
    @pytest.mark.parametrize("zero_terminal_snr", [False, True])
    def test_is_recovered(self, sampler, most, zero_terminal_snr, gaussian, nothing, monkeypatch):
        denoiser = gaussian(linear_schedule(zero_terminal_snr=zero_terminal_snr))
        x = sample(sampler, denoiser, nothing).double()
        *_, last, end = moments(sampler, denoiser, nothing, monkeypatch)
        assert float(x.mean()) == pytest.approx(end.mean, abs=4 * end.std / COUNT**0.5)
        assert float(x.std()) == pytest.approx(end.std, rel=4 / (2 * COUNT) ** 0.5)
        # Without zero terminal SNR the data's mean is still in x_T, and x_T is drawn without it.
        exact = marginal(denoiser, last.t)
        assert last.mean == pytest.approx(exact.mean, abs=1e-6 if zero_terminal_snr else 0.002)
        assert last.std == pytest.approx(exact.std, rel=most)
        assert end.mean == pytest.approx(MEAN, abs=1e-6 if zero_terminal_snr else 0.002)
        alpha = float(denoiser.schedule.alpha[last.t])
        assert end.std == pytest.approx(alpha * STD**2 / exact.std, rel=most)  # of E[x_0 | x_t]

    @pytest.mark.parametrize(
        ("kind", "options", "variance", "order"),
        [
            (DDPMSampler, {}, "posterior", 1),
            (DDPMSampler, {}, "beta", 1),
            (DDIMSampler, {}, "posterior", 1),
            (DDIMSampler, {"eta": 0.5}, "posterior", 1),
            (DDIMSampler, {"eta": 1.0}, "posterior", 1),
            (EulerSampler, {}, "posterior", 1),
            (EulerSampler, {"churn": 4.0}, "posterior", 1),
            (HeunSampler, {}, "posterior", 2),
            (HeunSampler, {"churn": 4.0}, "posterior", 2),
            (DPMSolverSampler, {}, "posterior", 2),
        ],
    )
    def test_and_its_noisy_marginals_are_approached_with_the_sampler_s_order(
        self, kind, options, variance, order, gaussian, nothing, monkeypatch
    ):
        """From x_T of the marginal at T on, half the steps are at 2^order times the distance from every marginal."""
        denoiser = gaussian(even_schedule(), variance=variance)
        distances = []
        for intervals in (32, 64, 128):
            sampler = kind(intervals + 1, spacing="linspace", **options)
            begin = marginal(denoiser, denoiser.schedule.num_steps - 1)
            found = list(moments(sampler, denoiser, nothing, monkeypatch, begin))
            distances.append(max(wasserstein(state, marginal(denoiser, state.t)) for state in found[:-1]))
        for coarse, fine in pairwise(distances):
            assert coarse / fine == pytest.approx(2.0**order, rel=0.06)

    @pytest.mark.parametrize(
        ("kind", "order"),
        [(DDIMSampler, 1), (EulerSampler, 1), (HeunSampler, 2), (DPMSolverSampler, 2)],
    )
    def test_is_approached_with_the_sampler_s_order(self, kind, order, gaussian, nothing):
        """The deterministic map is known in closed form: halving the steps divides its error by 2^order."""
        denoiser = gaussian(even_schedule())
        x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).view(-1, 1, 1, 1)
        exact = denoiser(flowed(denoiser, x_T), torch.zeros(9, dtype=torch.long), nothing).x_0
        errors = []
        for intervals in (32, 64, 128):
            x = kind(intervals + 1, spacing="linspace")(denoiser, x_T, nothing, 1, torch.arange(9))
            errors.append(float((x - exact).abs().mean()))
        for coarse, fine in pairwise(errors):
            assert coarse / fine == pytest.approx(2.0**order, rel=0.12)

    @pytest.mark.parametrize("num_steps", [3, 10])
    def test_of_unit_variance_is_exact_at_every_step_with_the_variance_beta(self, num_steps, gaussian, nothing):
        """The reverse of a chain whose marginals are all N(0, 1) has the chain's own betas."""
        sampler = DDPMSampler(num_steps, spacing="leading", final_alpha="first")
        x_T = normal(1, 0, SEEDS, Stream.SAMPLING, (1, 1, 1))
        denoiser = gaussian(linear_schedule(), 0.0, 1.0, variance="beta")
        for state in sampler.trajectory(denoiser, x_T, nothing, 1, SEEDS):
            assert float(state.x_t.std()) == pytest.approx(1.0, rel=4 / (2 * COUNT) ** 0.5)

    @pytest.mark.parametrize("sampler", EVERY_KIND, ids=name)
    def test_of_no_variance_is_one_point(self, sampler, gaussian, nothing):
        x = sample(sampler, gaussian(linear_schedule(), MEAN, 0.0), nothing, torch.arange(8))
        torch.testing.assert_close(x, torch.full_like(x, MEAN))


def even_schedule(num_steps=1025, most=3.0):
    """log SNR falls in equal steps, so that all spacings are even in what the solvers step in."""
    alpha_bar = torch.sigmoid(torch.linspace(2 * most, -2 * most, num_steps, dtype=torch.float64))
    return NoiseSchedule(1 - alpha_bar / torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]]))


def flowed(denoiser, x_T):
    """Where the probability flow of a Gaussian takes x_T at the first time: it keeps its distance in deviations."""
    alpha, sigma = denoiser.schedule.alpha, denoiser.schedule.sigma
    spread = (alpha**2 * STD**2 + sigma**2).sqrt()
    return alpha[0] * MEAN + spread[0] * (x_T - alpha[-1] * MEAN) / spread[-1]


class Moments(NamedTuple):
    """Mean and standard deviation at a time; -1 is clean data."""

    t: int
    mean: float
    std: float


STANDARD = Moments(-1, 0.0, 1.0)


def marginal(denoiser, t):
    """Of the data's Gaussian under the forward process."""
    alpha, sigma = denoiser.schedule.alpha[t], denoiser.schedule.sigma[t]
    return Moments(t, float(alpha * MEAN), float((alpha**2 * STD**2 + sigma**2).sqrt()))


def wasserstein(one, other):
    """The 2-Wasserstein distance of two Gaussians."""
    return math.hypot(one.mean - other.mean, one.std - other.std)


def moments(sampler, denoiser, nothing, monkeypatch, begin=STANDARD):
    """Of a sampler's state after each step, without drawing: a state is a linear function of its independent noises.

    Image 0 has unit noise in x_T, image i in step i, and the last one nowhere.
    """

    def impulse(seed, number, image_seeds, stream, shape):
        return (image_seeds == number).float().view(-1, *(1 for _ in shape)).expand(-1, *shape)

    seeds = torch.arange(sampler.num_steps + 2)
    x_T = begin.mean + begin.std * (seeds == 0).double().view(-1, 1, 1, 1)
    with monkeypatch.context() as patch:
        patch.setattr("ldm_train.diffusion.samplers.normal", impulse)
        for state in sampler.trajectory(denoiser, x_T, nothing, 1, seeds):
            mean = state.x_t[-1]
            yield Moments(state.t, float(mean), float((state.x_t - mean).square().sum().sqrt()))


class TestRelations:
    """What one sampler's image says about another's."""

    def test_ancestral_sampling_with_the_posterior_s_variance_is_ddim_with_eta_1(self, gaussian, nothing):
        denoiser, seeds = gaussian(linear_schedule()), torch.arange(16)
        one, other = (sample(s, denoiser, nothing, seeds) for s in (DDPMSampler(20), DDIMSampler(20, eta=1.0)))
        torch.testing.assert_close(one, other)

    @pytest.mark.parametrize(("fraction", "fixed"), [(0.0, "posterior"), (1.0, "beta")])
    def test_a_learned_variance_ends_in_the_fixed_ones(self, fraction, fixed, gaussian, nothing):
        seeds = torch.arange(16)
        learned = gaussian(linear_schedule(), variance="learned", fraction=fraction)
        one = sample(DDPMSampler(20), learned, nothing, seeds)
        torch.testing.assert_close(
            one, sample(DDPMSampler(20), gaussian(linear_schedule(), variance=fixed), nothing, seeds)
        )
        half = gaussian(linear_schedule(), variance="learned", fraction=0.5)
        assert not torch.allclose(one, sample(DDPMSampler(20), half, nothing, seeds))

    def test_euler_is_ddim(self, gaussian, nothing):
        denoiser, seeds = gaussian(linear_schedule()), torch.arange(16)
        assert torch.equal(
            sample(EulerSampler(20), denoiser, nothing, seeds), sample(DDIMSampler(20), denoiser, nothing, seeds)
        )

    @pytest.mark.parametrize("kind", [EulerSampler, HeunSampler])
    def test_churn_adds_noise(self, kind, gaussian, nothing):
        denoiser, seeds = gaussian(linear_schedule()), torch.zeros(16, dtype=torch.long)
        x = torch.ones(16, 1, 1, 1)
        still, churned = (kind(20, churn=churn)(denoiser, x, nothing, 1, torch.arange(16)) for churn in (0.0, 8.0))
        assert len(still.unique()) == 1
        assert len(churned.unique()) == 16
        assert len(kind(20, churn=8.0)(denoiser, x, nothing, 1, seeds).unique()) == 1

    @pytest.mark.parametrize("sampler", EVERY_KIND, ids=name)
    def test_an_image_depends_on_its_seed_and_not_on_its_batch(self, sampler, gaussian, nothing):
        denoiser = gaussian(linear_schedule())
        together = sample(sampler, denoiser, nothing, torch.arange(8))
        alone = torch.cat([sample(sampler, denoiser, nothing, torch.tensor([i])) for i in range(8)])
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-6)
        assert len(together.unique()) == 8

    @pytest.mark.parametrize("sampler", EVERY_KIND, ids=name)
    def test_nothing_exceeds_the_clip(self, sampler, gaussian, nothing):
        sampler = type(sampler)(**{**vars(sampler), "clip_x_0": 0.75})
        denoiser = gaussian(linear_schedule())
        states = list(sampler.trajectory(denoiser, torch.randn(64, 1, 1, 1), nothing, 1, torch.arange(64)))
        assert all(float(state.x_0.abs().max()) <= 0.75 for state in states)
        assert float(states[-1].x_t.max()) == pytest.approx(0.75)

    def test_a_clipped_estimate_has_the_noise_that_makes_up_the_state(self, gaussian, nothing):
        denoiser, x = gaussian(linear_schedule()), torch.randn(64, 1, 1, 1)
        sampler = DDIMSampler(4, spacing="linspace", clip_x_0=0.5)
        alpha, sigma = denoiser.schedule.alpha, denoiser.schedule.sigma
        for state in sampler.trajectory(denoiser, x, nothing, 1, torch.arange(64)):
            if state.t >= 0:
                t = {666: 999, 333: 666, 0: 333}[state.t]
                noise = (x - alpha[t] * state.x_0) / sigma[t]
                expected = alpha[state.t] * state.x_0 + sigma[state.t] * noise
                torch.testing.assert_close(state.x_t, expected, rtol=1e-5, atol=1e-5)
            x = state.x_t


class TestTrajectory:
    @pytest.mark.parametrize("sampler", EVERY_KIND, ids=name)
    def test_it_visits_the_times_and_ends_where_the_call_ends(self, sampler, gaussian, nothing):
        denoiser, x, seeds = gaussian(linear_schedule()), torch.randn(4, 2, 3, 3), torch.arange(4)
        states = list(sampler.trajectory(denoiser, x, nothing, 1, seeds))
        assert [state.step for state in states] == list(range(1, 11))
        assert [state.t for state in states] == [*sampling_times(1000, 10, "trailing")[1:], -1]
        assert torch.equal(states[-1].x_t, sampler(denoiser, x, nothing, 1, seeds))
        assert torch.equal(states[-1].x_t, states[-1].x_0)

    @pytest.mark.parametrize("sampler", [s for s in EVERY_KIND if not isinstance(s, DPMSolverSampler)], ids=name)
    def test_it_goes_on_from_any_step_as_if_unbroken(self, sampler, gaussian, nothing):
        denoiser, x, seeds = gaussian(linear_schedule()), torch.randn(4, 2, 3, 3), torch.arange(4)
        states = list(sampler.trajectory(denoiser, x, nothing, 1, seeds))
        for start in (1, 5, 9):
            assert sampler.start_time(denoiser.schedule, start) == states[start - 1].t
            assert torch.equal(sampler(denoiser, states[start - 1].x_t, nothing, 1, seeds, start), states[-1].x_t)

    def test_a_late_start_keeps_more_of_the_image(self, gaussian, nothing):
        """Noised to the start's time and denoised again, an image keeps what the noise left of it."""
        denoiser, seeds, sampler = gaussian(linear_schedule()), torch.arange(COUNT), DDIMSampler(200)
        image = MEAN + STD * normal(2, 0, seeds, Stream.NOISE, (1, 1, 1))
        kept = []
        for strength in (0.2, 0.5, 0.8):
            start = sampler.start_of(strength)
            assert start == round(200 * (1 - strength))
            t = sampler.start_time(denoiser.schedule, start)
            alpha, sigma = denoiser.schedule.alpha[t], denoiser.schedule.sigma[t]
            x_t = alpha * image + sigma * normal(1, 0, seeds, Stream.SAMPLING, (1, 1, 1))
            again = sampler(denoiser, x_t, nothing, 1, seeds, start)
            assert float(again.std()) == pytest.approx(STD, rel=0.05)
            kept.append(float(torch.corrcoef(torch.stack([image.flatten(), again.flatten()]))[0, 1]))
            assert kept[-1] == pytest.approx(float(alpha * STD / (alpha**2 * STD**2 + sigma**2).sqrt()), abs=0.04)
        assert kept == sorted(kept, reverse=True)

    @pytest.mark.parametrize("sampler", EVERY_KIND, ids=name)
    def test_it_needs_no_gradient_and_leaves_the_caller_s_mode_alone(self, sampler, nothing):
        network = Wave().requires_grad_(True)
        denoiser = Denoiser(network, linear_schedule())
        for state in sampler.trajectory(denoiser, torch.randn(2, 1, 2, 2), nothing, 1, torch.arange(2)):
            assert torch.is_grad_enabled()
            assert not state.x_t.requires_grad
            assert not state.x_0.requires_grad

    @pytest.mark.parametrize("start", [-1, 10])
    def test_a_start_without_steps_is_refused(self, start, gaussian, nothing):
        with pytest.raises(ValueError, match=r"allowed are 0 to 9.* change `start`"):
            DDIMSampler(10)(gaussian(linear_schedule()), torch.randn(1, 1, 1, 1), nothing, 1, torch.arange(1), start)

    @pytest.mark.parametrize(("strength", "start"), [(1.0, 0), (0.75, 5), (0.35, 13), (0.01, 19)])
    def test_strength_is_the_share_of_steps_made(self, strength, start):
        assert DDIMSampler(20).start_of(strength) == start

    @pytest.mark.parametrize("strength", [0.0, 1.1])
    def test_strength_out_of_range_is_refused(self, strength):
        with pytest.raises(ValueError, match=r"allowed are .* change `strength`"):
            DDIMSampler(20).start_of(strength)


class Wave(nn.Module):
    """A network that is neither linear in the state nor alike at all times."""

    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(0.7))

    def forward(self, x_t, t, conditioning):
        return self.gain * torch.sin(2 * x_t) * (1.2 - t.view(-1, 1, 1, 1) / 2000) + 0.1


class TestTimes:
    def test_leading_times_are_those_of_the_published_code(self):
        assert sampling_times(1000, 50, "leading") == list(range(981, 0, -20))

    @pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
    @pytest.mark.parametrize("num_steps", [3, 7, 16, 27, 50, 101, 500, 701, 999, 1000])
    def test_they_are_distinct_descending_and_in_range(self, spacing, num_steps):
        times = sampling_times(1000, num_steps, spacing)
        assert len(times) == num_steps
        assert all(a > b for a, b in pairwise(times))
        assert 0 <= times[-1] <= times[0] <= 999
        if spacing != "leading":
            assert times[0] == 999

    @pytest.mark.parametrize(
        ("num_steps", "spacing"),
        [(0, "trailing"), (1001, "leading"), (5, "middle"), (1, "leading"), (2, "leading"), (600, "leading")],
    )
    def test_impossible_ones_are_refused(self, num_steps, spacing):
        with pytest.raises(ValueError, match=r"allowed are .* change `sampler"):
            sampling_times(1000, num_steps, spacing)


@pytest.mark.parametrize(
    ("kind", "arguments", "key"),
    [
        (DDIMSampler, {"eta": 1.5}, "eta"),
        (DDIMSampler, {"clip_x_0": 0.0}, "clip_x_0"),
        (DPMSolverSampler, {"spacing": "middle"}, "spacing"),
        (DDPMSampler, {"final_alpha": "zero"}, "final_alpha"),
        (EulerSampler, {"churn": -1.0}, "churn"),
        (HeunSampler, {"churn": -1.0}, "churn"),
    ],
)
def test_what_no_sampler_can_do_is_refused(kind, arguments, key):
    with pytest.raises(ValueError, match=rf"allowed are .*; change `sampler\.{key}`"):
        kind(10, **arguments)
