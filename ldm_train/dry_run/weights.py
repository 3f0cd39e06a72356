"""The files of weights that a run reads, as its config names them.

A part that reads a file is a node with one of the targets below, wherever it stands; stage 3 names its base model
itself. Nodes that are reached by an interpolation are looked at where they stand.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm_train.checkpoint import UNTRAINED
from ldm_train.nn.perceptual import cached_backbone

Kind = Literal["checkpoint", "base model", "text encoder", "vgg16", "inception"]

# Target of a node -> the key in it that names a file, and what the file is.
_READERS: dict[str, tuple[str, Kind]] = {
    "ldm_train.checkpoint.load_pretrained": ("checkpoint", "checkpoint"),
    "ldm_train.stages.load_text_encoder": ("weights", "text encoder"),
    "ldm_train.nn.LPIPS": ("backbone", "vgg16"),
    "ldm_train.metrics.feature_extractor": ("inception_weights", "inception"),
    "ldm_train.stages.LoRAFineTuning": ("base_checkpoint", "base model"),
}


@dataclass(frozen=True)
class NeededWeights:
    """One file, or folder of a published model.

    Attributes:
        key: the config key that names it.
        path: where it is looked for.
        kind: what it holds.
        node: the path of the config node that reads it.
    """

    key: str
    path: Path
    kind: Kind
    node: str

    @property
    def is_there(self) -> bool:
        """Whether there is such a file, or a folder of a published model."""
        return self.path.is_file() or (self.kind in ("base model", "text encoder") and self.path.is_dir())


def needed_weights(cfg: DictConfig) -> list[NeededWeights]:
    """Every file of weights that a run of this config reads, in the order of the config; each once.

    Args:
        cfg: the composed config; what it leaves to the user, `???`, is left out.
    """
    found: dict[str, NeededWeights] = {}
    for path, node in _nodes(cfg, ""):
        target = OmegaConf.select(node, "_target_", default=None)
        if target not in _READERS:
            continue
        name, kind = _READERS[str(target)]
        if (file := _file(node, name, kind)) is not None:
            found[f"{path}.{name}"] = NeededWeights(f"{path}.{name}", file, kind, path)
    return list(found.values())


def without(cfg: DictConfig, files: Iterable[NeededWeights]) -> None:
    """Change a config so that it reads none of the files: parts have random weights in their place.

    A base model has none, and is left as it is.
    """
    for needed in files:
        node, name = OmegaConf.select(cfg, needed.node), needed.key.rpartition(".")[2]
        if needed.kind == "vgg16":
            node.weight = 0.0
        elif needed.kind == "inception" or needed.node == "stage.denoiser.network":
            node[name] = None
        elif needed.kind != "base model":
            node[name] = UNTRAINED


def _file(node: DictConfig, name: str, kind: Kind) -> Path | None:
    if name in node and OmegaConf.is_missing(node, name):
        return None
    value = node.get(name)
    if kind == "vgg16":
        if node.get("weight", 1.0) == 0:
            return None
        return cached_backbone() if value is None else Path(str(value)).absolute()
    if value is None or value == UNTRAINED:
        return None
    return Path(str(value)).expanduser().absolute()


def _nodes(node: DictConfig | ListConfig, path: str) -> Iterator[tuple[str, DictConfig]]:
    keys: Iterator[Any] = iter(node.keys()) if isinstance(node, DictConfig) else iter(range(len(node)))
    if isinstance(node, DictConfig):
        yield path, node
    for key in keys:
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        if isinstance(child := node[key], DictConfig | ListConfig):
            yield from _nodes(child, f"{path}.{key}" if path else str(key))
