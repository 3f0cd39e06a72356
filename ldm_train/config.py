"""The config: its root, what is refused in it, and how its parts are built.

A config is composed by Hydra from `conf/`; `_target_` names a class or function and the node's keys are its arguments.
Before anything is built, and so before a device is touched, three kinds of mistakes are looked for and all reported at
once: keys no callable takes, keys nobody has given a value, and plain values of the wrong type.
"""

import difflib
import inspect
import operator
import os
import tempfile
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import hydra
import lightning as L
import torch
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, InstantiationException
from hydra.types import RunMode
from lightning.pytorch.loggers import Logger
from omegaconf import MISSING, DictConfig, ListConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, InterpolationResolutionError

from ldm_train.callbacks import hide_idle_hooks
from ldm_train.checkpoint import load_weights, read_checkpoint
from ldm_train.data.locations import shown
from ldm_train.secrets import without_secrets
from ldm_train.submission import SWEPT_KEYS, gpus_per_node, job_name, study_of, tasks_per_node

_INSTANTIATE_KEYS = {"_target_", "_partial_", "_convert_", "_recursive_", "_args_"}
_TASKS = ("fit", "validate")
_PLAIN_TYPES = (str, int, float, bool)
_PARENTS_ARGUMENTS = {"trainer": {"callbacks", "logger"}}


class ConfigError(ValueError):
    """The config asks for something that cannot be; the message says what was found, what is allowed, which key."""


@dataclass
class Config:
    """The root of every config: strangers beside these keys are refused by Hydra itself."""

    name: str = MISSING
    run_id: str = MISSING
    seed: int = MISSING
    image_size: int = MISSING
    task: str = MISSING
    resume: str = MISSING
    metric: str = MISSING
    dry_run: bool = False
    paths: dict[str, str] = field(default_factory=dict)
    data: Any = None
    autoencoder: Any = None
    perceptual: Any = None
    adversarial: Any = None
    unet: Any = None
    conditioner: Any = None
    schedule: Any = None
    objective: Any = None
    sampler: Any = None
    guidance: Any = None
    optimizer: Any = None
    lr_scheduler: Any = None
    stage: Any = None
    trainer: Any = None
    callbacks: Any = None
    logger: Any = None


@dataclass(frozen=True)
class Run:
    """The built parts of a run."""

    stage: L.LightningModule
    data: L.LightningDataModule
    trainer: L.Trainer


def register() -> None:
    """Make the root schema and the resolvers known to Hydra; harmless when repeated."""
    ConfigStore.instance().store(name="schema", node=Config)
    resolvers: dict[str, Callable[..., Any]] = {
        "absolute": os.path.abspath,
        "asset": _asset,
        "gpus_per_node": gpus_per_node,
        "output_of": _output_of,
        "plus": operator.add,
        "run_id": _run_id,
        "study_of": study_of,
        "tasks_per_node": tasks_per_node,
    }
    for name, resolver in resolvers.items():
        OmegaConf.register_new_resolver(name, resolver, replace=True)


def conf_dir() -> Path:
    """The directory of the configs: inside an installed wheel, or beside the package in a checkout."""
    package = Path(str(files("ldm_train")))
    return package / "conf" if (package / "conf").is_dir() else package.parent / "conf"


def check(cfg: DictConfig) -> None:
    """Refuse a config that cannot be built.

    Raises:
        ConfigError: with every mistake found.
    """
    mistakes = [f"`{key}` has no value; give it one: `{key}=...`" for key in missing_keys(cfg)]
    if mistakes:
        experiments = sorted(path.stem for path in (conf_dir() / "experiment").glob("*.yaml"))
        mistakes.append(f"or choose an experiment, which chooses for you: `experiment={'|'.join(experiments)}`")
    else:
        mistakes = _unresolved(cfg) or unknown_keys(cfg)
    if not mistakes and cfg.task not in _TASKS:
        mistakes = [f"task is {cfg.task!r}; allowed are {' and '.join(_TASKS)}; change `task`"]
    if mistakes:
        raise ConfigError("the config cannot be run:\n" + "\n".join(f"  - {mistake}" for mistake in mistakes))


def _unresolved(cfg: DictConfig) -> list[str]:
    """The first interpolation that leads nowhere, as one of an environment variable that is not set."""
    try:
        OmegaConf.to_container(cfg, resolve=True)
    except InterpolationResolutionError as error:
        reason = str(error).splitlines()[0]
        return [f"`{error.full_key}` has no value: {reason}; set what it refers to, or change `{error.full_key}`"]
    return []


def missing_keys(cfg: DictConfig) -> list[str]:
    """Every key that is left to the user, `???`, sorted; what refers to one of them is no mistake of its own."""
    nodes = [(path, node) for path, node in _nodes(cfg, "") if isinstance(node, DictConfig)]
    return sorted(_joined(path, key) for path, node in nodes for key in node if OmegaConf.is_missing(node, key))


