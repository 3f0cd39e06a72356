"""Two steps of a run with small networks of the same kinds: training, validation, a save and its reading back.

The config is the run's own (stage, conditions, schedule, objective, callbacks, data), with numbers made small as
`debug=tiny` does (its file is read), and every network cut to some thousands of parameters: widths, depths and the
image's size, in such a way that they still fit each other. With f the factor of the autoencoder and u that of the
U-Net, images have max(f u, 32) pixels a side. Cached latents have their size and their encoder, which stay.

Weights of others are left out here, for they would not fit: an autoencoder is untrained, and so is a text encoder. A
base model of stage 3 is made, and written to the folder.
"""

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, ListConfig, OmegaConf

from ldm_train.checkpoint import verify_checkpoint
from ldm_train.config import conf_dir
from ldm_train.dry_run.data import one_shard
from ldm_train.dry_run.model import instantiated
from ldm_train.dry_run.report import silent
from ldm_train.dry_run.weights import NeededWeights, needed_weights, without
from ldm_train.stages import LatentDiffusion, LoRAFineTuning
from ldm_train.train import train

STEPS = 2
_SIDE = 32  # pixels at least: a discriminator of patches needs them
_FEW = 4  # of images, codes times eight, and whatever else is counted
_WIDTH, _HEADS, _GROUPS = 16, 2, 4
_LORA = f"{LoRAFineTuning.__module__.rpartition('.')[0]}.LoRAFineTuning"
_BASE_STAGE = "ldm_train.stages.LatentDiffusion"
# What may be small wherever it stands: in a network, an evaluation, a sampler or a list of images.
_SMALL = {
    "num_images": _FEW,
    "num_pairs": _FEW,
    "num_real": 2 * _FEW,
    "num_times": 2,
    "num_class_images": _FEW,
    "warmup_steps": 1,
    "codebook_size": 32,
}
_OF_NETWORKS = {"channels": _WIDTH, "num_res_blocks": 1, "num_layers": 2}
_OFF = {"reference_statistics": None, "tile_size": None}
_SILENT = ("summary", "progress", "preemption")


def tiny(cfg: DictConfig, folder: Path, location: str | None) -> DictConfig:
    """The small run.

    Args:
        cfg: the run's config, already `aside`.
        folder: where the run goes.
        location: take this shard alone; `None`: those of the run.
    """
    copy = cfg.copy()
    OmegaConf.set_struct(copy, False)
    _like_debug(copy)
    _shrink(copy)
    without(copy, [needed for needed in needed_weights(copy) if _is_left_out(needed, copy)])
    copy.paths.root, copy.paths.run_dir = str(folder), str(folder / "run")
    copy.resume, copy.dry_run, copy.task, copy.logger = "never", False, "fit", {}
    _trainer(copy)
    for name in _SILENT:
        if copy.callbacks and name in copy.callbacks:
            copy.callbacks[name] = None
    copy.data.buckets, copy.data.bucket_unit = None, 0
    copy.data.batch_size = min(_FEW, int(cfg.data.batch_size))
    copy.data.val_batch_size = None
    if location is not None:
        copy.data.update(one_shard(location))
    if "total_steps" in (copy.lr_scheduler or {}):
        copy.lr_scheduler.total_steps = STEPS
    return copy


def make_steps(cfg: DictConfig, folder: Path) -> str:
    """Run a config that `tiny` made; what was done, in words.

    Raises:
        Exception: whatever the run ends with.
    """
    with silent():
        if cfg.stage.get("_target_") == _LORA:
            cfg.stage.base_checkpoint = str(_write_base(cfg, folder / "base.ckpt"))
        loss = train(cfg)
    last = folder / "run/checkpoints/last.ckpt"
    saved = f"a checkpoint of {last.stat().st_size / 2**20:.1f} MiB, read back" if last.exists() else "no checkpoint"
    if last.exists():
        verify_checkpoint(last)
    judged = f"{cfg.metric} {loss:.3g}" if loss is not None else "no validation image"
    return f"{STEPS} steps of {cfg.image_size} px on the CPU, {judged}, {saved}"


