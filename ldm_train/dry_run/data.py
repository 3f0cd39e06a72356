"""The data of a run: its shards, how many images they hold, and one batch as the run would decode it.

Shards on a disk are indexed, all of them, into `data.index_dir` as the run would: the run finds it there. Of shards
behind URLs each is asked for its size, and the first is fetched into `data.cache_dir`. What a data set writes besides
(a list of damage, the shard of a folder) goes into a temporary folder.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf

from ldm_train.checkpoint import read_checkpoint
from ldm_train.data import ImageTextDataModule, folders_of
from ldm_train.data.locations import is_url
from ldm_train.data.storage import identities
from ldm_train.dry_run.model import instantiated
from ldm_train.dry_run.report import FAILURES, Check, failed

_STATE = "ImageTextDataModule"


def aside(cfg: DictConfig, folder: Path) -> DictConfig:
    """The config with the run's own directory in a folder; what is shared between runs stays where it is."""
    copy = cfg.copy()
    OmegaConf.set_struct(copy, False)  # parts may get keys that their file leaves to the default
    copy.paths.run_dir = str(folder / "run")
    return copy


def check_data(cfg: DictConfig, checkpoint: Path | None) -> list[Check]:
    """Shards, images, one batch, and whether a checkpoint was trained on them.

    Args:
        cfg: the run's config, already `aside`; its `data` are changed.
        checkpoint: what the run goes on from; `None` for nothing.
    """
    node = cfg.data
    node.index_workers = node.get("index_workers", 0)  # not those of the loader any more
    node.num_workers = 0
    try:
        data = cast(ImageTextDataModule, instantiated(node))
        options = data.corpus.options
        missing = [found for found in folders_of(options.shards, options.mixture) if found.wanted is not None]
        for found in folders_of(options.shards, options.mixture):
            if found.wanted is None:
                _ = found.path
        if missing:
            text = f"{missing[0].wanted.number} images of {missing[0].wanted.prompt!r} are made before the first step"  # type: ignore[union-attr]
            return [Check("data", "ok", f"the other folders can be read; {text}")]
        locations = data.corpus.locations
        remote = [location for location in locations if is_url(location)]
        if remote:
            return [
                *_check_remote(data, locations, remote),
                *_check_images(_of_first(node, remote[0]), checkpoint=None),
            ]
        return _check_images(data, checkpoint)
    except FAILURES as error:
        return [failed("data", error, "change the key that names it, one of `data` or `paths`")]


def _check_remote(data: ImageTextDataModule, locations: Sequence[str], remote: Sequence[str]) -> list[Check]:
    sizes = [size for size, _ in identities(locations, data.corpus.storage)]
    room = data.shard_cache.max_bytes
    figure = f"{len(remote)} of {len(locations)} shards behind URLs answer, {sum(sizes) / 2**20:,.1f} MiB in all"
    if room < sum(sizes):
        figure += f"; `data.cache_bytes` holds {room / sum(sizes):.0%} of them"
    return [Check("shards", "ok", figure)]


def one_shard(location: str) -> dict[str, Any]:
    """Values of `data` with which a run reads this shard and no other."""
    others = dict.fromkeys(("mixture", "mixture_length", "mixture_block", "val_shards", "limit", "index_dir"))
    return {"shards": location, "val_fraction": 0.0, **others}


def _of_first(node: DictConfig, location: str) -> ImageTextDataModule:
    """The data of one shard alone, for a look at its images."""
    alone = {"shards": location, "mixture": None, "mixture_length": None, "mixture_block": None}
    every = {
        "val_shards": None,
        "val_fraction": 0.0,
        "limit": None,
        "index_dir": None,
        "buckets": None,
        "bucket_unit": 0,
    }
    node.update({**alone, **every})
    return cast(ImageTextDataModule, instantiated(node))


def _check_images(data: ImageTextDataModule, checkpoint: Path | None) -> list[Check]:
    facts = data.summary()
    training, validation = len(data.train_index), len(data.val_index)
    figure = f"{training:,} training and {validation:,} validation images in {facts['shards']} shards"
    damage = data.corpus.damage
    checks = [Check("data", "ok", figure)]
    if damage:
        shard, reason = damage[0]
        found = f"{figure}; {len(damage)} damages are left out, the first: {shard}: {reason}"
        checks = [Check("data", "warning", found, "python tools/inspect_shards.py names all of them")]
    return [*checks, *_check_resumed(data, checkpoint), _check_batch(data)]


def _check_resumed(data: ImageTextDataModule, checkpoint: Path | None) -> list[Check]:
    """Whether the data are those that a checkpoint was trained on: the loader refuses others."""
    state: dict[str, Any] | None = None if checkpoint is None else read_checkpoint(checkpoint).get(_STATE)
    if not state:
        return []
    data.load_state_dict(state)
    try:
        data.train_dataloader()
    except ValueError as error:
        data.load_state_dict({})
        return [failed("data of the checkpoint", error)]
    return [Check("data of the checkpoint", "ok", f"the same: {state.get('fingerprint', '')[:12]}")]


def _check_batch(data: ImageTextDataModule) -> Check:
    try:
        batch = next(iter(data.train_dataloader()))
    except StopIteration:
        return Check(
            "a batch", "failed", f"{len(data.train_index)} images give no batch of {data.batch_size}",
            "at least one batch of images; change `data.batch_size` or `data.shards`",
        )  # fmt: skip
    except FAILURES as error:
        return failed("a batch", error, "change `data`")
    what = "image" if "image" in batch else "moments"
    shape, bad = tuple(batch[what].shape), data.bad_samples
    captions = [caption for caption in batch.get("caption", []) if caption]
    example = f"; a caption: {captions[0][:60]!r}" if captions else ""
    figure = f"{what} {shape}{example}"
    if bad:
        return Check(
            "a batch", "warning", f"{figure}; {bad} images could not be decoded", "see `data.max_bad_fraction`"
        )
    return Check("a batch", "ok", figure)
