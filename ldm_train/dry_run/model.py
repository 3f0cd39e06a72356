"""The networks as the run builds them, without memory, and what a checkpoint of them weighs.

Networks that are trained, and text encoders, are built on torch's `meta` device: names, types and shapes without
values. Loading compares names and shapes all the same, so that a file of another architecture is refused as in the
run. Autoencoders are built whole: whether one is calibrated is told by its values.

A checkpoint holds the trained part of the state dict, its average, and the optimizer's state, which is counted after a
step of that optimizer on `meta`:  bytes = sum over tensors of  numel x size of an element.
"""

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, cast

import hydra
import lightning as L
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from ldm_train.nn import ExponentialMovingAverage
from ldm_train.stages.optimization import trainable

_NETWORK = "stage.denoiser.network"
_PARTS = ("autoencoder", "conditioner")


def instantiated(node: DictConfig, **given: object) -> Any:  # noqa: ANN401
    """A part, as the run makes it."""
    return hydra.utils.instantiate(node, _convert_="all", **given)


def built_network(cfg: DictConfig) -> nn.Module:
    """The U-Net, without values; a checkpoint it starts from is compared."""
    with torch.device("meta"):
        return instantiated(OmegaConf.select(cfg, _NETWORK))


def built_conditioner(cfg: DictConfig) -> nn.Module:
    """The conditioner, without values; the text encoder's weights are compared."""
    with torch.device("meta"):
        return instantiated(cfg.stage.conditioner)


def built_autoencoder(cfg: DictConfig) -> nn.Module:
    """The first stage: without values where it is trained from its beginning."""
    with torch.device("meta") if cfg.stage.get("trains") == "all" else nullcontext():
        return instantiated(cfg.stage.autoencoder)


def built_stage(cfg: DictConfig, parts: Mapping[str, nn.Module]) -> L.LightningModule:
    """The stage around parts that are built already: `autoencoder`, and of stages 2 and 3 `network`, `conditioner`."""
    given: dict[str, object] = {name: parts[name] for name in _PARTS if name in parts}
    if "network" in parts:
        given["denoiser"] = instantiated(cfg.stage.denoiser, network=parts["network"])
    if "compile_network" in cfg.stage:
        given["compile_network"] = False
    return cast(L.LightningModule, instantiated(cfg.stage, **given))


def checkpoint_bytes(stage: L.LightningModule, is_averaged: bool) -> int:
    """The size of a checkpoint's tensors."""
    content: dict[str, Any] = {"state_dict": dict(stage.state_dict())}
    stage.on_save_checkpoint(content)
    total = sum(map(_bytes, content["state_dict"].values()))
    if is_averaged:
        without = getattr(stage, "not_averaged", ())
        average = ExponentialMovingAverage(stage, 0.999, None, without, None)
        total += sum(map(_bytes, average.state_dict()["average"].values()))
    return total + _optimizer_bytes(stage)


def _optimizer_bytes(stage: L.LightningModule) -> int:
    optimizer = cast(dict[str, Any], stage.configure_optimizers())["optimizer"]
    for parameter in trainable(stage):
        # On the device of the parameter: adapters have values, for torch draws them where it likes.
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = optimizer.state_dict()["state"].values()
    return sum(_bytes(value) for state in states for value in state.values() if isinstance(value, Tensor))


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
