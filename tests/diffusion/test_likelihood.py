"""The bound against closed forms: of pixels, of two Gaussians, and of data whose likelihood is known."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm_train.batch import Conditioning
from ldm_train.diffusion import (
    Denoised,
    NoiseSchedule,
    bound_term,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
    variational_bound,
)
from ldm_train.diffusion.likelihood import discrete_log_likelihood, gaussian_log_likelihood, prior_term
from ldm_train.diffusion.process import noise_from_x_0, posterior, reverse_variance
from ldm_train.randomness import SampleKeys

from .conftest import MEAN, STD

PIXELS = torch.arange(256, dtype=torch.float64) / 127.5 - 1.0
SHAPE = (6, 2, 3, 3)
TIMES = torch.tensor([1, 2, 10, 100, 500, 999])


def keys(count, epoch=0, first=0):
    ids = torch.arange(first, first + count)
    return SampleKeys(1, epoch, ids, ids)


def random(*shape, seed=0):
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def integrated(x, mean, log_variance, nodes=4096):
    """The log of the density's integral over each pixel's bin, by the midpoint rule; the outermost are half-lines."""
    width = 2 / 255
    places = x + width * ((torch.arange(nodes, dtype=torch.float64)[:, None] + 0.5) / nodes - 0.5)
    inner = gaussian_log_likelihood(places, mean, log_variance).logsumexp(0) + math.log(width / nodes)
    std = (0.5 * log_variance).exp()
    first = torch.special.log_ndtr((x + width / 2 - mean) / std)
    last = torch.special.log_ndtr((mean - x + width / 2) / std)
    return torch.cat([first[:1], inner[1:-1], last[-1:]])


class TestDiscreteDecoder:
    @pytest.mark.parametrize("mean", [-3.0, -1.0, 0.123, 0.99, 2.0])
    @pytest.mark.parametrize("std", [1e-3, 0.01, 0.1, 1.0])
    def test_the_probabilities_of_all_pixels_add_up_to_one(self, mean, std):
        log_likelihood = discrete_log_likelihood(
            PIXELS, torch.full_like(PIXELS, mean), torch.full_like(PIXELS, 2 * math.log(std))
        )
        assert float(log_likelihood.exp().sum()) == pytest.approx(1.0, abs=1e-9)

    def test_a_narrow_bin_has_its_width_times_the_density(self):
        log_variance = torch.tensor(0.0, dtype=torch.float64)
        inner, mean = PIXELS[1:-1], torch.tensor(0.3, dtype=torch.float64)
        density = gaussian_log_likelihood(inner, mean, log_variance)
        found = discrete_log_likelihood(inner, mean, log_variance)
        torch.testing.assert_close(found, density + math.log(2 / 255), rtol=0, atol=1e-5)

    def test_a_sure_decoder_needs_no_bits(self):
        log_likelihood = discrete_log_likelihood(PIXELS, PIXELS, torch.full_like(PIXELS, 2 * math.log(1e-4)))
        torch.testing.assert_close(log_likelihood, torch.zeros_like(PIXELS))

    @pytest.mark.parametrize("offset", [-3.0, -0.1, 0.0, 0.1, 3.0])
    @pytest.mark.parametrize("log_variance", [-12.0, -4.0, 0.0])
    def test_values_and_gradients_are_those_of_the_integral_however_wrong_the_mean(self, offset, log_variance):
        """Up to 1,200 standard deviations away, where the probability itself is 0 in any floating-point format."""
        mean = (PIXELS.float() + offset).requires_grad_()
        spread = torch.full((256,), log_variance, requires_grad=True)
        found = discrete_log_likelihood(PIXELS.float(), mean, spread)
        expected = integrated(PIXELS.float().double(), mean.double(), spread.double())
        torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-4)
        gradients = (torch.autograd.grad(value.sum(), (mean, spread)) for value in (found, expected))
        for got, of_integral in zip(*gradients, strict=True):
            torch.testing.assert_close(got, of_integral, rtol=1e-4, atol=1e-4)

    def test_both_tails_are_alike(self):
        mean = torch.full_like(PIXELS, 0.7)
        log_variance = torch.full_like(PIXELS, -6.0)
        mirrored = discrete_log_likelihood(-PIXELS, -mean, log_variance)
        torch.testing.assert_close(discrete_log_likelihood(PIXELS, mean, log_variance), mirrored)


class TestTerm:
    @pytest.mark.parametrize(
        "schedule", [linear_schedule(), cosine_schedule(), scaled_linear_schedule(zero_terminal_snr=True)]
    )
    @pytest.mark.parametrize("kind", ["posterior", "beta", "learned"])
    def test_is_the_divergence_of_the_model_s_step_from_the_posterior(self, schedule, kind):
        """Against the textbook's divergence of two Gaussians, with means that see x_t."""
        x_0, estimate, x_t = (random(*SHAPE, seed=seed) for seed in range(3))
        fraction = torch.rand(SHAPE, dtype=torch.float64)
        (alpha_s, sigma_s), (alpha_t, sigma_t) = (schedule.scales(t, 4, torch.float64) for t in (TIMES - 1, TIMES))
        truth, model = (posterior(x, x_t, (alpha_s, alpha_t), (sigma_s, sigma_t)) for x in (x_0, estimate))
        variance = reverse_variance(schedule, kind, TIMES, TIMES - 1, 4, fraction, torch.float64)
        expected = kl_divergence(Normal(truth.mean, truth.variance.sqrt()), Normal(model.mean, variance.sqrt()))
        found = bound_term(schedule, kind, x_0, TIMES, estimate, fraction)
        torch.testing.assert_close(found, expected.flatten(1).mean(1), rtol=1e-7, atol=1e-12)

    def test_a_perfect_denoiser_with_the_posterior_s_variance_costs_nothing(self):
        x_0 = random(*SHAPE)
        assert torch.equal(
            bound_term(linear_schedule(), "posterior", x_0, TIMES, x_0), torch.zeros(6, dtype=torch.float64)
        )

    def test_a_wrong_variance_costs_something_and_a_learned_one_can_avoid_it(self):
        x_0 = random(*SHAPE)
        schedule = linear_schedule()
        assert (bound_term(schedule, "beta", x_0, TIMES, x_0) > 0).all()
        none, all_of_it = (torch.full(SHAPE, value, dtype=torch.float64) for value in (0.0, 1.0))
        torch.testing.assert_close(
            bound_term(schedule, "learned", x_0, TIMES, x_0, none),
            torch.zeros(6, dtype=torch.float64),
            rtol=0,
            atol=1e-15,
        )
        learned = bound_term(schedule, "learned", x_0, TIMES, x_0, all_of_it)
        torch.testing.assert_close(learned, bound_term(schedule, "beta", x_0, TIMES, x_0), rtol=1e-7, atol=1e-12)

    def test_the_step_to_the_data_is_the_decoder_s(self):
        schedule, first = linear_schedule(), torch.zeros(6, dtype=torch.long)
        x_0 = PIXELS[torch.randint(256, SHAPE, generator=torch.Generator().manual_seed(0))]
        estimate = x_0 + 0.01 * random(*SHAPE)
        log_variance = schedule.betas[0].log()
        for decoder, law in (("discrete", discrete_log_likelihood), ("gaussian", gaussian_log_likelihood)):
            found = bound_term(schedule, "beta", x_0, first, estimate, decoder=decoder)
            torch.testing.assert_close(found, -law(x_0, estimate, log_variance).flatten(1).mean(1))

    def test_float32_is_good_enough_to_train_with(self):
        x_0, estimate, fraction = random(*SHAPE), random(*SHAPE, seed=1), torch.rand(SHAPE, dtype=torch.float64)
        exact = bound_term(linear_schedule(), "learned", x_0, TIMES, estimate, fraction)
        single = bound_term(linear_schedule(), "learned", x_0.float(), TIMES, estimate.float(), fraction.float())
        torch.testing.assert_close(single, exact.float(), rtol=1e-4, atol=1e-7)

    def test_the_gradient_reaches_the_variance_and_not_a_detached_estimate(self):
        fraction = torch.full((2, 1, 2, 2), 0.5, requires_grad=True)
        x_0 = torch.zeros(2, 1, 2, 2)
        for error, sign in ((0.0, 1.0), (3.0, -1.0)):  # too wide for a good estimate, too narrow for a bad one
            fraction.grad = None
            bound_term(linear_schedule(), "learned", x_0, torch.tensor([1, 5]), x_0 + error, fraction).sum().backward()
            assert torch.equal(fraction.grad.sign(), torch.full_like(fraction, sign))

    def test_a_learned_variance_without_a_fraction_is_refused(self):
        with pytest.raises(ValueError, match=r"change `stage\.denoiser\.variance`"):
            bound_term(linear_schedule(), "learned", random(*SHAPE), TIMES, random(*SHAPE))

    @pytest.mark.parametrize("schedule", [linear_schedule(), cosine_schedule(20)])
    def test_the_prior_is_a_divergence_from_the_standard_normal(self, schedule):
        x_0 = random(*SHAPE)
        end = Normal(schedule.alpha[-1] * x_0, schedule.sigma[-1])
        expected = kl_divergence(end, Normal(torch.zeros_like(x_0), 1.0)).flatten(1).mean(1)
        torch.testing.assert_close(prior_term(schedule, x_0), expected, rtol=1e-6, atol=1e-12)

    def test_the_prior_costs_nothing_without_terminal_signal(self):
        assert torch.equal(
            prior_term(linear_schedule(zero_terminal_snr=True), random(*SHAPE)), torch.zeros(6, dtype=torch.float64)
        )


