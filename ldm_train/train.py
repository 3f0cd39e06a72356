"""From a config to a trained stage: check, build, resume, fit or validate, return the swept metric."""

import ctypes
import logging
import os
import platform
import traceback
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import lightning as L
import torch
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.pytorch.utilities import rank_zero_warn
from omegaconf import DictConfig, OmegaConf

from ldm_train.callbacks import (
    Preempted,
    RankWatch,
    RunRecord,
    finish_wandb,
    leave_wandb,
    listening,
    refuse_another_start,
)
from ldm_train.checkpoint import UNTRAINED, load_weights, read_checkpoint, verify_checkpoint
from ldm_train.config import ConfigError, Run, build, check, not_of_a_run, plain, unwritable
from ldm_train.data import ShardReadError, folders_of
from ldm_train.data.storage import explained
from ldm_train.locking import LockHeldError, sole_writer
from ldm_train.results import final_figure, recorded
from ldm_train.secrets import secrets_in_clear
from ldm_train.stacks import answering_with_stacks
from ldm_train.stages import LatentDiffusion, make_class_images, refuse_if_cut

_log = logging.getLogger(__name__)

# What Lightning says on every run here although there is nothing to do about it; whatever else it says is heard.
_USUAL_LINES = ("GPU available: ", "TPU available: ", "💡 Tip: For seamless cloud ")
_USUAL_WARNINGS = (
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    r"Found \d+ module\(s\) in eval mode at the start",  # frozen parts stay there
    r"`broadcast_buffers` is deprecated",  # what takes its place is not in every version that is allowed
    r"Total length of `list` across ranks is zero",  # no validation images; the start-up summary counts them
)
_REMEDY = "change the key that names it, one of `data` or `paths`"
_CLOSE_WANDB = 10.0  # seconds that a run which was told to go has for it
_SRUN_WARNING = "The `srun` command is available on your system but is not used"


def train(cfg: DictConfig) -> float | None:
    """Run one job.

    Args:
        cfg: the composed config.

    Returns:
        The last value of `cfg.metric`, for sweepers; `None` if the run did not log it.

    Raises:
        ConfigError: if the config is refused; nothing has been touched then.
    """
    refuse(cfg)
    if OmegaConf.select(cfg, "callbacks.preemption.requeue") is False:
        refuse_another_start()
    _hush_lightning()
    _keep_heap()
    run_dir = Path(cfg.paths.run_dir)
    checkpoint = resume_path(cfg.resume, run_dir)
    if cfg.task == "validate" and checkpoint is None:
        raise ConfigError(
            f"task=validate found no checkpoint in {run_dir}; allowed are a path, or auto when this run has written "
            "one; change `resume`"
        )
    config = plain(cfg)
    if checkpoint is not None and cfg.task == "fit" and _is_multirun():
        with _refusals():
            refuse_figures_of_other_settings(read_checkpoint(checkpoint), config, checkpoint)
    run = build(cfg, callbacks=(RunRecord(config), RankWatch(config)))
    goes_on = checkpoint is not None and checkpoint.is_relative_to(run_dir.absolute())
    with (
        answering_with_stacks(),
        listening(run.trainer),
        _own_directory(run_dir, run.trainer),
        recorded(run_dir, run.trainer, goes_on),
    ):
        with _refusals():
            if cfg.task == "fit":
                run.stage.configure_optimizers()  # a curve that does not fit is refused before images are made
            _complete_folders(run)
            _ = run.data.train_index, run.data.val_index  # type: ignore[attr-defined]  # finds the shards, or does not
            run.stage.check_data(run.data.latent_facts)  # type: ignore[attr-defined, operator]
        try:
            if cfg.task == "validate" and checkpoint is not None:
                _validate(run, checkpoint)
            else:
                _fit(run, checkpoint, config)
        except Preempted:
            leave_wandb(_CLOSE_WANDB)  # before SLURM is asked to requeue: it ends W&B's process then
            raise
        except BaseException:
            finish_wandb()
            raise
        finish_wandb()
    return final_figure(run_dir, run.trainer, cfg.metric)


