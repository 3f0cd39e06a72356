import pytest
import torch
from torch import nn

from ldm_train.diffusion import PREDICTIONS, VARIANCES, Denoiser, linear_schedule, scaled_linear_schedule
from ldm_train.diffusion.process import add_noise

T = torch.tensor([0, 100, 400, 700, 900])


class Declared(nn.Module):
    """A network that says how many channels it has."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels


class Given(nn.Module):
    """A network with a fixed output."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, x_t, t, conditioning):
        return self.output


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_read_back_as_the_data_and_noise_it_was_made_of(prediction, perfect, nothing, rng):
    schedule = linear_schedule()
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=rng)
    x_t = add_noise(schedule, x_0, noise, T)
    denoised = perfect(x_0, schedule, prediction)(x_t, T, nothing)
    torch.testing.assert_close(denoised.x_0, x_0, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(denoised.noise, noise, atol=2e-3, rtol=1e-3)
    assert denoised.variance_fraction is None


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_estimates_of_data_and_noise_make_up_what_was_seen(prediction, nothing, rng):
    """x_t = alpha_t x_0 + sigma_t noise, whatever the network says."""
    x_t, output = torch.randn(2, 5, 3, 4, 4, generator=rng)
    denoised = Denoiser(Given(output), linear_schedule(), prediction)(x_t, T, nothing)
    torch.testing.assert_close(add_noise(linear_schedule(), *denoised[:2], T), x_t, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_learned_variance_is_read_from_the_second_half_of_the_channels(prediction, nothing, rng):
    x_t, output, place = torch.randn(3, 5, 3, 4, 4, generator=rng)
    schedule = linear_schedule()
    learned = Denoiser(Given(torch.cat([output, place], dim=1)), schedule, prediction, "learned")
    fixed = Denoiser(Given(output), schedule, prediction, "beta")
    denoised, expected = learned(x_t, T, nothing), fixed(x_t, T, nothing)
    assert torch.equal(denoised.x_0, expected.x_0)
    assert torch.equal(denoised.noise, expected.noise)
    torch.testing.assert_close(2 * denoised.variance_fraction - 1, place)
    raw = learned.predict(x_t, T, nothing)
    assert torch.equal(raw.output, output)
    assert torch.equal(raw.variance_fraction, denoised.variance_fraction)


def test_what_a_network_says_in_half_precision_is_interpreted_in_single(nothing, rng):
    x_t, output = torch.randn(2, 5, 3, 4, 4, generator=rng)
    half = output.bfloat16()
    found = Denoiser(Given(half), linear_schedule())(x_t, T, nothing)
    assert torch.equal(found.x_0, Denoiser(Given(half.float()), linear_schedule())(x_t, T, nothing).x_0)


@pytest.mark.parametrize("variance", VARIANCES)
def test_a_network_of_other_channels_is_refused(variance, nothing):
    right = 8 if variance == "learned" else 4
    assert Denoiser(Declared(4, right), linear_schedule(), variance=variance).variance == variance
    message = rf"has {12 - right} output channels; allowed are {right} .* `unet.out_channels` or `stage.denoiser.varia"
    with pytest.raises(ValueError, match=message):
        Denoiser(Declared(4, 12 - right), linear_schedule(), variance=variance)
    silent = Denoiser(Given(torch.zeros(1, 12 - right, 2, 2)), linear_schedule(), variance=variance)
    with pytest.raises(ValueError, match=message):
        silent(torch.zeros(1, 4, 2, 2), torch.tensor([0]), nothing)


def test_epsilon_and_zero_terminal_snr_contradict():
    schedule = scaled_linear_schedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"stage.denoiser.prediction=v.*schedule.zero_terminal_snr=false"):
        Denoiser(nn.Identity(), schedule, "epsilon")
    assert Denoiser(nn.Identity(), schedule, "v").schedule is schedule


@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_pure_noise_is_denoised_to_what_the_network_says(prediction, nothing, rng):
    """Without any signal x_0 is -v, and all that is seen is the noise."""
    schedule = scaled_linear_schedule(zero_terminal_snr=True)
    x_t, output = torch.randn(2, 5, 3, 4, 4, generator=rng)
    denoised = Denoiser(Given(output), schedule, prediction)(x_t, torch.full((5,), 999), nothing)
    assert torch.equal(denoised.x_0, -output if prediction == "v" else output)
    assert torch.equal(denoised.noise, x_t)


def test_an_unknown_prediction_or_variance_is_refused():
    with pytest.raises(ValueError, match=r"'noise' is unknown; allowed are epsilon, v, x_0; change"):
        Denoiser(nn.Identity(), linear_schedule(), "noise")
    with pytest.raises(ValueError, match=r"'small' is unknown; allowed are posterior, beta, learned; change"):
        Denoiser(nn.Identity(), linear_schedule(), variance="small")