class TestBound:
    @pytest.mark.parametrize("betas", [[0.3, 0.5, 0.7], [0.02, 0.1, 0.2, 0.4, 0.6, 0.8]])
    def test_of_an_exact_model_is_the_analytic_likelihood(self, betas, gaussian, nothing):
        """For x_0 ~ N(0, 1) the reverse of the chain is Gaussian with its own betas, and no step loses anything."""
        denoiser = gaussian(NoiseSchedule(torch.tensor(betas)), 0.0, 1.0, variance="beta")
        for value in (0.0, 1.0, -2.5):
            x_0 = torch.full((64, 1, 16, 16), value)
            bound = variational_bound(denoiser, x_0, nothing, keys(64), "gaussian")
            exact = (0.5 * value**2 + 0.5 * math.log(2 * math.pi)) / math.log(2)
            assert float(bound.total.mean()) == pytest.approx(exact, abs=4 * float(bound.total.std()) / 8 + 1e-6)
            assert float(bound.total.std()) < 0.3

    def test_of_a_fine_chain_approaches_the_likelihood_from_above(self, gaussian, nothing):
        """No fixed variance is exact for another Gaussian; what is lost falls with the number of steps."""
        x_0 = MEAN + STD * random(128, 1, 16, 16)
        exact = -Normal(MEAN, STD).log_prob(x_0).flatten(1).mean(1) / math.log(2)
        excess, error = [], 0.0
        for num_steps in (25, 50, 100):
            schedule = scaled_linear_schedule(num_steps, 0.02 / num_steps, 20.0 / num_steps)
            bound = variational_bound(gaussian(schedule, variance="beta"), x_0, nothing, keys(128), "gaussian")
            excess.append(float((bound.total - exact).mean()))
            error = float((bound.total - exact).std()) / 128**0.5
        assert excess == sorted(excess, reverse=True)
        assert excess[0] > 0.05
        assert excess[-1] == pytest.approx(0.0, abs=0.01 + 3 * error)
        assert error < 0.01

    def test_of_data_the_model_knows_is_the_decoder_and_the_prior(self, nothing):
        x_0 = PIXELS[torch.randint(1, 255, (4, 3, 4, 4), generator=torch.Generator().manual_seed(0))]

        class Knows:
            schedule, variance = linear_schedule(50), "posterior"

            def __call__(self, x_t, t, conditioning):
                return Denoised(x_0.float(), noise_from_x_0(x_t, x_0.float(), *self.schedule.scales(t, 4)))

        bound = variational_bound(Knows(), x_0, nothing, keys(4), "discrete")
        assert float(bound.terms.abs().max()) < 1e-9  # of float32 pixels
        torch.testing.assert_close(bound.total, bound.prior + bound.decoder, rtol=0, atol=1e-9)
        schedule = Knows.schedule
        variance = schedule.betas[1] * schedule.betas[0] / (1 - schedule.alpha_bar[1])
        central_bin = torch.erf(1 / 255 / (2 * variance).sqrt())
        torch.testing.assert_close(bound.decoder, -central_bin.log2().expand(4), rtol=1e-5, atol=0)

    def test_parts_add_up(self, gaussian, nothing):
        bound = variational_bound(gaussian(linear_schedule(30)), random(4, 1, 2, 2), nothing, keys(4), "gaussian")
        assert bound.times.tolist() == [list(range(1, 30))] * 4
        torch.testing.assert_close(bound.terms.sum(1), bound.steps)
        torch.testing.assert_close(bound.prior + bound.steps + bound.decoder, bound.total)
        assert (bound.terms >= 0).all()

    def test_an_example_s_bound_is_its_own(self, gaussian, nothing):
        denoiser, x_0 = gaussian(linear_schedule(30)), random(6, 1, 2, 2)
        whole = variational_bound(denoiser, x_0, nothing, keys(6), "gaussian", num_times=7)
        for i in range(6):
            one = variational_bound(denoiser, x_0[i : i + 1], nothing, keys(1, first=i), "gaussian", num_times=7)
            for together, alone in zip(whole, one, strict=True):
                torch.testing.assert_close(together[i : i + 1], alone)

    def test_a_few_times_estimate_the_sum_of_all_without_bias(self, gaussian, nothing):
        count = 512
        denoiser, x_0 = gaussian(linear_schedule(200)), (MEAN + STD * random(1, 1, 4, 4)).expand(count, 1, 4, 4)
        whole = variational_bound(denoiser, x_0[:64], nothing, keys(64), "gaussian")
        few = variational_bound(denoiser, x_0, nothing, keys(count, epoch=1), "gaussian", num_times=40)
        error = float(few.steps.std()) / count**0.5 + float(whole.steps.std()) / 8
        assert float(few.steps.mean()) == pytest.approx(float(whole.steps.mean()), abs=4 * error)
        assert error < 0.05 * float(whole.steps.mean())

    @pytest.mark.parametrize("num_times", [1, 8, 29])
    def test_each_stratum_gives_one_time(self, num_times, gaussian, nothing):
        x_0 = random(640, 1, 1, 1)
        few = variational_bound(gaussian(linear_schedule(30)), x_0, nothing, keys(640), "gaussian", num_times)
        edges = [1 + i * 29 // num_times for i in range(num_times + 1)]
        for i, times in enumerate(few.times.unbind(1)):
            assert set(times.tolist()) == set(range(edges[i], edges[i + 1]))

    def test_a_clip_keeps_estimates_among_the_pixels(self, nothing):
        class Far:
            schedule, variance = linear_schedule(20), "beta"

            def __init__(self, value):
                self.value = value

            def __call__(self, x_t, t, conditioning):
                return Denoised(torch.full_like(x_t, self.value), x_t)

        x_0 = torch.ones(2, 1, 2, 2)
        far, near = (variational_bound(Far(v), x_0, nothing, keys(2), "discrete", clip_x_0=1.0) for v in (9.0, 1.0))
        assert torch.equal(far.total, near.total)

    @pytest.mark.parametrize("num_times", [0, 30])
    def test_impossible_numbers_of_times_are_refused(self, num_times, gaussian):
        with pytest.raises(ValueError, match=r"allowed are 1 to 29.* change `callbacks\.likelihood\.num_times`"):
            variational_bound(
                gaussian(linear_schedule(30)), random(1, 1, 1, 1), Conditioning(), keys(1), "gaussian", num_times
            )
