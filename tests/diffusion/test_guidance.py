import math

import pytest
import torch

from ldm_train.batch import Conditioning
from ldm_train.diffusion import (
    ClassifierFreeGuidance,
    DDIMSampler,
    Denoised,
    Denoiser,
    DPMSolverSampler,
    cosine_schedule,
    linear_schedule,
    scaled_linear_schedule,
)
from ldm_train.diffusion.process import noise_from_x_0, velocity

TIMES = torch.tensor([10, 400, 999])


class Echo:
    """Denoises to its context's mean times a fixed pattern, with a fraction of its own, and counts its images."""

    def __init__(self, schedule=None):
        self.schedule = schedule or linear_schedule()
        self.variance = "learned"
        self.images = 0
        self.pattern = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def __call__(self, x_t, t, conditioning):
        self.images += len(x_t)
        value = conditioning.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        x_0 = value * self.pattern + value**2
        noise = noise_from_x_0(x_t, x_0, *self.schedule.scales(t, 4))
        return Denoised(x_0, noise, value.expand_as(x_t) / 10)


def given(value, count=3):
    return Conditioning(context=torch.full((count, 2, 4), value))


def state():
    return torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(1))


def spread(denoised, schedule):
    v = velocity(denoised.x_0, denoised.noise, *schedule.scales(TIMES, 4))
    return v.flatten(1).std(1)


@pytest.mark.parametrize("scale", [0.0, 0.5, 3.0, 7.5])
def test_guidance_extrapolates_from_null_to_condition(scale):
    denoiser, x = Echo(), state()
    null, conditional = denoiser(x, TIMES, given(1.0)), denoiser(x, TIMES, given(5.0))
    guided = ClassifierFreeGuidance(scale)(denoiser, given(1.0))(x, TIMES, given(5.0))
    for estimate, low, high in zip(guided[:2], null[:2], conditional[:2], strict=True):
        torch.testing.assert_close(estimate, low + scale * (high - low), rtol=1e-5, atol=1e-4)


def test_scale_one_is_the_conditional_denoiser_itself():
    denoiser = Echo()
    assert ClassifierFreeGuidance(1.0, rescale=0.7, interval=(0.1, 1.0))(denoiser, given(0.0)) is denoiser


def test_schedule_variance_and_fraction_are_those_of_the_conditional_model():
    denoiser = Echo()
    guided = ClassifierFreeGuidance(3.0)(denoiser, given(1.0))
    assert guided.schedule is denoiser.schedule
    assert guided.variance == "learned"
    torch.testing.assert_close(guided(state(), TIMES, given(5.0)).variance_fraction, torch.full((3, 2, 4, 4), 0.5))


def test_another_condition_as_null_is_a_negative_prompt():
    """What is asked for and what is not wanted, at opposite scales, are one and the same."""
    denoiser, x = Echo(), state()
    towards = ClassifierFreeGuidance(3.0)(denoiser, given(2.0))(x, TIMES, given(5.0))
    null, conditional = denoiser(x, TIMES, given(2.0)).x_0, denoiser(x, TIMES, given(5.0)).x_0
    torch.testing.assert_close(towards.x_0 - conditional, 2 * (conditional - null), rtol=1e-5, atol=1e-4)


