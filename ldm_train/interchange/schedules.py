"""Noise schedules in the formats of others: twelve tables of a published checkpoint, a few numbers of diffusers.

A published file holds no settings but the betas themselves, as float32, and tables computed from them; the settings are
found again by trying the schedules that have names. Writing computes all tables anew in float64.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from ldm_train.diffusion import NoiseSchedule, cosine_schedule, linear_schedule, scaled_linear_schedule
from ldm_train.interchange.architecture import bound, require

_LINEAR, _SCALED, _COSINE = (f"ldm_train.diffusion.{name}_schedule" for name in ("linear", "scaled_linear", "cosine"))
_TARGETS = {_LINEAR: linear_schedule, _SCALED: scaled_linear_schedule, _COSINE: cosine_schedule}
_NAMES = {"linear": _LINEAR, "scaled_linear": _SCALED, "squaredcos_cap_v2": _COSINE}  # diffusers -> ours
_PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x_0"}  # likewise
_LEAST_VARIANCE = 1e-20  # the published clip of the first posterior variance, whose logarithm is taken
_FLOAT32_ACCURACY = 1e-6

# Ends of the published schedules, needed where rescaling to a terminal SNR of zero has hidden them.
_PUBLISHED_ENDS = ((0.00085, 0.012), (0.0015, 0.0195), (0.0015, 0.0155), (0.0015, 0.0205), (1e-4, 0.02))


def build_schedule(node: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a config node; nothing but this package's own functions is ever called.

    Raises:
        ValueError: if the node names another one, or arguments that it does not take.
    """
    require(node, list(_TARGETS), "schedule")
    target = _TARGETS[node["_target_"]]
    return target(**bound(target, node, "schedule"))


def published_tables(schedule: NoiseSchedule) -> dict[str, Tensor]:
    """The twelve buffers of a published latent diffusion model, (T,) float32 each."""
    betas, product = schedule.betas, schedule.alpha_bar
    before = torch.cat([product.new_ones(1), product[:-1]])
    variance = betas * (1 - before) / (1 - product)
    tables = {
        "betas": betas,
        "alphas_cumprod": product,
        "alphas_cumprod_prev": before,
        "sqrt_alphas_cumprod": product.sqrt(),
        "sqrt_one_minus_alphas_cumprod": (1 - product).sqrt(),
        "log_one_minus_alphas_cumprod": (1 - product).log(),
        "sqrt_recip_alphas_cumprod": product.rsqrt(),
        "sqrt_recipm1_alphas_cumprod": (1 / product - 1).sqrt(),
        "posterior_variance": variance,
        "posterior_log_variance_clipped": variance.clamp(min=_LEAST_VARIANCE).log(),
        "posterior_mean_coef1": betas * before.sqrt() / (1 - product),
        "posterior_mean_coef2": (1 - before) * (1 - betas).sqrt() / (1 - product),
    }
    return {name: table.float() for name, table in tables.items()}


def schedule_of_betas(betas: Tensor) -> dict[str, Any] | None:
    """The config node of the schedule that has these betas (T,), or `None` if none with a name has them."""
    found = betas.double()
    for node in _candidates(betas.float()):
        if torch.allclose(build_schedule(node).betas, found, rtol=_FLOAT32_ACCURACY, atol=0):
            return node
    return None


def _candidates(betas: Tensor) -> Iterator[dict[str, Any]]:
    steps = {"num_steps": len(betas)}
    first, last = _shortest(betas[0]), _shortest(betas[-1])
    if 0 < first < 1 and 0 < last < 1:
        for target in (_SCALED, _LINEAR):
            yield {"_target_": target, **steps, "beta_start": first, "beta_end": last}
    yield {"_target_": _COSINE, **steps}
    yield {"_target_": _COSINE, **steps, "zero_terminal_snr": True}
    for start, end in _PUBLISHED_ENDS:
        for target in (_SCALED, _LINEAR):
            yield {"_target_": target, **steps, "beta_start": start, "beta_end": end, "zero_terminal_snr": True}


def _shortest(value: Tensor) -> float:
    """A float32 with as few digits as give it back: 0.00085 and not 0.0008500000112690032."""
    number = float(value)
    candidates = (float(f"{number:.{digits}g}") for digits in range(1, 18))
    return next(short for short in candidates if float(torch.tensor(short)) == number)


def from_scheduler_config(config: Mapping[str, Any]) -> tuple[dict[str, Any] | None, str]:
    """What the config of any scheduler of diffusers means.

    Args:
        config: the content of `scheduler/scheduler_config.json`; keys that it lacks have diffusers' defaults.

    Returns:
        The schedule's config node, `None` if it has no name of ours, and the prediction.

    Raises:
        ValueError: if there is no such schedule or prediction.
    """
    kind, prediction = config.get("beta_schedule", "linear"), config.get("prediction_type", "epsilon")
    for key, found, allowed in (("beta_schedule", kind, _NAMES), ("prediction_type", prediction, _PREDICTIONS)):
        if found not in allowed:
            raise ValueError(
                f"`{key}` of scheduler_config.json is {found!r}; allowed here: {', '.join(allowed)}; name another "
                "SOURCE"
            )
    if (betas := config.get("trained_betas")) is not None:
        return schedule_of_betas(torch.tensor(betas, dtype=torch.float64)), _PREDICTIONS[prediction]
    node: dict[str, Any] = {"_target_": _NAMES[kind], "num_steps": config.get("num_train_timesteps", 1000)}
    if kind != "squaredcos_cap_v2":
        node |= {"beta_start": config.get("beta_start", 1e-4), "beta_end": config.get("beta_end", 0.02)}
    if config.get("rescale_betas_zero_snr"):
        node["zero_terminal_snr"] = True
    build_schedule(node)
    return node, _PREDICTIONS[prediction]


def to_scheduler_config(node: Mapping[str, Any], prediction: str) -> dict[str, Any]:
    """The config of diffusers' `DDIMScheduler` that continues what was trained, with the published steps."""
    schedule = build_schedule(node)
    config: dict[str, Any] = {
        "_class_name": "DDIMScheduler",
        "clip_sample": False,
        "num_train_timesteps": schedule.num_steps,
        "prediction_type": next(theirs for theirs, ours in _PREDICTIONS.items() if ours == prediction),
        "set_alpha_to_one": False,
        "steps_offset": 1,
        # Without signal at the last time, sampling has to start there.
        "timestep_spacing": "trailing" if schedule.has_zero_terminal_snr else "leading",
    }
    settings = bound(_TARGETS[node["_target_"]], node, "schedule")
    named: dict[str, Any] = {
        "beta_schedule": next(theirs for theirs, ours in _NAMES.items() if ours == node["_target_"]),
        "rescale_betas_zero_snr": settings["zero_terminal_snr"],
        **{key: settings[key] for key in ("beta_start", "beta_end") if key in settings},
    }
    again, _ = from_scheduler_config(named | {"num_train_timesteps": schedule.num_steps})
    if again is not None and torch.equal(build_schedule(again).betas, schedule.betas):
        return config | named
    return config | {"trained_betas": schedule.betas.tolist()}
