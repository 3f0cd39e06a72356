import pytest
import torch

from ldm_train.diffusion import (
    P2,
    PREDICTIONS,
    Debiased,
    MinSNR,
    Uniform,
    VariationalBound,
    cosine_schedule,
    linear_schedule,
    process,
    scaled_linear_schedule,
)
from ldm_train.diffusion.likelihood import bound_term

SCHEDULES = [linear_schedule(100), scaled_linear_schedule(100), cosine_schedule(100)]
TERMINAL = scaled_linear_schedule(100, zero_terminal_snr=True)
T = torch.arange(100)
BOUNDS = [VariationalBound(), VariationalBound("beta")]
WEIGHTINGS = [MinSNR(), MinSNR(1.0), P2(), P2(0.5, 2.0), Debiased(), *BOUNDS]

schedules = pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)


@pytest.fixture
def estimates(rng):
    """Data, noise and a wrong estimate of the data, at each of the times."""
    return torch.randn(3, 100, 2, 3, 3, generator=rng, dtype=torch.float64)


def square_error(schedule, prediction, x_0, noise, estimate):
    """The mean square error of what `prediction` is, at every time, if the estimate of x_0 is this one: (T,)."""
    alpha, sigma = schedule.scales(T, 4, torch.float64)
    x_t = alpha * x_0 + sigma * noise
    implied = process.noise_from_x_0(x_t, estimate, alpha, sigma)
    errors = {
        "x_0": x_0 - estimate,
        "epsilon": noise - implied,
        "v": process.velocity(x_0, noise, alpha, sigma) - process.velocity(estimate, implied, alpha, sigma),
    }
    return errors[prediction].square().flatten(1).mean(1)


@schedules
@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: f"{type(w).__name__}-{vars(w)}")
def test_one_mistake_costs_the_same_in_every_parameterisation(weighting, schedule, estimates):
    costs = [weighting.weight(schedule, p) * square_error(schedule, p, *estimates) for p in PREDICTIONS]
    torch.testing.assert_close(costs[0], costs[2], rtol=1e-9, atol=0)
    torch.testing.assert_close(costs[1], costs[2], rtol=1e-9, atol=0)
    assert costs[0].dtype == torch.float64
    assert float(costs[0].min()) > 0


@schedules
def test_weights_are_those_of_the_papers(schedule):
    """Each in the parameterisation in which its paper gives it."""
    snr = schedule.signal_to_noise()
    published = [
        (MinSNR(5.0), "x_0", torch.where(snr < 5.0, snr, 5.0)),
        (MinSNR(5.0), "epsilon", torch.where(snr < 5.0, 1.0, 5.0 / snr)),
        (MinSNR(5.0), "v", torch.where(snr < 5.0, snr, 5.0) / (snr + 1)),
        (P2(1.0, 1.0), "epsilon", 1 / (1 + snr)),
        (P2(0.5, 2.0), "epsilon", (2 + snr) ** -0.5),
        (Debiased(), "epsilon", snr**-0.5),
        *((Uniform(), prediction, torch.ones_like(snr)) for prediction in PREDICTIONS),
    ]
    for weighting, prediction, expected in published:
        torch.testing.assert_close(weighting.weight(schedule, prediction), expected, rtol=1e-9, atol=0)


@schedules
def test_p2_of_strength_zero_is_l_simple_of_the_noise(schedule):
    torch.testing.assert_close(P2(gamma=0.0).weight(schedule, "epsilon"), Uniform().weight(schedule, "epsilon"))


@schedules
def test_the_bound_weighs_noise_as_in_the_paper(schedule):
    """Ho et al. (2020), eq. 12, with sigma_t^2 either of the two choices of section 3.2."""
    beta, alpha_bar = schedule.betas, schedule.alpha_bar
    tilde_beta = beta[1:] * (1 - alpha_bar[:-1]) / (1 - alpha_bar[1:])
    tilde_beta = torch.cat([tilde_beta[:1], tilde_beta])
    for weighting, variance in zip(BOUNDS, (tilde_beta, beta), strict=True):
        expected = beta**2 / (2 * variance * (1 - beta) * (1 - alpha_bar))
        torch.testing.assert_close(weighting.weight(schedule, "epsilon"), expected, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", [*SCHEDULES, TERMINAL], ids=lambda s: s.name)
def test_the_bound_weighs_data_by_what_the_signal_gains_in_a_step(schedule):
    """Kingma et al. (2021), section 4: half the difference of SNR(t - 1) and SNR(t)."""
    gained = -0.5 * schedule.signal_to_noise().diff()
    torch.testing.assert_close(VariationalBound().weight(schedule, "x_0")[1:], gained, rtol=1e-7, atol=1e-12)


@schedules
@pytest.mark.parametrize("weighting", BOUNDS, ids=lambda w: w.variance)
def test_the_weighted_error_is_what_a_wrong_estimate_adds_to_the_bound(weighting, schedule, estimates):
    x_0, _, estimate = estimates
    wrong, right = (bound_term(schedule, weighting.variance, x_0, T, guess) for guess in (estimate, x_0))
    cost = weighting.weight(schedule, "x_0") * square_error(schedule, "x_0", *estimates)
    torch.testing.assert_close(wrong - right, cost, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("weighting", WEIGHTINGS, ids=lambda w: f"{type(w).__name__}-{vars(w)}")
@pytest.mark.parametrize("prediction", ["v", "x_0"])
def test_where_there_is_no_signal_the_bound_alone_asks_for_data(weighting, prediction):
    """The other weights vanish with the SNR; the bound's is half the SNR of the step before, or of beta_T = 1."""
    weight, before = weighting.weight(TERMINAL, prediction), float(TERMINAL.alpha_bar[-2])
    expected = {None: 0.0, "posterior": before / (1 - before) / 2, "beta": before / 2}[weighting.variance]
    assert float(weight[-1]) == pytest.approx(expected, rel=1e-9)
    assert 0 < float(weight[:-1].min()) <= float(weight[:-1].max()) < float("inf")


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: MinSNR(0.0), "gamma"),
        (lambda: P2(gamma=-1.0), "gamma"),
        (lambda: P2(k=0.0), "k"),
        (lambda: VariationalBound("learned"), "variance"),
    ],
)
def test_what_is_out_of_range_is_refused(make, key):
    with pytest.raises(ValueError, match=rf"^{key} is .*; allowed are .*; change `objective.weighting.{key}`$"):
        make()
