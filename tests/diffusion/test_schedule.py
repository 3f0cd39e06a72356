"""Values of the published schedules (T = 1000) and what every schedule obeys."""

import math
from decimal import Decimal

import hydra
import pytest
import torch

from ldm_train.diffusion import (
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    rescale_to_zero_terminal_snr,
    scaled_linear_schedule,
    shift_signal_to_noise,
)

from ..conftest import composed

CONSTRUCTORS = [linear_schedule, scaled_linear_schedule, cosine_schedule]
SCHEDULES = [make(zero_terminal_snr=zero) for make in CONSTRUCTORS for zero in (False, True)]
PUBLISHED = [
    # option, alpha-bar of the first and the last step, sigma / alpha of both, terminal SNR
    ("scaled_linear", "0.999150", "0.0046601", "0.02917", "14.6146", "0.004682"),
    ("ldm", "0.998500", "1.42304e-4", "0.03876", "83.82", "1.423e-4"),
    ("ldm_churches", "0.998500", "6.6867e-4", "0.03876", "38.66", "6.69e-4"),
    ("ldm_inpainting", "0.998500", "9.691e-5", "0.03876", "101.58", "9.69e-5"),
    ("linear", "0.999900", "4.0358e-5", "0.0100", "157.41", "4.04e-5"),
    ("cosine", "0.999959", "2.43e-9", "0.00643", "20291", "2.4e-9"),
]


def named(schedule):
    return schedule.name


@pytest.mark.parametrize(("option", "first", "last", "sigma_min", "sigma_max", "terminal"), PUBLISHED)
def test_options_have_the_published_values(option, first, last, sigma_min, sigma_max, terminal):
    """To every digit that is printed."""
    schedule = hydra.utils.instantiate(composed(f"schedule={option}").schedule, _convert_="all")
    snr = schedule.signal_to_noise()
    found = [schedule.alpha_bar[0], schedule.alpha_bar[-1], snr[0] ** -0.5, snr[-1] ** -0.5, snr[-1]]
    for value, printed in zip(found, (first, last, sigma_min, sigma_max, terminal), strict=True):
        last_digit = 10.0 ** Decimal(printed).as_tuple().exponent
        assert float(value) == pytest.approx(float(printed), rel=0, abs=0.501 * last_digit)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_variance_is_preserved_and_signal_only_falls(schedule):
    assert schedule.alpha_bar.dtype == torch.float64
    ones = torch.ones(1000, dtype=torch.float64)
    torch.testing.assert_close(schedule.alpha**2 + schedule.sigma**2, ones, rtol=0, atol=1e-15)
    assert bool((schedule.alpha_bar.diff() < 0).all())


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_scales_are_the_tables_and_time_minus_one_is_clean_data(schedule):
    t = torch.tensor([-1, 0, 1, 998, 999, -1])
    alpha, sigma = schedule.scales(t, 4, torch.float64)
    assert alpha.shape == sigma.shape == (6, 1, 1, 1)
    assert alpha[[0, -1]].flatten().tolist() == [1.0, 1.0]
    assert sigma[[0, -1]].flatten().tolist() == [0.0, 0.0]
    assert torch.equal(alpha[1:-1].flatten(), schedule.alpha[t[1:-1]])
    assert torch.equal(sigma[1:-1].flatten(), schedule.sigma[t[1:-1]])
    for exact, single in zip((alpha, sigma), schedule.scales(t, 4), strict=True):
        assert torch.equal(exact.float(), single)


def test_scales_keep_their_precision_in_a_module_of_half_precision():
    schedule, t = linear_schedule().to(torch.bfloat16), torch.arange(1000)
    assert torch.equal(schedule.scales(t, 1)[0], linear_schedule().alpha.float())


@pytest.mark.parametrize("make", CONSTRUCTORS)
def test_zero_terminal_snr_ends_without_signal_and_keeps_the_start(make):
    plain, rescaled = make(), make(zero_terminal_snr=True)
    assert rescaled.has_zero_terminal_snr
    assert not plain.has_zero_terminal_snr
    assert float(rescaled.alpha[0]) == pytest.approx(float(plain.alpha[0]), rel=1e-12)
    assert torch.equal(rescaled.betas, rescale_to_zero_terminal_snr(plain).betas)
    # alpha is an affine map of the original one: the rescaling keeps the ratios of its steps
    ratio = rescaled.alpha.diff() / plain.alpha.diff()
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), rtol=1e-6, atol=0)


@pytest.mark.parametrize("make", CONSTRUCTORS)
@pytest.mark.parametrize("size", [64, 96, 512])
def test_a_shift_moves_all_log_snrs_by_the_logarithm_of_the_ratio_of_areas(make, size):
    plain, shifted = make(), make(image_size=size, reference_size=256)
    moved = shifted.signal_to_noise().log() - plain.signal_to_noise().log()
    torch.testing.assert_close(moved, torch.full_like(moved, 2 * math.log(256 / size)), rtol=0, atol=1e-9)


def test_a_shifted_schedule_hides_an_averaged_image_as_the_plain_one_hides_the_small_image():
    """Averaging k x k pixels keeps a flat image and divides the noise by k: the reason for the shift."""
    plain, shifted = cosine_schedule(), cosine_schedule(image_size=256, reference_size=64)
    averaged = shifted.alpha / (shifted.sigma / (256 / 64))
    torch.testing.assert_close(averaged, plain.alpha / plain.sigma, rtol=1e-9, atol=0)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=named)
def test_shifts_compose_and_undo_one_another(schedule):
    once = shift_signal_to_noise(schedule, 256, 32)
    twice = shift_signal_to_noise(shift_signal_to_noise(schedule, 64, 32), 256, 64)
    back = shift_signal_to_noise(once, 32, 256)
    torch.testing.assert_close(twice.alpha_bar, once.alpha_bar, rtol=1e-9, atol=0)
    torch.testing.assert_close(back.alpha_bar, schedule.alpha_bar, rtol=1e-9, atol=0)
    assert back.has_zero_terminal_snr == once.has_zero_terminal_snr == schedule.has_zero_terminal_snr


def test_both_corrections_keep_the_shifted_start_and_end_without_signal():
    shift = {"image_size": 512, "reference_size": 256}
    both, shifted = scaled_linear_schedule(zero_terminal_snr=True, **shift), scaled_linear_schedule(**shift)
    assert both.has_zero_terminal_snr
    assert float(both.alpha[0]) == pytest.approx(float(shifted.alpha[0]), rel=1e-12)


@pytest.mark.parametrize("make", CONSTRUCTORS)
def test_an_image_size_without_a_reference_changes_nothing(make):
    assert torch.equal(make(image_size=512).betas, make().betas)
    torch.testing.assert_close(make(image_size=512, reference_size=512).betas, make().betas, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("sizes", [(None, 256), (0, 256), (256, 0), (256, -64)])
def test_sizes_that_are_none_are_refused(sizes):
    with pytest.raises(ValueError, match=r"image_size is .*; allowed are two sides from 1, .*`schedule.image_size`"):
        linear_schedule(image_size=sizes[0], reference_size=sizes[1])


@pytest.mark.parametrize("betas", [[0.1], [0.0, 0.1], [0.5, 1.2], [1.0, 0.5], [-0.1, 0.1]])
def test_betas_that_are_no_schedule_are_refused(betas):
    with pytest.raises(ValueError, match=r"allowed are .* change the `schedule` keys"):
        NoiseSchedule(torch.tensor(betas))