def unknown_keys(cfg: DictConfig) -> list[str]:
    """Every key that its node's `_target_` does not take, that it needs and lacks, or whose value has a wrong type."""
    mistakes: list[str] = []
    for path, node in _nodes(cfg, ""):
        if not isinstance(node, DictConfig) or "_target_" not in node:
            continue
        target = str(node["_target_"])
        try:
            parameters = inspect.signature(hydra.utils.get_object(target)).parameters
        except (ImportError, ValueError, TypeError) as error:
            mistakes.append(f"`{path}._target_` is {target!r}, which cannot be imported: {error}; {_home(path)}")
            continue
        given = {str(key) for key in node} - _INSTANTIATE_KEYS
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            mistakes += [_unknown(path, key, target, list(parameters)) for key in sorted(given - set(parameters))]
        if not node.get("_partial_", False):
            given |= _PARENTS_ARGUMENTS.get(path, set())
            mistakes += [
                f"`{path}.{key}` is missing; {target} needs it; {_home(path)}" for key in _needed(parameters, given)
            ]
        mistakes += _wrong_types(path, node, target)
    return mistakes


def explain_override(error: BaseException | None) -> str | None:
    """What is allowed in place of a key of the command line that Hydra did not find; `None` for all other errors."""
    if isinstance(error, ValueError) and str(error).startswith("Config group override must be"):
        return (
            "a group is set to null; allowed are the names of its options: `perceptual=none`, `adversarial=none`; "
            "leave another group out by `~group`"
        )
    cause = error.__cause__ if isinstance(error, ConfigCompositionException) else None
    if not isinstance(cause, ConfigKeyError | ConfigAttributeError) or cause.parent_node is None:
        return None
    path, _, key = str(cause.full_key).rpartition(".")
    allowed, owner = [str(name) for name in cause.parent_node], f"the node `{path}`" if path else "the config"
    if not allowed and (conf_dir() / path).is_dir():
        options = sorted(file.stem for file in (conf_dir() / path).glob("*.yaml") if file.stem != "none")
        return f"`{path}` has no keys while none of its options is chosen; allowed are `{path}={'|'.join(options)}`"
    if not allowed:
        return f"`{path}` has no keys of its own; if it stands for another node (`${{...}}`), change that one's"
    if "_target_" in allowed:
        owner = str(cause.parent_node["_target_"])
        allowed = list(inspect.signature(hydra.utils.get_object(owner)).parameters)
    return None if key in allowed else _unknown(path, key, owner, allowed)


def unwritable(error: OSError) -> str:
    """What to do about a directory that cannot be made or written."""
    where = error.filename or "the directory of the run"
    return (
        f"{where} cannot be written ({error.strerror}); allowed is a directory of yours with room in it; "
        "change `paths.root`, or the environment variable LDM_RUNS"
    )


def explain_unmade(error: BaseException | None) -> str | None:
    """The same, if Hydra could not make the run's directory or write its record; `None` for all other errors."""
    if not isinstance(error, OSError):
        return None
    names = [frame.f_code.co_name for frame, _ in traceback.walk_tb(error.__traceback__)]
    return unwritable(error) if names[-1] == "mkdir" or "_save_config" in names else None


def build(cfg: DictConfig, callbacks: tuple[L.Callback, ...] = ()) -> Run:
    """Build the parts of a run; the one place where configs become objects.

    Args:
        cfg: a checked config.
        callbacks: callbacks to add to the configured ones.

    Raises:
        ConfigError: if a constructor refuses its arguments.
    """
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    data = _instantiate(cfg.data, "data")
    stage = _instantiate(cfg.stage, "stage")
    loggers: list[Logger] = [_instantiate(node, f"logger.{name}") for name, node in (cfg.logger or {}).items() if node]
    watching = [_instantiate(node, f"callbacks.{name}") for name, node in (cfg.callbacks or {}).items() if node]
    trainer = _instantiate(cfg.trainer, "trainer", callbacks=[*watching, *callbacks], logger=loggers or False)
    hide_idle_hooks(trainer.callbacks)
    return Run(stage, data, trainer)


def load_run(path: Path) -> tuple[L.LightningModule, DictConfig]:
    """Rebuild a stage from its checkpoint: the config is inside, averaged weights are taken where it has them.

    The frozen parts of stages 2 and 3 are read from the checkpoints that the config names; if the whole directory of
    runs was moved, from their new places.

    Returns:
        The stage in evaluation mode, and the config.
    """
    checkpoint = read_checkpoint(path, key="--checkpoint")
    if "config" not in checkpoint:
        raise ConfigError(not_of_a_run(path))
    cfg = OmegaConf.create(_moved(checkpoint["config"], path.absolute()))
    assert isinstance(cfg, DictConfig)
    try:
        check(cfg)
    except ConfigError as error:
        raise ConfigError(
            f"{path} was trained with a config that this version of the package does not know:\n{error}"
        ) from error
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.seed)  # parts that were `untrained` have the weights of their run again
        stage = _instantiate(cfg.stage, "stage")
    load_weights(stage, checkpoint)
    return stage.eval(), cfg


def not_of_a_run(path: Path) -> str:
    """Why a checkpoint without a config cannot be gone on with."""
    return (
        f"{path} holds no config, as a converted autoencoder does; allowed are checkpoints that a run of this package "
        "has written; start from an autoencoder's weights by `stage.autoencoder.checkpoint`"
    )


