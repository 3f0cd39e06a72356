"""What the conversion tools read: files of others, safely, and nodes of our config, checked."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ldm_train.checkpoint import read_checkpoint
from ldm_train.config import conf_dir, missing_keys, register, unknown_keys
from ldm_train.interchange import build_schedule, check_targets, check_unet_target, compvis


@dataclass(frozen=True)
class Group:
    """A group of conf/ whose options describe a network.

    Attributes:
        name: of the group and of the node in the config.
        noun: how errors call the network.
    """

    name: str
    noun: str

    @property
    def options(self) -> list[str]:
        """The names of its options."""
        return sorted(path.stem for path in (conf_dir() / self.name).glob("*.yaml"))

    def compose(self, option: str, overrides: Sequence[str]) -> dict[str, Any]:
        """The config node of an option, changed by overrides.

        Raises:
            ValueError: if Hydra cannot compose it, or it describes no such network.
        """
        if option not in self.options:
            raise ValueError(
                f"there is no {self.noun} {option}; allowed options: {', '.join(self.options)}; change --{self.name}"
            )
        register()
        try:
            with initialize_config_dir(str(conf_dir()), version_base="1.3"):
                cfg = compose("config", [f"{self.name}={option}", *overrides])
            if missing := [key for key in missing_keys(cfg) if key.startswith(f"{self.name}.")]:
                raise ValueError(
                    f"`{missing[0]}` has no value; allowed is any that it takes; give it one with --override"
                )
            node = OmegaConf.to_container(OmegaConf.select(cfg, self.name), resolve=True)
        except (HydraException, OmegaConfBaseException) as error:
            raise ValueError(
                f"the {self.noun} cannot be composed ({str(error).splitlines()[0]}); allowed are overrides "
                f"{self.name}.KEY=VALUE of the keys in conf/{self.name}/{option}.yaml; change --override"
            ) from error
        return self.checked(node, f"--{self.name} or --override")

    def described(self, option: str | None, overrides: Sequence[str], config: object, path: Path) -> dict[str, Any]:
        """The node of the option that the user names, or else the one in the config or record of the file at `path`.

        Raises:
            ValueError: if neither describes such a network.
        """
        if option is not None:
            return self.compose(option, overrides)
        if not isinstance(config, Mapping) or self.name not in config:
            raise ValueError(
                f"{path} does not say which architecture it has; allowed: {', '.join(self.options)}; choose one with "
                f"--{self.name}"
            )
        return self.checked(config[self.name], f"{path}, or describe it with --{self.name}")

    def checked(self, node: object, remedy: str) -> dict[str, Any]:
        """A config node from wherever, if its keys and types are those of such a network; else a `ValueError`."""
        _CHECKS[self.name](node)  # first: the check of types imports the classes that the node names
        try:
            mistakes = unknown_keys(OmegaConf.create({self.name: node}))
        except OmegaConfBaseException as error:
            mistakes = [f"it is no config: {str(error).splitlines()[0]}"]
        if mistakes:
            raise ValueError(f"the {self.noun} cannot be built: {'; '.join(mistakes)}; change {remedy}")
        assert isinstance(node, dict)
        return node


AUTOENCODER, UNET, SCHEDULE = (
    Group("autoencoder", "autoencoder"),
    Group("unet", "U-Net"),
    Group("schedule", "noise schedule"),
)
_CHECKS: dict[str, Callable[[object], object]] = {
    AUTOENCODER.name: check_targets,
    UNET.name: check_unet_target,
    SCHEDULE.name: build_schedule,
}


def read_file(path: Path, option: str = "SOURCE") -> dict[str, Any]:
    """The dictionary in a `.safetensors`, `.ckpt`, or other file of torch; no code in it is run.

    Args:
        path: the file.
        option: the argument that named it, for errors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or holds more than plain tensors and values.
    """
    if path.suffix == ".safetensors":
        tensors, metadata = read_tensors(path, option)
        return {"state_dict": tensors, **compvis.from_metadata(metadata)}
    with torch.serialization.safe_globals(compvis.SAFE_GLOBALS):
        return read_checkpoint(path, option, is_foreign=True)


def read_tensors(path: Path, option: str = "SOURCE") -> tuple[dict[str, Tensor], Mapping[str, str] | None]:
    """Tensors and metadata of a safetensors file."""
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118 (no mapping)
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); allowed is a complete safetensors file; change {option}, or fetch "
            "it again"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A config of diffusers."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); allowed is a folder of a diffusers model; change SOURCE"
        ) from error
    return content


def tensors_in(folder: Path, names: Sequence[str]) -> Path:
    """The first of some files that a folder of diffusers holds."""
    if found := [folder / name for name in names if (folder / name).is_file()]:
        return found[0]
    raise FileNotFoundError(
        f"{folder} holds {', '.join(sorted(path.name for path in folder.iterdir()))}, so its tensors cannot be read; "
        f"allowed: {' or '.join(names)}; fetch one of them, or change SOURCE"
    )
