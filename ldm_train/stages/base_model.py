"""The base model of stage 3 from files of others: read directly, recognised by their content, compared strictly.

    a file with `model.diffusion_model. ...`    a published model, `.ckpt` or `.safetensors`
    a folder with `unet/config.json`            a pipeline of diffusers
    a folder with `unet.ckpt`                   what `tools/convert_model.py` writes
    anything else                               a checkpoint of stage 2, which the stage reads itself

The U-Net takes the averaged weights where there are any. An autoencoder that is not calibrated, as the config builds it
where `stage.autoencoder.checkpoint` is null, takes its weights from there too. The config describes both networks, the
schedule and the prediction; where the file says something else, it is refused. The text encoder reads such files itself
(`conditioner.encoder.weights`).
"""

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_train.checkpoint import load_pretrained, read_checkpoint, strict_load
from ldm_train.conditioning import Conditioner
from ldm_train.diffusion import Denoiser
from ldm_train.interchange import Architecture, UNetArchitecture, build_schedule, compvis, diffusers, diffusers_model
from ldm_train.interchange.latents import SCALE_FACTOR, scaled, statistics
from ldm_train.interchange.stable_diffusion import import_stable_diffusion, is_whole
from ldm_train.nn import Autoencoder, FirstStage, UNet

KEY = "stage.base_checkpoint"
_UNET_FILE, _AUTOENCODER_FILE, _PREFIX = "unet.ckpt", "autoencoder.ckpt", "denoiser.network."
# Channels, and width of the context, of Stable Diffusion 1 and 2, whose files do not say how latents are scaled.
_STABLE_DIFFUSION = ((320, 768), (320, 1024))


def load_foreign_base(path: Path, denoiser: Denoiser, autoencoder: FirstStage, conditioner: Conditioner) -> bool:
    """Give a stage's networks the weights of a model that is no checkpoint of a run.

    Args:
        path: the file or folder.
        denoiser: its network takes the U-Net's weights.
        autoencoder: takes its own if it is not calibrated.
        conditioner: may hold nothing that was learned with the U-Net, which such files do not have.

    Returns:
        Whether there was one; otherwise nothing is changed.

    Raises:
        ValueError: if it cannot be read, or is another model than the config describes.
    """
    try:
        if (path / _UNET_FILE).is_file():
            _load_converted(path, denoiser, autoencoder)
        elif (path / diffusers_model.UNET / diffusers.CONFIG).is_file():
            model = diffusers_model.import_diffusers_model(_folder(path))
            _load(model, denoiser, autoencoder, told_prediction=True)
        elif path.is_file() and (content := _published(path)) is not None:
            unet, first_stage = _unet_node(denoiser.network), _autoencoder_node(autoencoder)
            model = import_stable_diffusion(content, unet, first_stage)
            _load(model, denoiser, autoencoder, told_prediction="prediction" in compvis.contents(content).record)
        else:
            return False
        _check_conditioner(conditioner)
        check_finite(denoiser.network)
    except ValueError as error:
        raise ValueError(f"{path} is not the base model of this config: {error}; see `{KEY}`") from error
    return True


def check_finite(network: torch.nn.Module) -> None:
    """Refuse a base model whose every prediction would be no number.

    Raises:
        ValueError: if a weight is not finite.
    """
    values = {name: value for name, value in network.state_dict().items() if not value.is_meta}
    broken = [name for name, value in values.items() if not bool(torch.isfinite(value).all())]
    if broken:
        raise ValueError(
            f"{len(broken)} tensors of the base model's U-Net hold values that are not finite, the first is "
            f"{broken[0]}; allowed are finite numbers; change `{KEY}`"
        )


def _load(
    model: diffusers_model.DiffusionModel, denoiser: Denoiser, autoencoder: FirstStage, *, told_prediction: bool
) -> None:
    """Compare what the file says with what the config does, then load."""
    network = denoiser.network
    _check_unet(model.unet.node, network)
    _check_meaning(model.prediction if told_prediction else None, model.schedule, denoiser)
    if not _is_calibrated(autoencoder):
        first_stage, state = cast(Autoencoder, autoencoder), dict(model.autoencoder.state)
        if statistics(state) is None:
            shape = cast(UNet, network).shape
            if (shape.channels, shape.context_dim) not in _STABLE_DIFFUSION:
                raise ValueError(
                    "the file does not say how its latents are scaled; allowed are Stable Diffusion 1 and 2, for which "
                    "it is known, and a calibrated autoencoder; convert the autoencoder with `tools/convert.py` and "
                    "change `stage.autoencoder.checkpoint`"
                )
            state |= scaled(SCALE_FACTOR, first_stage.latent_channels)
        counters = tuple(f"regularizer.{name}" for name, _ in first_stage.regularizer.named_buffers())
        strict_load(first_stage, state, allowed_missing=counters)
    strict_load(network, model.unet.state if model.average is None else model.average.state)


def _load_converted(path: Path, denoiser: Denoiser, autoencoder: FirstStage) -> None:
    content = read_checkpoint(path / _UNET_FILE, KEY)
    if "unet" in content:
        _check_unet(content["unet"], denoiser.network)
    _check_meaning(content.get("prediction"), content.get("schedule"), denoiser)
    if not _is_calibrated(autoencoder):
        load_pretrained(cast(Autoencoder, autoencoder), str(path / _AUTOENCODER_FILE), "autoencoder.", KEY)
    load_pretrained(denoiser.network, str(path / _UNET_FILE), _PREFIX, KEY)


