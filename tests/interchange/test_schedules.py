import json

import diffusers
import pytest
import torch

from ldm_train.interchange.schedules import (
    build_schedule,
    from_scheduler_config,
    published_tables,
    schedule_of_betas,
    to_scheduler_config,
)

SCALED = {"_target_": "ldm_train.diffusion.scaled_linear_schedule", "beta_start": 0.00085, "beta_end": 0.012}
NAMED = {
    "stable diffusion": SCALED,
    "latent diffusion": SCALED | {"beta_start": 0.0015, "beta_end": 0.0195},
    "few steps": SCALED | {"num_steps": 50},
    "linear": {"_target_": "ldm_train.diffusion.linear_schedule"},
    "cosine": {"_target_": "ldm_train.diffusion.cosine_schedule"},
    "no terminal signal": SCALED | {"zero_terminal_snr": True},
}


@pytest.mark.parametrize("node", NAMED.values(), ids=NAMED)
def test_a_schedule_is_known_by_its_float32_betas(node):
    schedule = build_schedule(node)
    found = schedule_of_betas(schedule.betas.float())
    torch.testing.assert_close(build_schedule(found).betas, schedule.betas, rtol=1e-12, atol=0)


def test_betas_of_no_named_schedule_are_not_given_a_name():
    betas = build_schedule(SCALED).betas.float()
    betas[500] *= 1.001
    assert schedule_of_betas(betas) is None


def test_the_published_tables_of_stable_diffusion():
    """Names and numbers from the facts: alpha-bar runs from 0.999150 to 0.0046601."""
    tables = published_tables(build_schedule(SCALED))
    assert tables.keys() == {
        *("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_alphas_cumprod", "sqrt_one_minus_alphas_cumprod"),
        *("log_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod"),
        *("posterior_variance", "posterior_log_variance_clipped", "posterior_mean_coef1", "posterior_mean_coef2"),
    }
    assert all(table.shape == (1000,) and table.dtype == torch.float32 for table in tables.values())
    assert float(tables["alphas_cumprod"][0]) == pytest.approx(0.999150, abs=1e-6)
    assert float(tables["alphas_cumprod"][-1]) == pytest.approx(0.0046601, abs=1e-7)
    assert float(tables["alphas_cumprod_prev"][0]) == 1.0
    assert float(tables["posterior_variance"][0]) == 0.0
    assert float(tables["posterior_log_variance_clipped"][0]) == pytest.approx(-46.0517, abs=1e-4)


def test_the_published_tables_agree_with_each_other():
    tables = {name: table.double() for name, table in published_tables(build_schedule(SCALED)).items()}
    product, before, betas = (tables[name] for name in ("alphas_cumprod", "alphas_cumprod_prev", "betas"))

    def same(name, expected):
        torch.testing.assert_close(tables[name], expected, rtol=1e-3, atol=1e-6)

    same("sqrt_alphas_cumprod", product**0.5)
    same("sqrt_one_minus_alphas_cumprod", (1 - product) ** 0.5)
    same("log_one_minus_alphas_cumprod", (1 - product).log())
    same("sqrt_recip_alphas_cumprod", product**-0.5)
    same("sqrt_recipm1_alphas_cumprod", (1 / product - 1) ** 0.5)
    # The posterior's mean of x_t = sqrt(alpha-bar_t) x_0 without noise is sqrt(alpha-bar_{t-1}) x_0 (Ho et al., eq. 7).
    mean = tables["posterior_mean_coef1"] + tables["posterior_mean_coef2"] * product**0.5
    torch.testing.assert_close(mean, before**0.5, rtol=1e-5, atol=1e-6)
    same("posterior_variance", betas * (1 - before) / (1 - product))
    variance = tables["posterior_log_variance_clipped"].exp()
    torch.testing.assert_close(variance[1:], tables["posterior_variance"][1:], rtol=1e-5, atol=0)


@pytest.mark.parametrize("prediction", ["v", "x_0"])
@pytest.mark.parametrize("node", NAMED.values(), ids=NAMED)
def test_diffusers_computes_the_same_betas_from_the_config(node, prediction):
    config = json.loads(json.dumps(to_scheduler_config(node, prediction)))
    scheduler = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(scheduler.betas.double(), build_schedule(node).betas, rtol=1e-4, atol=1e-6)
    found, named = from_scheduler_config(config)
    assert torch.equal(build_schedule(found).betas, build_schedule(node).betas)
    assert named == prediction


def test_a_schedule_without_a_name_is_written_as_numbers():
    shifted = SCALED | {"image_size": 512, "reference_size": 256}
    config = to_scheduler_config(shifted, "v")
    scheduler = diffusers.DDIMScheduler.from_config(config)
    torch.testing.assert_close(scheduler.betas.double(), build_schedule(shifted).betas, rtol=1e-6, atol=0)
    assert from_scheduler_config(config) == (None, "v")


def test_the_published_steps_are_those_of_the_config():
    scheduler = diffusers.DDIMScheduler.from_config(to_scheduler_config(SCALED, "epsilon"))
    assert scheduler.config.prediction_type == "epsilon"
    scheduler.set_timesteps(50)
    assert scheduler.timesteps.tolist() == list(range(981, 0, -20))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"beta_schedule": "sigmoid"},
            "`beta_schedule` of scheduler_config.json is 'sigmoid'; allowed here: linear, .*",
        ),
        (
            {"prediction_type": "flow"},
            "`prediction_type` of scheduler_config.json is 'flow'; allowed here: epsilon, .*",
        ),
    ],
)
def test_what_is_no_schedule_is_refused(config, message):
    with pytest.raises(ValueError, match=f"{message}; name another SOURCE"):
        from_scheduler_config(config)


def test_only_our_own_schedules_are_built():
    with pytest.raises(ValueError, match=r"`schedule._target_` is 'os.mkdir'; allowed here: .*; change `schedule`"):
        build_schedule({"_target_": "os.mkdir", "path": "x"})
