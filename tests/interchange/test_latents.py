import json
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_train.interchange.latents import (
    SCALE_FACTOR,
    from_diffusers,
    latent_state,
    scaled,
    shortest_factor,
    statistics,
    to_diffusers,
    uncalibrated,
)

from .networks import same

float32 = st.floats(2**-20, 2**20, width=32)


def test_the_published_scale_factor():
    state = scaled(SCALE_FACTOR, 4)
    z = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close((z - state["latent_mean"]) / state["latent_std"], 0.18215 * z)
    assert to_diffusers(state) == {"scaling_factor": 0.18215}
    assert same(from_diffusers({}, 4, SCALE_FACTOR), state)


@given(st.lists(st.tuples(st.floats(-1e6, 1e6, width=32), float32), min_size=1, max_size=6))
def test_no_bit_is_lost_on_the_way_through_a_config_file(channels):
    mean, std = (list(values) for values in zip(*channels, strict=True))
    state = latent_state(mean, std)
    assert statistics(state) == (mean, std)
    config = json.loads(json.dumps(to_diffusers(state)))
    assert same(from_diffusers(config, len(channels), 1.0), state)


def test_statistics_of_channels_mean_what_diffusers_does_with_them():
    """StableDiffusionXLPipeline: latents * latents_std / scaling_factor + latents_mean before decoding."""
    state = latent_state([0.5, -1.0], [2.0, 3.0])
    config, latents = to_diffusers(state), torch.randn(1, 2, 3, 3)
    mean, std = (torch.tensor(config[key]).view(1, 2, 1, 1) for key in ("latents_mean", "latents_std"))
    theirs = latents * std / config["scaling_factor"] + mean
    torch.testing.assert_close(theirs, latents * state["latent_std"] + state["latent_mean"])


def test_the_one_factor_beside_them_is_that_of_all_values_together():
    z = torch.randn(20_000, 2) * torch.tensor([2.0, 3.0]) + torch.tensor([0.5, -1.0])
    config = to_diffusers(latent_state(z.mean(0).tolist(), z.std(0, correction=0).tolist()))
    assert config["scaling_factor"] == pytest.approx(1 / float(z.std(correction=0)), rel=1e-5)


def test_shift_and_factor_alone():
    state = from_diffusers({"scaling_factor": 0.5, "shift_factor": 0.25}, 2, 1.0)
    assert same(state, latent_state([0.25, 0.25], [2.0, 2.0]))
    assert to_diffusers(state) == {"scaling_factor": 0.5, "shift_factor": 0.25}


def test_what_was_never_measured_stays_so():
    assert statistics(uncalibrated(3)) is None
    assert to_diffusers(uncalibrated(3)) == {"scaling_factor": None}
    assert same(from_diffusers({"scaling_factor": None}, 3, SCALE_FACTOR), uncalibrated(3))


@given(float32)
def test_the_shortest_factor_gives_the_deviation_back(std):
    factor = shortest_factor(std)
    assert float(torch.tensor(1 / factor)) == std
    assert len(repr(factor)) <= len(repr(1 / std))


def test_impossible_numbers_are_refused():
    for factor in (0.0, -1.0, math.inf, math.nan, 1e-300, 1e300, "a", True):
        with pytest.raises(ValueError, match=r"scale factor is .*; allowed are positive numbers, .*; change"):
            scaled(factor, 4)
    for mean, std in (([0.0], [0.0]), ([math.nan], [1.0]), ([0.0], [math.inf]), ([0.0], [1e-300]), ([1e300], [1.0])):
        with pytest.raises(ValueError, match=r"standard deviations .*; allowed are finite .*; change"):
            latent_state(mean, std)
    with pytest.raises(ValueError, match=r"have 3 and 2 numbers; allowed is one for each of the 2"):
        from_diffusers({"latents_mean": [0.0] * 3, "latents_std": [1.0] * 2}, 2, 1.0)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"scaling_factor": "a"}, r"scale factor is a; allowed are positive numbers, .*; change"),
        ({"latents_mean": 3}, r"`latents_mean` of the latents is 3; allowed is a list of numbers; correct it"),
        ({"latents_mean": ["a", 0.0]}, r"`latents_mean` of the latents is \['a', 0.0\]; allowed"),
        ({"latents_std": [1.0, None]}, r"`latents_std` of the latents is \[1.0, None\]; allowed"),
        ({"shift_factor": "a"}, r"`latents_mean` of the latents is \['a', 'a'\]; allowed"),
    ],
)
def test_what_is_no_number_is_refused(config, said):
    with pytest.raises(ValueError, match=said):
        from_diffusers(config, 2, 1.0)