class TestRescale:
    def test_one_gives_the_guided_v_the_conditional_spread(self):
        denoiser, x = Echo(), state()
        conditional = denoiser(x, TIMES, given(5.0))
        guided = ClassifierFreeGuidance(7.5, rescale=1.0)(denoiser, given(1.0))(x, TIMES, given(5.0))
        torch.testing.assert_close(spread(guided, denoiser.schedule), spread(conditional, denoiser.schedule))

    def test_shares_in_between_are_linear(self):
        """Lin et al. (2024), eq. 16."""
        denoiser, x = Echo(), state()
        none, half, whole = (
            ClassifierFreeGuidance(7.5, rescale=phi)(denoiser, given(1.0))(x, TIMES, given(5.0))
            for phi in (0.0, 0.5, 1.0)
        )
        torch.testing.assert_close(half.x_0, (none.x_0 + whole.x_0) / 2, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(none.x_0, whole.x_0)

    def test_estimates_of_data_and_noise_still_make_up_the_state(self):
        schedule = scaled_linear_schedule(zero_terminal_snr=True)
        x = state()
        guided = ClassifierFreeGuidance(7.5, rescale=0.7)(Echo(schedule), given(1.0))(x, TIMES, given(5.0))
        alpha, sigma = schedule.scales(TIMES, 4)
        torch.testing.assert_close(alpha * guided.x_0 + sigma * guided.noise, x, rtol=1e-4, atol=1e-4)


class TestInterval:
    def test_it_guides_inside_and_leaves_the_conditional_model_alone_outside(self):
        denoiser, x = Echo(), state()
        alpha, sigma = denoiser.schedule.scales(TIMES, 1)
        ratio = (sigma / alpha).tolist()
        conditional = denoiser(x, TIMES, given(5.0)).x_0
        everywhere = ClassifierFreeGuidance(3.0)(denoiser, given(1.0))(x, TIMES, given(5.0)).x_0
        for interval, inside in (((ratio[0], 10 * ratio[1]), 1), ((0.0, 2 * ratio[0]), 0), ((ratio[1], math.inf), 2)):
            guided = ClassifierFreeGuidance(3.0, interval=interval)(denoiser, given(1.0))(x, TIMES, given(5.0)).x_0
            for i in range(3):
                torch.testing.assert_close(guided[i], (everywhere if i == inside else conditional)[i])

    def test_outside_costs_one_evaluation(self):
        for interval, images in (((1e-6, 1e-5), 3), ((0.0, math.inf), 6)):
            denoiser = Echo()
            ClassifierFreeGuidance(3.0, interval=interval)(denoiser, given(1.0))(state(), TIMES, given(5.0))
            assert denoiser.images == images

    def test_the_end_without_signal_is_infinitely_noisy(self):
        denoiser = Echo(linear_schedule(zero_terminal_snr=True))
        t = torch.full((3,), 999)
        for high, images in ((1e9, 3), (math.inf, 6)):
            denoiser.images = 0
            ClassifierFreeGuidance(3.0, interval=(0.5, high))(denoiser, given(1.0))(state(), t, given(5.0))
            assert denoiser.images == images


@pytest.mark.parametrize("sampler", [DDIMSampler(10), DPMSolverSampler(10)], ids=lambda s: type(s).__name__)
def test_samplers_of_a_gaussian_go_to_its_guided_mean(sampler, gaussian):
    """Guiding from a point at 0 towards a point at 0.5 by w ends at 0.5 w, whatever the noise."""

    class Points:
        def __init__(self):
            self.schedule, self.variance = linear_schedule(), "posterior"

        def __call__(self, x_t, t, conditioning):
            return gaussian(self.schedule, conditioning.context[:, :1, :1, None], 0.0)(x_t, t, conditioning)

    denoiser = ClassifierFreeGuidance(3.0)(Points(), given(0.0))
    x = sampler(denoiser, torch.randn(3, 1, 2, 2), given(0.5), 1, torch.arange(3))
    torch.testing.assert_close(x, torch.full_like(x, 1.5))


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        ({"scale": -1.0}, "scale"),
        ({"rescale": 1.5}, "rescale"),
        ({"rescale": -0.1}, "rescale"),
        ({"interval": [1.0]}, "interval"),
        ({"interval": [2.0, 1.0]}, "interval"),
        ({"interval": [-1.0, 1.0]}, "interval"),
    ],
)
def test_what_cannot_be_is_refused(arguments, key):
    with pytest.raises(ValueError, match=rf"allowed are .*; change `guidance\.{key}`"):
        ClassifierFreeGuidance(**arguments)


@pytest.mark.parametrize("schedule", [cosine_schedule(), linear_schedule(zero_terminal_snr=True)])
@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_a_network_that_says_nothing_yet_is_rescaled_to_nothing(schedule, prediction):
    """As every U-Net at its start, whose last layer is zero: there is no spread to give back."""
    denoiser = Denoiser(lambda x_t, t, conditioning: torch.zeros_like(x_t), schedule, prediction)
    x, t = state(), TIMES
    guided = ClassifierFreeGuidance(7.5, rescale=0.7)(denoiser, given(0.0))(x, t, given(1.0))
    for found, plain in zip(guided[:2], denoiser(x, t, given(1.0))[:2], strict=True):
        torch.testing.assert_close(found, plain)
