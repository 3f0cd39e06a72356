import pytest
import torch
from torch import nn

from ldm_train.diffusion import PREDICTIONS, Denoiser, linear_schedule, scaled_linear_schedule
from ldm_train.diffusion.process import add_noise


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_target_is_read_back_as_the_data_and_noise_it_was_made_of(prediction, perfect, nothing, rng):
    schedule = linear_schedule()
    x_0, noise = torch.randn(2, 5, 3, 4, 4, generator=rng)
    t = torch.tensor([0, 100, 400, 700, 900])
    x_t = add_noise(schedule, x_0, noise, t)
    denoised = perfect(x_0, schedule, prediction)(x_t, t, nothing)
    torch.testing.assert_close(denoised.x_0, x_0, atol=2e-4, rtol=1e-4)
    torch.testing.assert_close(denoised.noise, noise, atol=2e-3, rtol=1e-3)


def test_epsilon_and_zero_terminal_snr_contradict():
    schedule = scaled_linear_schedule(zero_terminal_snr=True)
    with pytest.raises(ValueError, match=r"stage.denoiser.prediction=v.*schedule.zero_terminal_snr=false"):
        Denoiser(nn.Identity(), schedule, "epsilon")
    assert Denoiser(nn.Identity(), schedule, "v").schedule is schedule


def test_an_unknown_prediction_is_refused():
    with pytest.raises(ValueError, match=r"'noise' is unknown; allowed are epsilon, v, x_0; change"):
        Denoiser(nn.Identity(), linear_schedule(), "noise")