def refuse(cfg: DictConfig) -> None:
    """Refuse, with ConfigError, what can be refused before anything is built or touched."""
    check(cfg)
    _make_checkpoints_absolute(cfg)
    _refuse_sweep_of_subprocesses(cfg)
    _refuse_half_weights(cfg)
    _warn_of_secrets(cfg)


def _complete_folders(run: Run) -> None:
    """Let the model make the images that are still missing, and see that it can read the prompts of folders."""
    options = run.data.corpus.options  # type: ignore[attr-defined]
    folders = folders_of(options.shards, options.mixture)
    for folder in folders:
        if folder.prompt is not None and isinstance(run.stage, LatentDiffusion):
            refuse_if_cut(run.stage.conditioner, folder.prompt, f"`{folder.prompt_key}`")
        if folder.wanted is None:
            _ = folder.path  # reads it: what cannot be used is refused before images are made
    for folder in folders:
        if folder.wanted is not None:
            make_class_images(run.stage, folder.wanted, run.trainer.strategy.root_device, folder.prompt_key)


def resume_path(resume: str, run_dir: Path) -> Path | None:
    """The checkpoint to go on from: `auto` finds the run's own, `never` starts anew, all else is a path."""
    if resume == "never":
        return None
    if resume != "auto":
        path = Path(resume).absolute()
        if not path.is_file():
            raise ConfigError(
                f"there is no checkpoint at {path}; allowed are auto (go on where this run stopped), never (start "
                "anew) and the path of a checkpoint; change `resume`"
            )
        return path
    damaged = None
    for name in ("last.ckpt", "previous.ckpt"):
        path = run_dir / "checkpoints" / name
        if path.is_file():
            try:
                verify_checkpoint(path)
            except ValueError as error:
                damaged = error
                _log.warning("%s; trying the one before", error)
                continue
            if name != "last.ckpt":
                _log.warning("There is no whole last.ckpt in %s; going on from %s", path.parent, name)
            return path
    if damaged is not None:
        raise ConfigError(
            f"found no whole checkpoint in {run_dir / 'checkpoints'}: {damaged}; allowed are a whole one, or `never` "
            "to start anew over them; change `resume`"
        )
    return None


@contextmanager
def _own_directory(run_dir: Path, trainer: L.Trainer) -> Iterator[None]:
    """The run's directory, made if it is not there, and written by no second run meanwhile."""
    if not trainer.is_global_zero:
        yield
        return
    with ExitStack() as stack:
        try:
            run_dir.mkdir(parents=True, exist_ok=True)
            stack.enter_context(sole_writer(run_dir / ".lock", key="run_id"))
        except LockHeldError as error:
            raise ConfigError(str(error)) from error
        except OSError as error:
            raise ConfigError(unwritable(error)) from error
        yield


_PRECISIONS = ("32-true", "32", "bf16-mixed", "16-mixed")
_CHECKPOINTS = (
    "stage.autoencoder.checkpoint",
    "stage.denoiser.network.checkpoint",
    "stage.base_checkpoint",
    "conditioner.encoder.weights",
)

# Parts of a stage that may change between two halves of a run: they train nothing, or say where files lie.
_FREE = {"sampler", "guidance", "checkpoint", "base_checkpoint", "weights", "key", "total_steps"}
_FREE |= {"memory_format", "checkpoint_factors", "tile_size", "tile_overlap", "compile_network"}  # of memory and speed


def _leaves(node: object, path: str = "stage") -> dict[str, object]:
    """Path -> value of every plain value of a stage's config, without the parts that are free to change."""
    if not isinstance(node, dict):
        return {path: node}
    kept = {key: value for key, value in node.items() if key not in _FREE}
    return {name: leaf for key, value in kept.items() for name, leaf in _leaves(value, f"{path}.{key}").items()}