def _moved(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """The config with the runs' root of its own time replaced by the one that `path` lies under now."""
    old_root, run_dir = Path(config["paths"]["root"]), Path(config["paths"]["run_dir"])
    below = (*run_dir.relative_to(old_root).parts, "checkpoints", path.name)
    if path.parts[-len(below) :] != below:
        return config
    new_root = Path(*path.parts[: -len(below)])

    def replaced(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {key: replaced(entry) for key, entry in value.items()}
        is_below = isinstance(value, str) and Path(value).is_relative_to(old_root)
        return str(new_root / Path(value).relative_to(old_root)) if is_below else value

    return replaced(config)


def plain(cfg: DictConfig) -> dict[str, Any]:
    """The resolved config as plain dictionaries, fit for a checkpoint: signatures, passwords and the like are `...`."""
    container = without_secrets(OmegaConf.to_container(cfg, resolve=True))
    assert isinstance(container, dict)
    return {str(key): value for key, value in container.items()}


def _instantiate(node: DictConfig, key: str, **given: object) -> Any:  # noqa: ANN401
    try:
        return hydra.utils.instantiate(node, _convert_="all", **given)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ValueError | RuntimeError | FileNotFoundError):
            raise ConfigError(f"`{key}` cannot be built: {cause}") from cause
        raise


def _nodes(node: DictConfig | ListConfig, path: str) -> Iterator[tuple[str, DictConfig | ListConfig]]:
    """All nodes, at their own home: a node reached by interpolation is checked where it stands."""
    yield path, node
    keys: Iterator[Any] = iter(node.keys()) if isinstance(node, DictConfig) else iter(range(len(node)))
    for key in keys:
        if OmegaConf.is_interpolation(node, key) or OmegaConf.is_missing(node, key):
            continue
        child = node[key]
        if isinstance(child, DictConfig | ListConfig):
            yield from _nodes(child, _joined(path, key))


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _unknown(path: str, key: str, owner: str, allowed: list[str]) -> str:
    close = difflib.get_close_matches(key, allowed, n=1)
    hint = f" (did you mean `{_joined(path, close[0])}`?)" if close else ""
    return f"`{_joined(path, key)}` is unknown to {owner}{hint}; allowed are {', '.join(allowed)}; {_home(path)}"


def _needed(parameters: Mapping[str, inspect.Parameter], given: set[str]) -> list[str]:
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    return [n for n, p in parameters.items() if p.default is p.empty and p.kind not in fixed and n not in given]


def _wrong_types(path: str, node: DictConfig, target: str) -> list[str]:
    thing = hydra.utils.get_object(target)
    # Only our own callables: annotations of other libraries often promise less than their code takes.
    if not target.startswith("ldm_train."):
        return []
    hints = get_type_hints(thing.__init__ if inspect.isclass(thing) else thing)
    return [
        f"`{path}.{key}` is {shown(repr(node[key]))}, {target} takes {_spelled(hints[key])}; {_home(path)}"
        for key in node
        if key in hints and not _fits(node[key], hints[key])
    ]


def _fits(value: object, hint: Any) -> bool:  # noqa: ANN401
    """Whether a value can be an argument of an annotated type; what is not plain is left to the constructor."""
    if get_origin(hint) in (Union, types.UnionType):
        return any(_fits(value, option) for option in get_args(hint))
    if isinstance(value, ListConfig):
        return hint not in _PLAIN_TYPES
    if isinstance(value, DictConfig):  # a part; or a mapping, which is no instance of a class
        return "_target_" in value or not isinstance(hint, type)
    if get_origin(hint) is Literal:
        return value in get_args(hint)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in (*_PLAIN_TYPES, type(None)):
        return isinstance(value, hint)
    if get_origin(hint) is not None:  # a sequence, a mapping, a callable
        return False
    return value is not None or hint is Any


def _spelled(hint: Any) -> str:  # noqa: ANN401
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _home(path: str) -> str:
    """The file a node comes from, where Hydra knows it."""
    if not path:
        return "see conf/config.yaml"
    group = path.split(".")[0]
    choice = HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None
    return f"see conf/{group}/{choice}.yaml" if choice else f"see conf/{group}/"


def _asset(relative: str) -> str:
    return str(Path(str(files("ldm_train"))) / "assets" / relative)


def _output_of(is_dry: bool, directory: str) -> str:
    """Where Hydra keeps its record of a run: a dry run's is thrown away."""
    return str(dry_run_output()) if is_dry else directory


def dry_run_output() -> Path:
    """The folder of Hydra's record of a dry run, which nobody keeps."""
    return Path(tempfile.gettempdir()) / f"ldm_train-dry-run-{os.getpid()}"


def _run_id(default: str) -> str:
    """`default` for a single run; in a multirun the job's own name, so that no two jobs share a directory."""
    if HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN:
        hydra, swept = HydraConfig.get(), os.environ.get(SWEPT_KEYS, "").split(",")
        excluded = hydra.job.config.override_dirname.exclude_keys
        return job_name(hydra.overrides.task, swept, excluded) or default
    return default