def _like_debug(cfg: DictConfig) -> None:
    """The numbers of `debug=tiny`, but for where it writes."""
    debug: Any = OmegaConf.load(conf_dir() / "debug" / "tiny.yaml")
    for group in ("data", "optimizer", "lr_scheduler", "trainer"):
        for key, value in dict(debug[group]).items():
            if group != "lr_scheduler" or (cfg.lr_scheduler and key in cfg.lr_scheduler):
                cfg[group][key] = value


def _trainer(cfg: DictConfig) -> None:
    one = {"devices": 1, "num_nodes": 1, "strategy": "auto", "plugins": None, "accumulate_grad_batches": 1}
    short = {"max_steps": STEPS, "val_check_interval": 1, "limit_val_batches": 1, "enable_progress_bar": False}
    cfg.trainer.update({**one, **short, "default_root_dir": cfg.paths.run_dir})


def _shrink(cfg: DictConfig) -> None:
    is_cached = cfg.data.get("latents") is not None
    for group in ("autoencoder", "unet", "conditioner", "adversarial"):
        for node in () if is_cached and group == "autoencoder" else _nodes(cfg.get(group)):
            _shrink_network(node)
    for node in _nodes(cfg.conditioner):
        _set(node, {"context_dim": _WIDTH, "vector_dim": _WIDTH})
    for node in _nodes(cfg):
        _set(node, _SMALL | _OFF)
    if cfg.sampler:
        _set(cfg.sampler, {"num_steps": 2})
    if not is_cached:
        cfg.image_size = _side(cfg)


def _shrink_network(node: DictConfig) -> None:
    _set(node, _OF_NETWORKS)
    if "channel_multipliers" in node:  # a file may leave the groups to the default
        node.norm_groups = _GROUPS
    if node.get("num_heads") is not None:
        node.num_heads = _HEADS
    if node.get("head_channels") is not None:
        node.head_channels = _WIDTH // _HEADS
    if isinstance(node.get("transformer_depth"), ListConfig):
        node.transformer_depth = [1] * len(node.transformer_depth)


def _side(cfg: DictConfig) -> int:
    side = 1
    for group in ("autoencoder", "unet"):
        node = cfg.get(group)
        if node and "channel_multipliers" in node:
            side *= 2 ** (len(node.channel_multipliers) - 1)
    return max(side, _SIDE)


def _is_left_out(needed: NeededWeights, cfg: DictConfig) -> bool:
    """Files that do not fit small networks; VGG16 does, and the encoder of cached latents is as large as ever."""
    if needed.kind == "vgg16":
        return not needed.is_there
    return cfg.data.get("latents") is None or needed.node != "stage.autoencoder"


def _write_base(cfg: DictConfig, path: Path) -> Path:
    """A base model for stage 3: stage 2 with the same parts, as it is at its start."""
    node = OmegaConf.to_container(cfg.stage, resolve=False)
    assert isinstance(node, dict)
    of_base: dict[Any, Any] = {key: value for key, value in node.items() if key not in _own_keys_of_lora()}
    whole = cfg.copy()
    whole.stage = {**of_base, "_target_": _BASE_STAGE}
    torch.manual_seed(int(cfg.seed))
    stage = instantiated(whole.stage)
    content: dict[str, Any] = {"state_dict": stage.state_dict(), "global_step": 0}
    stage.on_save_checkpoint(content)
    torch.save(content, path)
    return path


def _own_keys_of_lora() -> set[str]:
    """The arguments of stage 3 that stage 2 has not."""
    three, two = (set(inspect.signature(kind).parameters) for kind in (LoRAFineTuning, LatentDiffusion))
    return three - two


def _nodes(node: object) -> Iterator[DictConfig]:
    """A node and those in it, each where it stands."""
    if isinstance(node, DictConfig):
        yield node
    if isinstance(node, DictConfig | ListConfig):
        keys: list[Any] = list(node.keys()) if isinstance(node, DictConfig) else list(range(len(node)))
        for key in keys:
            if not OmegaConf.is_interpolation(node, key) and not OmegaConf.is_missing(node, key):
                yield from _nodes(node[key])


def _set(node: DictConfig, values: dict[str, Any]) -> None:
    """The values of keys that stand there; numbers only become smaller."""
    for key, value in values.items():
        if key not in node or OmegaConf.is_interpolation(node, key):
            continue
        found = node[key]
        if value is None or (isinstance(found, int | float) and found > value):
            node[key] = value