def refuse_another_recipe(trained: dict[str, Any], asked: dict[str, Any], checkpoint: Path) -> None:
    """A run is one recipe from its first step to its last.

    Raises:
        ConfigError: if the stage, its parts or its optimizer are not those the checkpoint was trained with.
    """
    before, now = _leaves(trained["stage"]), _leaves(asked["stage"])
    changed = [k for k in sorted(before.keys() | now.keys()) if before.get(k) != now.get(k)]
    if changed:
        listed = "".join(f"  - {key}: {before.get(key)!r} -> {now.get(key)!r}\n" for key in changed[:8])
        raise ConfigError(
            f"{checkpoint} was trained with another recipe:\n{listed}a run may change its sampler, guidance, steps "
            "and paths; start another one with `run_id=...`, or this one anew with `resume=never`"
        )


# Groups and keys that change no figure of a run that has all its steps, and the callbacks that make or change figures.
_NO_FIGURE = {"name", "run_id", "paths", "logger", "resume", "task", "metric", "dry_run"}
_PLACES = {"checkpoint", "base_checkpoint", "weights", "path", "directory", "run_dir", "default_root_dir"}
_PLACES |= {"cache_dir", "index_dir", "quarantine_dir", "num_workers", "log_every_n_steps", "cache_decoded"}
_JUDGES = {"ema", "reconstruction_distance", "samples", "likelihood"}


def refuse_figures_of_other_settings(content: dict[str, Any], asked: dict[str, Any], checkpoint: Path) -> None:
    """A sweep compares what its own settings gave; a run without a step to go would give what others gave.

    Args:
        content: of the checkpoint.
        asked: the config of this start.
        checkpoint: its path, for the message.

    Raises:
        ConfigError: if the run has all of its steps, and was trained by a config that differs from this one.
    """
    most = asked["trainer"].get("max_steps", -1)
    if "config" not in content or not content["global_step"] >= most >= 0:
        return
    before, now = _of_figures(content["config"]), _of_figures(asked)
    changed = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
    if changed:
        listed = "; ".join(f"`{key}`: {before.get(key)!r} -> {now.get(key)!r}" for key in changed[:8])
        raise ConfigError(
            f"this job has nothing to train, and its figures would be those of an earlier start with other settings "
            f"({listed}); allowed are the settings of {checkpoint}, or a run that begins anew; change `run_id` or "
            "`name`, or set `resume=never`"
        )


def _of_figures(config: dict[str, Any]) -> dict[str, object]:
    kept = {key: value for key, value in config.items() if key not in _NO_FIGURE}
    kept["callbacks"] = {key: value for key, value in (config.get("callbacks") or {}).items() if key in _JUDGES}

    def leaves(node: object, path: str) -> dict[str, object]:
        if not isinstance(node, dict):
            return {path: node}
        found = [leaves(value, f"{path}.{key}".lstrip(".")) for key, value in node.items() if key not in _PLACES]
        return {key: value for each in found for key, value in each.items()}

    return leaves(kept, "")


@contextmanager
def _refusals() -> Iterator[None]:
    """What our own code refuses before the first step is the config's fault, and no failure to trace."""
    try:
        yield
    except (ValueError, OSError, ShardReadError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(explained(error, _REMEDY)) from error


@contextmanager
def _refusals_before(step: int, trainer: L.Trainer) -> Iterator[None]:
    """The same for what is refused while Lightning runs: by a line of this package, before a step after `step`."""
    try:
        yield
    except (ValueError, OSError, ShardReadError) as error:
        if trainer.global_step > step or not _is_ours(error) or isinstance(error, ConfigError):
            raise
        raise ConfigError(explained(error, _REMEDY)) from error


def _is_ours(error: Exception) -> bool:
    """Whether an error was raised by a line of this package, or by what the system said to one."""
    files = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(error.__traceback__)]
    if isinstance(error, OSError):
        library = Path(os.__file__).parent
        files = [file for file in files if Path(file).parent != library and not file.startswith("<")]
    is_here = bool(files) and Path(files[-1]).is_relative_to(Path(__file__).parent)
    return is_here or isinstance(error, ShardReadError)  # that comes from a worker through lines of PyTorch


