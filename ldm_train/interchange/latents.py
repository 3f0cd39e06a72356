"""The latents' mean and standard deviation, as other formats write them.

    ours: (z - mean_c) / std_c for each channel c        published: s z, one scale factor s for all channels

So s means mean 0 and standard deviation 1 / s. Diffusers adds a shift, s (z - shift), or statistics of each channel on
top of the factor, s (z - latents_mean_c) / latents_std_c; both are read and written here. What was never measured is
NaN here and no number there.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SCALE_FACTOR = 0.18215
"""The scale factor of Stable Diffusion 1 and 2: 1 / std of the KL-f8 autoencoder's latents on one batch."""

_LEAST, _MOST = 1e-37, 1e37


def latent_state(mean: Sequence[float], std: Sequence[float]) -> dict[str, Tensor]:
    """The buffers of an `Autoencoder` for statistics of each channel.

    Raises:
        ValueError: if they are no numbers, or a standard deviation is no positive one.
    """
    means, stds = (torch.tensor(numbers(key, values)) for key, values in (("mean", mean), ("std", std)))
    # As float32, where 1e-300 is 0 and 1e300 is infinite.
    if not means.isfinite().all() or not (stds.isfinite() & (stds > 0)).all():
        raise ValueError(
            f"the latents' means are {list(mean)} and standard deviations {list(std)}; allowed are finite numbers of "
            "float32, the latter positive; change the scale factor (--scale-factor) or the file's statistics"
        )
    return {"latent_mean": means.view(1, -1, 1, 1), "latent_std": stds.view(1, -1, 1, 1)}


def numbers(key: str, values: object) -> list[float]:
    """A list of numbers that a file says.

    Args:
        key: what the file calls them, for errors.
        values: what it holds.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(values, list | tuple) or not all(map(_is_number, values)):
        raise ValueError(f"`{key}` of the latents is {values!r}; allowed is a list of numbers; correct it in the file")
    return [float(value) for value in values]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def scaled(scale_factor: object, channels: int) -> dict[str, Tensor]:
    """The buffers for one published scale factor.

    Raises:
        ValueError: if it is no positive number.
    """
    return latent_state([0.0] * channels, [1 / _factor(scale_factor)] * channels)


def _factor(value: object) -> float:
    # The deviation 1 / s must be a number of float32 as well.
    if not isinstance(value, int | float) or isinstance(value, bool) or not _LEAST <= value <= _MOST:
        raise ValueError(
            f"the scale factor is {value}; allowed are positive numbers, {_LEAST:.0e} to {_MOST:.0e}, {SCALE_FACTOR} "
            "for Stable Diffusion 1 and 2; change --scale-factor or the file's"
        )
    return float(value)


def uncalibrated(channels: int) -> dict[str, Tensor]:
    """The buffers of latents that nobody has measured."""
    return {name: torch.full((1, channels, 1, 1), math.nan) for name in ("latent_mean", "latent_std")}


def statistics(state: Mapping[str, Tensor]) -> tuple[list[float], list[float]] | None:
    """Mean and standard deviation of each channel as exact Python numbers, or `None` if there are none."""
    mean, std = (state[name].flatten().double() for name in ("latent_mean", "latent_std"))
    return (mean.tolist(), std.tolist()) if bool(torch.isfinite(std).all()) else None


def from_diffusers(config: Mapping[str, Any], channels: int, default: float) -> dict[str, Tensor]:
    """The buffers that a diffusers config means.

    Args:
        config: the content of `config.json`.
        channels: C.
        default: scale factor of a config that names none.

    Raises:
        ValueError: if it holds no such numbers.
    """
    if config.get("scaling_factor", default) is None:
        return uncalibrated(channels)
    scale = _factor(config.get("scaling_factor", default))
    mean = numbers("latents_mean", config.get("latents_mean") or [config.get("shift_factor") or 0.0] * channels)
    std = numbers("latents_std", config.get("latents_std") or [1.0] * channels)
    if not len(mean) == len(std) == channels:
        raise ValueError(
            f"`latents_mean` and `latents_std` have {len(mean)} and {len(std)} numbers; allowed is one for each of the "
            f"{channels} latent channels; correct them in config.json"
        )
    return latent_state(mean, [value / scale for value in std])


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a diffusers config says of the buffers, without loss.

    Where channels differ, `scaling_factor` by itself is that of all values together, for readers that know no more.
    A factor is written in all cases, since a reader that finds none assumes Stable Diffusion's.
    """
    found = statistics(state)
    if found is None:
        return {"scaling_factor": None}
    mean, std = found
    if len(set(mean)) == len(set(std)) == 1:
        shift = {"shift_factor": mean[0]} if mean[0] else {}
        return {"scaling_factor": shortest_factor(std[0])} | shift
    centre = sum(mean) / len(mean)
    pooled = math.sqrt(sum(s**2 + (m - centre) ** 2 for m, s in zip(mean, std, strict=True)) / len(std))
    return {"scaling_factor": 1 / pooled, "latents_mean": mean, "latents_std": [value / pooled for value in std]}


def shortest_factor(std: float) -> float:
    """1 / std with as few digits as give the same float32 `std` back: 0.2 and not 0.20000000298."""
    candidates = (float(f"{1 / std:.{digits}g}") for digits in range(1, 18))
    return next(factor for factor in candidates if factor > 0 and float(torch.tensor(1 / factor)) == std)
