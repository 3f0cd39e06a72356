import pytest
import torch
from torch import nn

from ldm_train.diffusion import PREDICTIONS, Denoiser, DiffusionObjective, linear_schedule
from ldm_train.diffusion.process import add_noise
from ldm_train.randomness import Stream, normal


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_a_perfect_denoiser_has_no_loss(prediction, gamma, perfect, nothing, rng):
    x_0 = torch.randn(32, 3, 4, 4, generator=rng)
    denoiser = perfect(x_0, linear_schedule(), prediction)
    loss = DiffusionObjective(gamma)(denoiser, x_0, nothing, 0, 0, torch.arange(32))
    assert float(loss.per_example.max()) < 1e-6


class Constant(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, x_t, t, conditioning):
        return torch.full_like(x_t, self.value)


def test_predicting_no_noise_costs_its_variance(nothing, rng):
    x_0 = torch.randn(512, 3, 8, 8, generator=rng)
    loss = DiffusionObjective()(Denoiser(Constant(0.0), linear_schedule()), x_0, nothing, 0, 0, torch.arange(512))
    assert float(loss.per_example.mean()) == pytest.approx(1.0, abs=4 * (2 / x_0.numel()) ** 0.5)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weighs_one_error_alike_in_every_parameterisation(prediction, nothing):
    """The weighted loss equals min(SNR, gamma) times the square error of x_0, whatever the network predicts."""
    schedule, gamma, ids = linear_schedule(), 5.0, torch.arange(64)
    x_0 = torch.randn(64, 2, 4, 4, generator=torch.Generator().manual_seed(1))
    denoiser = Denoiser(Constant(0.3), schedule, prediction)
    loss = DiffusionObjective(gamma)(denoiser, x_0, nothing, 0, 0, ids)
    noise = normal(0, 0, ids, Stream.NOISE, (2, 4, 4))
    x_t = add_noise(schedule, x_0, noise, loss.t)
    error = (denoiser(x_t, loss.t, nothing).x_0 - x_0).double().square().flatten(1).mean(1)
    expected = schedule.signal_to_noise()[loss.t].clamp(max=gamma) * error
    torch.testing.assert_close(loss.per_example.double(), expected, rtol=2e-3, atol=1e-6)


def test_the_loss_of_a_sample_does_not_depend_on_its_batch(nothing, rng):
    x_0 = torch.randn(8, 3, 4, 4, generator=rng)
    objective, denoiser = DiffusionObjective(), Denoiser(Constant(0.1), linear_schedule())
    whole = objective(denoiser, x_0, nothing, 3, 2, torch.arange(8))
    halves = [objective(denoiser, x_0[part], nothing, 3, 2, torch.arange(8)[part]) for part in (slice(4), slice(4, 8))]
    assert torch.equal(whole.per_example, torch.cat([half.per_example for half in halves]))
    other_epoch = objective(denoiser, x_0, nothing, 3, 3, torch.arange(8))
    assert not bool((other_epoch.t == whole.t).all())


def test_times_are_uniform():
    t = DiffusionObjective().draw_times(1000, 0, 0, torch.arange(200_000))
    assert t.min() == 0
    assert t.max() == 999
    counts = torch.bincount(t // 100)
    assert (counts - 20_000).abs().max() < 4.5 * 18_000**0.5


def test_gamma_must_be_positive():
    with pytest.raises(ValueError, match=r"allowed are positive numbers .* change `objective.min_snr_gamma`"):
        DiffusionObjective(0.0)