def _fit(run: Run, checkpoint: Path | None, config: dict[str, Any]) -> None:
    step = 0
    if checkpoint is not None:
        with _refusals():
            content = read_checkpoint(checkpoint)
        step = content["global_step"]
        if "config" not in content:
            raise ConfigError(not_of_a_run(checkpoint))
        refuse_another_recipe(content["config"], config, checkpoint)
        _log.info("Resuming from step %d of %s", step, checkpoint)
        if step >= run.trainer.max_steps >= 0:
            _log.info("This run has all of its %d steps already; more need a larger `trainer.max_steps`", step)
    with _refusals_before(step, run.trainer):
        run.trainer.fit(run.stage, datamodule=run.data, ckpt_path=checkpoint, weights_only=True)


def _validate(run: Run, checkpoint: Path) -> None:
    with _refusals():
        content = read_checkpoint(checkpoint)
        load_weights(run.stage, content)
    for callback in run.trainer.callbacks:  # type: ignore[attr-defined]
        callback.on_load_checkpoint(run.trainer, run.stage, content)
    _log.info("Validating the weights of step %d of %s", content["global_step"], checkpoint)
    with _refusals_before(content["global_step"], run.trainer):
        run.trainer.validate(run.stage, datamodule=run.data)


def _make_checkpoints_absolute(cfg: DictConfig) -> None:
    """A run's checkpoint names those of earlier stages, and is read from other directories than the command's."""
    for key in _CHECKPOINTS:
        path = OmegaConf.select(cfg, key)
        if path and path != UNTRAINED:
            OmegaConf.update(cfg, key, os.path.abspath(path))


def _is_multirun() -> bool:
    return HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN


def _refuse_sweep_of_subprocesses(cfg: DictConfig) -> None:
    """Lightning starts ranks by running this command again; in a multirun each would run the whole sweep again."""
    launched = "SLURM_JOB_ID" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    devices = OmegaConf.select(cfg, "trainer.devices", default=1)
    if devices == "auto":
        devices = 1 if cfg.trainer.accelerator == "cpu" else max(1, torch.cuda.device_count())
    if _is_multirun() and not launched and str(devices) != "1":
        raise ConfigError(
            f"a multirun with trainer.devices={devices}: each process that Lightning starts would run the whole sweep; "
            "allowed are trainer.devices=1, `torchrun --nproc-per-node N -m ldm_train ...` without -m, or a sweep "
            "submitted to SLURM; change `trainer.devices`"
        )


def _warn_of_secrets(cfg: DictConfig) -> None:
    if keys := secrets_in_clear(cfg):
        rank_zero_warn(
            f"a secret stands in clear in {', '.join(f'`{key}`' for key in keys)}, and Hydra keeps it in "
            f"{cfg.paths.run_dir}/.hydra. Allowed is an environment variable in its place: change it to "
            "`${oc.env:NAME}`."
        )


def _refuse_half_weights(cfg: DictConfig) -> None:
    """Weights of half precision would lose small updates, and the noise schedule its last digits."""
    precision = str(OmegaConf.select(cfg, "trainer.precision", default="32-true"))
    if precision not in _PRECISIONS:
        raise ConfigError(
            f"trainer.precision is {precision!r}; allowed are {', '.join(_PRECISIONS)}: weights stay in float32, and "
            "bf16-mixed computes in bfloat16; change `trainer.precision`"
        )


def _hush_lightning() -> None:
    for message in _USUAL_WARNINGS:
        warnings.filterwarnings("ignore", message)
    if "SLURM_JOB_ID" not in os.environ:  # inside a job the advice is good
        warnings.filterwarnings("ignore", _SRUN_WARNING)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_unusual)


def _is_unusual(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_USUAL_LINES)


def _keep_heap() -> None:
    """Ask glibc to keep freed memory.

    Large temporaries are otherwise given back and faulted in again at each step, which makes a step on a CPU up to
    twice as long. M_TRIM_THRESHOLD (-1) is the size above which the heap's free top is returned, M_MMAP_MAX (-4) the
    number of blocks that may bypass the heap.
    """
    if platform.libc_ver()[0] == "glibc":
        libc = ctypes.CDLL("libc.so.6")
        libc.mallopt(-1, 2**31 - 1)
        libc.mallopt(-4, 0)
