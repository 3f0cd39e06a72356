"""The checks in their order, each of which goes on after the others have failed."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf
from torch import nn

from ldm_train.checkpoint import read_checkpoint
from ldm_train.config import ConfigError, not_of_a_run, plain
from ldm_train.data.locations import is_url
from ldm_train.dry_run import model, places
from ldm_train.dry_run.data import aside, check_data
from ldm_train.dry_run.report import FAILURES, Check, failed, show, silent
from ldm_train.dry_run.tiny import make_steps, tiny
from ldm_train.dry_run.weights import NeededWeights, needed_weights, without
from ldm_train.train import refuse, refuse_another_recipe, resume_path


def dry_run(cfg: DictConfig) -> bool:
    """Check a run and print the table.

    Args:
        cfg: the composed config.

    Returns:
        Whether nothing failed. Of several processes of a run the first one checks, and the others return at once.
    """
    if rank_zero_only.rank:  # type: ignore[attr-defined]
        return True
    found = list(checks(cfg))
    count = sum(check.state == "failed" for check in found)
    outcome = "it can be started" if not count else f"{count} of {len(found)} checks failed"
    show(found, f"dry run of {cfg.paths.run_dir}: {outcome}")
    return not count


def checks(cfg: DictConfig) -> Iterator[Check]:
    """All checks; where the config itself is refused nothing else means anything.

    Each gets a copy of the config: to build a part resolves what its node refers to, there and not only in the part.
    """
    try:
        refuse(cfg)
    except ConfigError as error:
        yield failed("config", error)
        return
    yield Check("config", "ok", f"experiment {cfg.name}, run {cfg.run_id}: all keys are known and have values")
    yield _tried("folders", places.check_writable, cfg)
    yield _tried("run directory", places.check_free, cfg)
    checkpoint, check = _checkpoint(cfg)
    yield check
    with tempfile.TemporaryDirectory(prefix="ldm_train-dry-run-") as folder:
        yield from check_data(aside(cfg, Path(folder)), checkpoint)
        yield from _check_model(cfg.copy())
        yield _check_steps(aside(cfg, Path(folder)), Path(folder))
    yield _tried("SLURM", places.check_slurm, cfg)


def _tried(name: str, check: Callable[[DictConfig], Check], cfg: DictConfig) -> Check:
    try:
        return check(cfg)
    except FAILURES as error:
        return failed(name, error)


def _checkpoint(cfg: DictConfig) -> tuple[Path | None, Check]:
    """What the run goes on from, and whether it may."""
    name = "resume"
    try:
        path = resume_path(cfg.resume, Path(cfg.paths.run_dir))
        if path is None:
            if cfg.task == "validate":
                remedy = "a path, or auto when this run has written one; change `resume`"
                return None, Check(name, "failed", f"task=validate finds no checkpoint in {cfg.paths.run_dir}", remedy)
            return None, Check(name, "ok", "the run begins anew")
        content = read_checkpoint(path)
        if "config" not in content:
            raise ConfigError(not_of_a_run(path))
        if cfg.task == "fit":
            refuse_another_recipe(content["config"], plain(cfg), path)
        return path, Check(name, "ok", f"from step {content['global_step']} of {path}")
    except FAILURES as error:
        return None, failed(name, error, "change `resume`")


def _check_model(cfg: DictConfig) -> Iterator[Check]:
    """Files of weights, the parts that load them, the stage around the parts, and the room for its checkpoints."""
    needed = needed_weights(cfg)
    missing = [weights for weights in needed if not weights.is_there]
    for weights in missing:
        yield Check(weights.key, "failed", f"there is nothing at {weights.path}", _remedy(weights))
    if there := [weights.path.name for weights in needed if weights.is_there]:
        yield Check("weights", "ok", f"{len(there)} of {len(needed)} are there: {', '.join(there)}")
    without(cfg, missing)  # the rest can be looked at
    parts: dict[str, nn.Module] = {}
    for name, build in _builders(cfg).items():
        try:
            with silent():
                parts[name] = part = build(cfg)
        except FAILURES as error:
            yield failed(name, error, f"change `{name}`")
        else:
            count = sum(parameter.numel() for parameter in part.parameters())
            yield Check(name, "ok", f"{type(part).__name__}, {count:,} parameters")
    yield from _check_extractors(cfg, needed)
    if parts.keys() == _builders(cfg).keys() and all(weights.kind != "base model" for weights in missing):
        yield from _check_stage(cfg, parts)
    else:
        yield Check("stage", "not checked", "a part of it cannot be built, see above")
        yield Check("room", "not checked", "the size of a checkpoint is not known")


def _remedy(weights: NeededWeights) -> str:
    fetched = weights.kind in ("vgg16", "inception", "text encoder")
    get = (
        "fetch it (`python tools/fetch_weights.py experiment=...`)" if fetched else "train that stage, or copy it there"
    )
    return f"{get}, or change `{weights.key}`"


def _builders(cfg: DictConfig) -> dict[str, Callable[[DictConfig], nn.Module]]:
    """Name of a part -> what builds it."""
    if "denoiser" not in cfg.stage:
        return {"autoencoder": model.built_autoencoder}
    return {
        "autoencoder": model.built_autoencoder,
        "network": model.built_network,
        "conditioner": model.built_conditioner,
    }


def _check_extractors(cfg: DictConfig, needed: list[NeededWeights]) -> Iterator[Check]:
    """What reads a file beside the stage."""
    for weights in needed:
        if weights.is_there and weights.kind == "inception":
            try:
                model.instantiated(OmegaConf.select(cfg, weights.node))
            except FAILURES as error:
                yield failed(weights.node, error, f"change `{weights.key}`")


def _check_stage(cfg: DictConfig, parts: dict[str, nn.Module]) -> Iterator[Check]:
    try:
        with silent(), torch.random.fork_rng(devices=[]):
            stage = model.built_stage(cfg, parts)
            size = model.checkpoint_bytes(stage, is_averaged=_is_averaged(cfg))
    except FAILURES as error:
        yield failed("stage", error, "change `stage`")
        yield Check("room", "not checked", "the size of a checkpoint is not known")
        return
    count = sum(parameter.numel() for parameter in stage.parameters() if parameter.requires_grad)
    yield Check("stage", "ok", f"{type(stage).__name__}, {count:,} parameters are trained")
    yield _tried("room", lambda given: places.check_room(given, size), cfg)


def _is_averaged(cfg: DictConfig) -> bool:
    node: Any = (cfg.callbacks or {}).get("ema")
    return bool(node) and (node.get("decay") is not None or node.get("half_life_images") is not None)


def _check_steps(cfg: DictConfig, folder: Path) -> Check:
    """The small run; of shards behind URLs on the first one, which is here already."""
    try:
        shards = cfg.data.get("shards")
        first = _first_remote(cfg) if shards is not None else None
        return Check("two small steps", "ok", make_steps(tiny(cfg, folder, first), folder))
    except FAILURES as error:
        return failed("two small steps", error, "see the checks above, or try `debug=tiny`")


def _first_remote(cfg: DictConfig) -> str | None:
    data = model.instantiated(cfg.copy().data)
    return next((location for location in data.corpus.locations if is_url(location)), None)
