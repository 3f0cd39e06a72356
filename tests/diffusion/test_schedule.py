"""Values of the published schedules (T = 1000) and what every schedule obeys."""

import pytest
import torch

from ldm_train.diffusion import (
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    rescale_to_zero_terminal_snr,
    scaled_linear_schedule,
)

PUBLISHED = [
    # schedule, alpha-bar of the first and the last step, largest sigma / alpha
    (scaled_linear_schedule(), 0.999150, 0.0046601, 14.6146),
    (scaled_linear_schedule(beta_start=0.0015, beta_end=0.0195), 0.998500, 1.42304e-4, 83.82),
    (scaled_linear_schedule(beta_start=0.0015, beta_end=0.0155), 0.998500, 6.6867e-4, 38.66),
    (linear_schedule(), 0.999900, 4.0358e-5, 157.41),
    (cosine_schedule(), 0.999959, 2.43e-9, 20291),
]


@pytest.mark.parametrize(("schedule", "first", "last", "sigma_max"), PUBLISHED, ids=lambda v: getattr(v, "name", None))
def test_published_values(schedule, first, last, sigma_max):
    assert float(schedule.alpha_bar[0]) == pytest.approx(first, abs=1e-6)
    assert float(schedule.alpha_bar[-1]) == pytest.approx(last, rel=2e-3)
    assert float(schedule.signal_to_noise()[-1] ** -0.5) == pytest.approx(sigma_max, rel=1e-3)


@pytest.mark.parametrize("schedule", [row[0] for row in PUBLISHED], ids=lambda s: s.name)
def test_variance_is_preserved_and_signal_only_falls(schedule):
    assert schedule.alpha_bar.dtype == torch.float64
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, torch.ones(1000), rtol=0, atol=1e-6)
    assert bool((schedule.alpha_bar.diff() < 0).all())


def test_zero_terminal_snr_ends_without_signal_and_keeps_the_start():
    plain = scaled_linear_schedule()
    rescaled = rescale_to_zero_terminal_snr(plain)
    assert rescaled.has_zero_terminal_snr
    assert float(rescaled.alpha_bar[0]) == pytest.approx(float(plain.alpha_bar[0]), rel=1e-12)
    # sqrt(alpha-bar) is an affine map of the original one
    ratio = rescaled.alpha_bar.sqrt().diff() / plain.alpha_bar.sqrt().diff()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.5, 1.2], [1.0, 0.5], [-0.1, 0.1]])
def test_betas_that_are_no_schedule_are_refused(betas):
    with pytest.raises(ValueError, match=r"allowed are .* change the `schedule` keys"):
        NoiseSchedule(torch.tensor(betas))