def _is_calibrated(autoencoder: FirstStage) -> bool:
    return not isinstance(autoencoder, Autoencoder) or autoencoder.is_calibrated


def _check_unet(node: Mapping[str, Any], network: torch.nn.Module) -> None:
    """Refuse a U-Net of another architecture; not every difference shows in the shapes of tensors."""
    theirs, own = UNetArchitecture.of(node), UNetArchitecture.of(_unet_node(network))
    for name in (field.name for field in fields(own)):
        if getattr(theirs, name) != getattr(own, name):
            raise ValueError(
                f"its U-Net has {name} {getattr(theirs, name)}, the config's {getattr(own, name)}; allowed are equal "
                "ones; change `unet`"
            )


def _check_meaning(prediction: str | None, schedule: Mapping[str, Any] | None, denoiser: Denoiser) -> None:
    """Refuse to read the network's output in another way than it was trained."""
    if prediction not in (None, denoiser.prediction):
        raise ValueError(
            f"it predicts {prediction!r}, the config says {denoiser.prediction!r}; allowed are equal ones; change "
            "`stage.denoiser.prediction`"
        )
    if schedule is None:
        return
    theirs, own = build_schedule(schedule).betas, denoiser.schedule.betas
    if theirs.shape != own.shape or not torch.allclose(theirs, own.to(theirs), rtol=1e-5):
        raise ValueError(
            f"its noise schedule has {len(theirs)} steps from {theirs[0]:.5g} to {theirs[-1]:.5g}, the config's "
            f"{len(own)} from {own[0]:.5g} to {own[-1]:.5g}; allowed are equal ones; change `schedule` (Stable "
            "Diffusion's is `schedule=scaled_linear`)"
        )


def _check_conditioner(conditioner: Conditioner) -> None:
    """Refuse a conditioner that would stay random: its frozen parts have weights of their own, and nothing else has."""
    frozen = tuple(f"{name}." for name in conditioner.frozen_parts)
    if learned := [name for name, _ in conditioner.named_parameters() if not name.startswith(frozen)]:
        raise ValueError(
            f"it has no weights for {len(learned)} parameters of the conditioner, which were trained with the U-Net; "
            f"the first is {learned[0]}; allowed is a conditioner with nothing of that kind (`conditioner=clip_l14`), "
            f"or a checkpoint of stage 2, which has them; change `{KEY}` or `conditioner`"
        )


def _unet_node(network: torch.nn.Module) -> dict[str, Any]:
    """The config node that would build a U-Net, as far as names and shapes go."""
    unet = cast(UNet, network)
    node = {field.name: getattr(unet.shape, field.name) for field in fields(unet.shape)}
    own = {name: getattr(unet, name) for name in ("in_channels", "out_channels", "concat_channels", "vector_dim")}
    return {"_target_": "ldm_train.nn.UNet"} | node | own


def _autoencoder_node(autoencoder: FirstStage) -> dict[str, Any]:
    if not isinstance(autoencoder, Autoencoder):
        raise ValueError(
            f"the first stage is {type(autoencoder).__name__}; allowed is an autoencoder; change `autoencoder`"
        )
    codebook = getattr(autoencoder.regularizer, "codebook_size", None)
    shape, channels = autoencoder.pyramid, (autoencoder.latent_channels, autoencoder.in_channels)
    return Architecture(shape, *channels, codebook).node()


def _published(path: Path) -> dict[str, Any] | None:
    """The dictionary of a published file, of which no code is run; `None` if it is none."""
    if path.suffix == ".safetensors":
        tensors, metadata = _safetensors(path)
        content = {"state_dict": tensors, **compvis.from_metadata(metadata)}
    else:
        with torch.serialization.safe_globals([*compvis.SAFE_GLOBALS]):
            content = read_checkpoint(path, KEY, is_foreign=True)
    is_run = "frozen" in content
    return None if is_run or not is_whole(compvis.state_of(content)) else content


def _folder(path: Path) -> diffusers_model.Folder:
    """The parts of a pipeline that a base model has; the text encoder reads its own."""
    configs: dict[str, dict[str, Any]] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for part in (diffusers_model.UNET, diffusers_model.AUTOENCODER):
        if (config := path / part / diffusers.CONFIG).is_file():
            configs[part] = json.loads(config.read_text(encoding="utf-8"))
            names = diffusers.TENSORS_READ
            file = next((path / part / name for name in names if (path / part / name).is_file()), None)
            if file is None:
                raise ValueError(f"{path / part} holds no tensors; allowed: {' or '.join(names)}; fetch one of them")
            tensors[part] = _safetensors(file)[0]
    scheduler = path / diffusers_model.SCHEDULER / diffusers_model.SCHEDULER_CONFIG
    if scheduler.is_file():
        configs[diffusers_model.SCHEDULER] = json.loads(scheduler.read_text(encoding="utf-8"))
    return diffusers_model.Folder(configs, tensors, {})


def _safetensors(path: Path) -> tuple[dict[str, Tensor], Mapping[str, str] | None]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"it is no complete safetensors file ({error}); fetch it again") from error
