import pytest
import torch

from ldm_train.diffusion import cosine_schedule, linear_schedule, process, scaled_linear_schedule
from ldm_train.diffusion.process import add_noise, one_step, posterior

SCHEDULES = [linear_schedule(200), scaled_linear_schedule(200), cosine_schedule(200)]
X = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def column(value):
    return value.view(-1, 1, 1, 1)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_steps_of_the_chain_compose_to_the_closed_form(schedule):
    mean, variance = X[:1], torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in range(100):
        step = one_step(schedule, mean, torch.tensor([t]))
        scale = 1 - step.variance
        mean, variance = step.mean, scale * variance + step.variance
    torch.testing.assert_close(mean, schedule.alpha_bar[99].sqrt() * X[:1])
    torch.testing.assert_close(variance.flatten(), 1 - schedule.alpha_bar[99:100])


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_posterior_agrees_with_bayes_rule_in_ddpm_form(schedule):
    """Ho et al. (2020), eq. 7, with betas, against the form for any pair of times."""
    t = torch.tensor([1, 7, 50, 199])
    alpha_bar, previous, beta = (
        column(table) for table in (schedule.alpha_bar[t], schedule.alpha_bar[t - 1], schedule.betas[t])
    )
    noise = X.flip(0)
    x_t = alpha_bar.sqrt() * X + (1 - alpha_bar).sqrt() * noise
    found = posterior(X, x_t, (previous.sqrt(), alpha_bar.sqrt()), ((1 - previous).sqrt(), (1 - alpha_bar).sqrt()))
    mean = previous.sqrt() * beta / (1 - alpha_bar) * X + (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar) * x_t
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, (1 - previous) / (1 - alpha_bar) * beta)


def test_the_posterior_of_clean_data_is_the_data():
    one, zero = torch.ones(()), torch.zeros(())
    found = posterior(X, X * 0.5, (one, torch.tensor(0.6)), (zero, torch.tensor(0.8)))
    torch.testing.assert_close(found.mean, X)
    assert float(found.variance) == 0


def test_parameterisations_are_inverse_to_one_another():
    schedule = linear_schedule()
    t = torch.tensor([0, 10, 500, 999])
    alpha, sigma = (scale.double() for scale in schedule.scales(t, 4))
    noise = X.flip(0)
    x_t = add_noise(schedule, X, noise, t)
    # alpha_999 = 0.006, so x_0 from the noise loses three digits of float32 tables there
    torch.testing.assert_close(process.x_0_from_noise(x_t, noise, alpha, sigma), X, atol=1e-9, rtol=1e-9)
    torch.testing.assert_close(process.noise_from_x_0(x_t, X, alpha, sigma), noise, atol=1e-9, rtol=1e-9)
    v = process.velocity(X, noise, alpha, sigma)
    torch.testing.assert_close(process.x_0_from_velocity(x_t, v, alpha, sigma), X, atol=1e-6, rtol=1e-6)
