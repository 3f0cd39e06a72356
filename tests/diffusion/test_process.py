import pytest
import torch

from ldm_train.diffusion import cosine_schedule, linear_schedule, process, scaled_linear_schedule
from ldm_train.diffusion.process import add_noise, one_step, posterior, posterior_from_noise, reverse_variance

SCHEDULES = [linear_schedule(200), scaled_linear_schedule(200), cosine_schedule(200)]
TERMINAL = scaled_linear_schedule(200, zero_terminal_snr=True)
X = torch.randn(4, 3, 2, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
T, S = torch.tensor([1, 7, 50, 199]), torch.tensor([0, 3, 10, 150])  # pairs of times, s before t


def column(value):
    return value.view(-1, 1, 1, 1)


def scales(schedule, t, s):
    (alpha_s, sigma_s), (alpha_t, sigma_t) = (schedule.scales(time, 4, torch.float64) for time in (s, t))
    return (alpha_s, alpha_t), (sigma_s, sigma_t)


def variance(schedule, kind, t, s, fraction=None):
    return reverse_variance(schedule, kind, t, s, 4, fraction, torch.float64)


@pytest.mark.parametrize("schedule", [*SCHEDULES, TERMINAL], ids=lambda s: s.name)
def test_steps_of_the_chain_compose_to_the_closed_form(schedule):
    mean, spread = X[:1], torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    for t in range(200):
        step = one_step(schedule, mean, torch.tensor([t]))
        torch.testing.assert_close(step.variance.flatten(), schedule.betas[t : t + 1], rtol=1e-9, atol=0)
        mean, spread = step.mean, (1 - step.variance) * spread + step.variance
        torch.testing.assert_close(mean, schedule.alpha[t] * X[:1], rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(spread.flatten(), 1 - schedule.alpha_bar[t : t + 1])


def test_noise_is_added_in_the_precision_of_the_data():
    schedule, noise = linear_schedule(), X.flip(0)
    t = torch.tensor([0, 10, 500, 999])
    exact = column(schedule.alpha[t]) * X + column(schedule.sigma[t]) * noise
    torch.testing.assert_close(add_noise(schedule, X, noise, t), exact, rtol=1e-15, atol=1e-15)
    half = add_noise(schedule, X.bfloat16(), noise.bfloat16(), t)
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), exact, rtol=0.01, atol=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_posterior_agrees_with_bayes_rule_in_ddpm_form(schedule):
    """Ho et al. (2020), eq. 7, with betas, against the form for any pair of times."""
    alpha_bar, previous, beta = (
        column(table) for table in (schedule.alpha_bar[T], schedule.alpha_bar[T - 1], schedule.betas[T])
    )
    x_t = alpha_bar.sqrt() * X + (1 - alpha_bar).sqrt() * X.flip(0)
    found = posterior(X, x_t, *scales(schedule, T, T - 1))
    mean = previous.sqrt() * beta / (1 - alpha_bar) * X + (1 - beta).sqrt() * (1 - previous) / (1 - alpha_bar) * x_t
    torch.testing.assert_close(found.mean, mean)
    torch.testing.assert_close(found.variance, (1 - previous) / (1 - alpha_bar) * beta)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("s", [T - 1, S, torch.full_like(T, -1)], ids=["one step", "several", "to the data"])
def test_both_forms_of_the_posterior_agree(schedule, s):
    """From x_0 (Ho et al. 2020, eq. 7) and from the noise (eq. 11)."""
    alpha, sigma = scales(schedule, T, s)
    noise = X.flip(0)
    x_t = alpha[1] * X + sigma[1] * noise
    from_data, from_noise = posterior(X, x_t, alpha, sigma), posterior_from_noise(x_t, noise, alpha, sigma)
    torch.testing.assert_close(from_noise.mean, from_data.mean, rtol=1e-7, atol=1e-9)
    assert torch.equal(from_noise.variance, from_data.variance)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
def test_the_noise_form_is_that_of_the_paper(schedule):
    beta, alpha_bar = column(schedule.betas[T]), column(schedule.alpha_bar[T])
    noise = X.flip(0)
    x_t = alpha_bar.sqrt() * X + (1 - alpha_bar).sqrt() * noise
    mean = (x_t - beta / (1 - alpha_bar).sqrt() * noise) / (1 - beta).sqrt()
    torch.testing.assert_close(posterior_from_noise(x_t, noise, *scales(schedule, T, T - 1)).mean, mean)


@pytest.mark.parametrize("schedule", [*SCHEDULES, TERMINAL], ids=lambda s: s.name)
def test_a_step_forward_and_the_posterior_back_leave_the_marginal_unchanged(schedule):
    """The law of total expectation and variance for q(x_s | x_0) = E over x_t of q(x_s | x_t, x_0)."""
    alpha, sigma = scales(schedule, T, S)
    back = posterior(X, alpha[1] * X, alpha, sigma)
    torch.testing.assert_close(back.mean, alpha[0] * X)
    slope = posterior(X * 0, torch.ones_like(X), alpha, sigma).mean[:, :1, :1, :1]
    torch.testing.assert_close(slope**2 * sigma[1] ** 2 + back.variance, sigma[0] ** 2)


def test_the_posterior_of_clean_data_is_the_data():
    one, zero = torch.ones(()), torch.zeros(())
    found = posterior(X, X * 0.5, (one, torch.tensor(0.6)), (zero, torch.tensor(0.8)))
    torch.testing.assert_close(found.mean, X)
    assert float(found.variance) == 0


@pytest.mark.parametrize("schedule", [*SCHEDULES, TERMINAL], ids=lambda s: s.name)
def test_the_fixed_variances_are_exact_for_normal_data_and_for_a_point(schedule):
    alpha, sigma = scales(schedule, T, S)
    # x_s and x_t of normal data are normal too, with correlation alpha_t / alpha_s
    torch.testing.assert_close(variance(schedule, "beta", T, S), 1 - (alpha[1] / alpha[0]) ** 2)
    torch.testing.assert_close(variance(schedule, "posterior", T, S), posterior(X, X, alpha, sigma).variance)
    steps = torch.arange(200)
    found = variance(schedule, "beta", steps, steps - 1).flatten()
    torch.testing.assert_close(found, schedule.betas, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [*SCHEDULES, TERMINAL], ids=lambda s: s.name)
def test_a_learned_variance_lies_between_the_fixed_ones_on_a_logarithmic_scale(schedule):
    low, high = variance(schedule, "posterior", T, S), variance(schedule, "beta", T, S)
    for share in (-0.5, 0.0, 0.3, 1.0, 1.5):
        found = variance(schedule, "learned", T, S, torch.full_like(X, share))
        torch.testing.assert_close(found, (high**share * low ** (1 - share)).expand_as(X))


@pytest.mark.parametrize("schedule", [*SCHEDULES, TERMINAL], ids=lambda s: s.name)
def test_the_first_step_borrows_the_posterior_variance_of_the_second(schedule):
    first, second = torch.tensor([0]), torch.tensor([1])
    borrowed = variance(schedule, "posterior", second, first)
    torch.testing.assert_close(variance(schedule, "posterior", first, first - 1), borrowed, rtol=1e-9, atol=0)
    learned = variance(schedule, "learned", first, first - 1, torch.full((1, 1, 1, 1), 0.5))
    torch.testing.assert_close(learned**2, borrowed * schedule.betas[0], rtol=1e-7, atol=0)


def test_a_learned_variance_needs_its_fraction():
    with pytest.raises(ValueError, match=r"no variance fraction; allowed .* change `stage.denoiser.variance`"):
        reverse_variance(SCHEDULES[0], "learned", T, S)


def test_parameterisations_are_inverse_to_one_another():
    schedule = linear_schedule()
    t = torch.tensor([0, 10, 500, 999])
    alpha, sigma = schedule.scales(t, 4, torch.float64)
    noise = X.flip(0)
    x_t = add_noise(schedule, X, noise, t)
    torch.testing.assert_close(process.x_0_from_noise(x_t, noise, alpha, sigma), X, atol=1e-12, rtol=1e-12)
    torch.testing.assert_close(process.noise_from_x_0(x_t, X, alpha, sigma), noise, atol=1e-12, rtol=1e-12)
    v = process.velocity(X, noise, alpha, sigma)
    torch.testing.assert_close(process.x_0_from_velocity(x_t, v, alpha, sigma), X, atol=1e-12, rtol=1e-12)
