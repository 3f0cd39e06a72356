"""Captioned images for training and validation, from shards on disk, resumable at any batch.

Where training stands is counted from the batches that were *trained*: loaders fetch ahead, so what was fetched says
nothing. Lightning hands a batch over (`on_before_batch_transfer`), trains it, and counts it as processed; the state
moves past a batch only then. Every iteration of the loader begins at that state, whatever Lightning believes the epoch
to be, so a resumed run sees exactly the batches an unbroken one would have seen.

Lightning calls, on resume: `setup`, `load_state_dict`, `train_dataloader`, one `iter` of the loader.
"""

import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader

from ldm_train import distributed
from ldm_train.batch import ImageTextBatch, LatentFacts
from ldm_train.data.buckets import AspectBuckets, ShapeOfRow
from ldm_train.data.captions import CaptionSource, TextCaption
from ldm_train.data.corpus import Corpus, CorpusOptions, Shards, check
from ldm_train.data.crops import Crop, Shape, crop_of
from ldm_train.data.dataset import (
    INTERPOLATIONS,
    ImageOptions,
    ImageTextDataset,
    Sample,
    as_is,
    start_worker,
    with_signed_image,
)
from ldm_train.data.filters import Filter
from ldm_train.data.index import IMAGE, METADATA, ShardIndex
from ldm_train.data.labels import Label
from ldm_train.data.latents import LatentCache, LatentTextDataset, check_sizes
from ldm_train.data.locations import is_url
from ldm_train.data.quarantine import Quarantine, running_totals
from ldm_train.data.remote import RemoteFiles
from ldm_train.data.sampler import BatchRequest, Position, TrainingSampler, ValidationSampler
from ldm_train.data.segmentation import PixelClassifier, SegmentationMember
from ldm_train.data.shard_cache import ShardCache

_STATE_VERSION = 1
_PLACE = ("epoch", "samples", "global_batch_size")  # of a state: where training stands, no identity
_TRAINING, _VALIDATION = "training", "validation"


class ImageTextDataModule(L.LightningDataModule):
    """Batches of captioned images from WebDataset shards.

    Args:
        shards: tar files: paths, URLs, globs and brace patterns, one or a list; None beside `mixture`.
        image_size: side of the square images in pixels.
        batch_size: images per device and step.
        seed: the run's seed: order and augmentation follow from it.
        num_workers: loading processes per device; 0 loads in the main process.
        val_fraction: share of the samples kept for validation, chosen by a hash of their keys.
        val_shards: shards to validate on, instead of `val_fraction`.
        val_batch_size: images per device and validation step; None is `batch_size`.
        filters: which samples take part, see `ldm_train.data.filters`.
        limit: take only the first samples that the filters keep; None takes all.
        crop: which part of an image is shown: `center`, `random` (along the longer side), or a crop, see
            `ldm_train.data.crops`. Validation always takes the centre.
        flip: mirror half of the training images left to right.
        interpolation: `bicubic` or `bilinear`.
        caption: where captions come from, see `ldm_train.data.captions`; None takes the `.txt`.
        label: what says the class of a sample, see `ldm_train.data.labels`; None: batches have no `label`.
        segmentation: where segmentation maps come from, see `ldm_train.data.segmentation`; None: batches have none.
        cache_decoded: keep decoded images in memory, in each loading process; for small data sets.
        quarantine_dir: folder for the lists of damaged shards and undecodable images; None writes none.
        max_bad_fraction: share of undecodable images at which the run stops.
        max_pixels: width x height above which an image is refused as undecodable.
        reducing_gap: decode JPEG files at 1/2, 1/4 or 1/8 of their size as far as what is shown keeps this many times
            the pixels that are needed along each side; 1 is the fastest. None decodes all pixels.
        shuffle_groups: places of the data set that a batch mixes, see `ShuffledOrder`.
        shuffle_window: samples that are permuted together, see `ShuffledOrder`.
        prefetch_factor: batches that each worker prepares ahead.
        buckets: shapes that images are spread over by their aspect ratio; None: squares.
        bucket_unit: images of one shape in a row, which the global batch must divide; needs `buckets`.
        mixture: name -> `shards` and `weight` of data sets that are mixed, see `MixedOrder`.
        mixture_length: images of an epoch of the mixture; None is all of them.
        mixture_block: images in a row in which the shares of the mixture are exact, see `MixedOrder`; None is 4,096.
        index_dir: folder that keeps indices between runs; None indexes in memory.
        index_workers: processes that index shards; 0 and 1 use the main one.
        cache_dir: node-local directory for copies of remote shards, see `ShardCache`; None: under `TMPDIR`.
        cache_bytes: its size at most.
        storage_options: what reaches the stores of each protocol, see `RemoteFiles`.
        latents: the shards are cached latents, see `ldm_train.data.latents`; None: they are images.
    """

    _restored: dict[str, Any] | None = None
    _sampler: TrainingSampler | None = None
    _untrained = Position()
    _processed_before = -1

    def __init__(
        self,
        shards: Shards | None,
        image_size: int,
        batch_size: int,
        seed: int,
        num_workers: int = 0,
        val_fraction: float = 0.0,
        val_shards: Shards | None = None,
        val_batch_size: int | None = None,
        filters: Sequence[Filter] | None = None,
        limit: int | None = None,
        crop: str | Crop = "center",
        flip: bool = False,
        interpolation: str = "bicubic",
        caption: CaptionSource | None = None,
        label: Label | None = None,
        segmentation: SegmentationMember | PixelClassifier | None = None,
        cache_decoded: bool = False,
        quarantine_dir: str | None = None,
        max_bad_fraction: float = 0.01,
        max_pixels: int = 1 << 26,
        reducing_gap: float | None = None,
        shuffle_groups: int = 64,
        shuffle_window: int = 8192,
        prefetch_factor: int = 2,
        buckets: AspectBuckets | None = None,
        bucket_unit: int = 0,
        mixture: Mapping[str, Mapping[str, Any]] | None = None,
        mixture_length: int | None = None,
        mixture_block: int | None = None,
        index_dir: str | None = None,
        index_workers: int = 0,
        cache_dir: str | None = None,
        cache_bytes: int = 100 << 30,
        storage_options: Mapping[str, Mapping[str, Any]] | None = None,
        latents: LatentCache | None = None,
    ) -> None:
        super().__init__()
        self.batch_size, self.val_batch_size = batch_size, batch_size if val_batch_size is None else val_batch_size
        self.seed, self.cache_decoded, self.max_bad_fraction = seed, cache_decoded, max_bad_fraction
        self.num_workers, self.prefetch_factor, self.latents = num_workers, prefetch_factor, latents
        self.quarantine_dir = None if quarantine_dir is None else Path(quarantine_dir)
        caption, crop = caption or TextCaption(), crop_of(crop)
        decoding = interpolation, max_pixels, reducing_gap
        self.options = ImageOptions(image_size, crop, flip, *decoding, caption, label, segmentation)
        self.shard_cache = ShardCache(cache_dir, cache_bytes, RemoteFiles(storage_options), num_workers)
        self._check_arguments()
        which = shards, mixture, mixture_length, mixture_block, val_fraction, val_shards, list(filters or ()), limit
        extension = segmentation.extension if isinstance(segmentation, SegmentationMember) else None
        shapes, order = (buckets, bucket_unit, image_size), (shuffle_groups, shuffle_window)
        self.corpus = Corpus(
            CorpusOptions(seed, *which, self._required, extension, *shapes, *order, index_dir, index_workers),
            self.shard_cache,
        )
        self._caches: dict[str, dict[tuple[int, Shape], Sample]] = {_TRAINING: {}, _VALIDATION: {}}
        self._quarantines: list[Quarantine] = []

    def _check_arguments(self) -> None:
        for key in ("batch_size", "val_batch_size", "prefetch_factor"):
            value = getattr(self, key)
            check(value > 0, key, value, "positive")
        for key in ("image_size", "max_pixels"):
            value = getattr(self.options, key)
            check(value > 0, key, value, "positive")
        check(self.num_workers >= 0, "num_workers", self.num_workers, "0 (load in the main process) or more")
        check(0 <= self.seed < 1 << 64, "seed", self.seed, "from 0 to 2^64 - 1 (it is the root key `seed`)")
        check(0.0 <= self.max_bad_fraction <= 1.0, "max_bad_fraction", self.max_bad_fraction, "from 0 to 1")
        check(self.shard_cache.max_bytes > 0, "cache_bytes", self.shard_cache.max_bytes, "positive")
        interpolation = self.options.interpolation
        check(interpolation in INTERPOLATIONS, "interpolation", interpolation, f"one of {INTERPOLATIONS}")
        gap = self.options.reducing_gap
        check(gap is None or gap >= 1.0, "reducing_gap", gap, "null (decode all pixels), or 1 and more")
        is_fixed = crop_of(self.options.crop).draws == 0
        check(is_fixed or not self.cache_decoded, "crop", "drawn anew in each epoch", "center beside `cache_decoded`")

    @property
    def _required(self) -> tuple[int, ...]:
        """The kinds of members without which a sample is incomplete."""
        of_label = set() if self.options.label is None else {METADATA}
        return tuple(sorted({IMAGE, *self.options.caption.kinds, *of_label}))

    @cached_property
    def latent_facts(self) -> LatentFacts | None:
        """What is known of the cached latents that batches hold; None where they hold images.

        Raises:
            ValueError: if the cache does not fit the run.
        """
        if self.latents is None:
            return None
        corpus = self.corpus
        facts = self.latents.facts(corpus.locations, self.options, corpus.shapes, corpus.storage)
        check_sizes([self.train_index, self.val_index])
        return facts

    @property
    def train_index(self) -> ShardIndex:
        """The training samples."""
        return self.corpus.training.index

    @property
    def val_index(self) -> ShardIndex:
        """The validation samples; empty when there are none."""
        return self.corpus.validation.index

    @property
    def global_batch_size(self) -> int:
        """Images per training step on all devices."""
        return self.batch_size * self._ranks[1]

    @property
    def bad_samples(self) -> int:
        """Images that could not be decoded so far, in this process and its workers."""
        return sum(quarantine.bad for quarantine in self._quarantines)

    def meters(self) -> dict[str, float]:
        """What this rank's loading has come to so far; the sum over ranks is the run's."""
        is_remote = any(is_url(path) for path in self.train_index.paths)
        return running_totals(self._quarantines, [self.shard_cache] if is_remote else [])

    def summary(self) -> dict[str, object]:
        """Plain facts for the start-up table."""
        return self.corpus.summary() | {
            "image size": self.options.image_size,
            "batch size per device": self.batch_size,
            "global batch size": self.global_batch_size,
            "batches per epoch": len(self.corpus.order) // self.global_batch_size,
            "workers per device": self.num_workers,
        }

    @property
    def _ranks(self) -> tuple[int, int]:
        if self.trainer is not None:
            return self.trainer.global_rank, self.trainer.world_size
        return distributed.global_rank(), distributed.world_size()

    def setup(self, stage: str) -> None:
        """Build the index, name what is damaged, and forget the position of an earlier run."""
        self._restored, self._sampler = None, None
        damage = self.corpus.damage
        if damage and self._ranks[0] == 0:
            shown = "; ".join(f"{shard}: {reason}" for shard, reason in damage[:3])
            warnings.warn(f"{len(damage)} damages in the shards were left out, the first being {shown}", stacklevel=2)
            if self.quarantine_dir is not None:
                self.quarantine_dir.mkdir(parents=True, exist_ok=True)
                lines = (json.dumps(entry._asdict()) + "\n" for entry in damage)
                (self.quarantine_dir / "damage.jsonl").write_text("".join(lines), encoding="utf-8")

    def train_dataloader(self) -> DataLoader[ImageTextBatch]:
        """This rank's training batches, beginning where training stands; images are uint8."""
        if overfit_batches := getattr(self.trainer, "overfit_batches", 0):
            raise ValueError(
                f"`trainer.overfit_batches` is {overfit_batches}; it must be 0, because Lightning would "
                "replace the order of the data. To train on few images set `data.limit`."
            )
        self._sampler = TrainingSampler(self.corpus.order, self.batch_size, *self._ranks)
        training = self.corpus.training
        dataset = self._dataset(training.index, self.options, _TRAINING, shape_of=self.corpus.shape_of(training))
        if self._restored:
            self._restore(self._sampler, self._restored)
        self._untrained, self._processed_before = self._sampler.position, -1
        return self._loader(dataset, self._sampler)

    def val_dataloader(self) -> DataLoader[ImageTextBatch] | list[Any]:
        """This rank's validation batches, the same in every epoch; an empty list without validation images."""
        if not len(self.val_index):
            return []
        validation = self.corpus.validation
        index, buckets = validation.index, validation.buckets
        sampler = ValidationSampler(len(index), self.val_batch_size, *self._ranks, buckets=buckets)
        shape_of = self.corpus.shape_of(validation)
        return self._loader(self._dataset(index, self.options.plain(), _VALIDATION, shape_of=shape_of), sampler)

    def reference_batches(
        self, count: int | None, batch_size: int, data_set: str | None = None
    ) -> Iterator[ImageTextBatch]:
        """A fixed subset of the training images without augmentation, in a fixed mixed order.

        The order follows from a hash of the keys: neither seed, rank, epoch nor the spread over shards changes it.

        Args:
            count: images; None is all of them.
            batch_size: images per batch; the last may be smaller.
            data_set: of this one of the mixture alone; None: of all.
        """
        rows = self.train_index.ranked("reference", None if data_set else count)
        if data_set is not None:
            first, end = self.corpus.rows_of(data_set)
            rows = rows[(first <= rows) & (rows < end)][:count]
        for begin in range(0, len(rows), batch_size):
            positions = np.arange(begin, min(begin + batch_size, len(rows)))
            yield with_signed_image(self._references[BatchRequest(0, rows[positions], positions)])

    @cached_property
    def _references(self) -> ImageTextDataset:
        if self.latents is None:
            return self._dataset(self.train_index, self.options.plain(), _TRAINING, num_workers=0)
        extension = self.corpus.options.segmentation
        images = self.latents.images_of(self.train_index, self._required, extension, self.shard_cache.glob)
        quarantine = Quarantine(None, self.max_bad_fraction, num_workers=0)
        return ImageTextDataset(images, self.options.plain(), self.seed, quarantine)

    def _dataset(
        self,
        index: ShardIndex,
        options: ImageOptions,
        split: str,
        num_workers: int | None = None,
        shape_of: ShapeOfRow | None = None,
    ) -> ImageTextDataset:
        path = None if self.quarantine_dir is None else self.quarantine_dir / f"{split}-rank{self._ranks[0]}"
        workers = self.num_workers if num_workers is None else num_workers
        quarantine = Quarantine(path, self.max_bad_fraction, workers)
        self._quarantines.append(quarantine)
        cache = self._caches[split] if self.cache_decoded else None
        kind = ImageTextDataset if self.latent_facts is None else LatentTextDataset
        return kind(index, options, self.seed, quarantine, cache, shape_of)

    def _loader(
        self, dataset: ImageTextDataset, sampler: TrainingSampler | ValidationSampler
    ) -> DataLoader[ImageTextBatch]:
        return DataLoader(
            dataset,
            sampler=sampler,
            batch_size=None,  # the sampler asks for batches, and a worker makes one at a time
            collate_fn=as_is,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # else every iteration would draw from the run's own generator
        )

    def on_before_batch_transfer(self, batch: ImageTextBatch, dataloader_idx: int) -> ImageTextBatch:
        """Lightning is about to train this batch: move the position past it, and keep the one before."""
        if self._sampler is not None and self.trainer is not None and self.trainer.training:
            self._untrained, self._processed_before = self._sampler.position, self._batch_progress.total.processed
            self._sampler.advance(self.trainer.num_training_batches)
        return batch

    def on_after_batch_transfer(self, batch: ImageTextBatch, dataloader_idx: int) -> ImageTextBatch:
        """The bytes that workers sent become values in [-1, 1], where that costs nothing."""
        return with_signed_image(batch)

    @property
    def _batch_progress(self) -> Any:  # noqa: ANN401 (Lightning's annotation lacks `processed`)
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def state_dict(self) -> dict[str, Any]:
        """Where training stands: a few integers, the same on every rank."""
        if self._sampler is None or self.trainer is None:
            return self._restored or {}
        is_trained = self._batch_progress.total.processed > self._processed_before
        epoch, samples = self._sampler.position if is_trained else self._untrained
        batch = self._sampler.global_batch_size
        place = {"epoch": epoch, "samples": samples, "global_batch_size": batch}
        return {**self._identity(), **place}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state for `train_dataloader`; validation does not need it to fit."""
        self._restored = state_dict

    def _identity(self) -> dict[str, Any]:
        """What the meaning of a position depends on."""
        return {"version": _STATE_VERSION, **self.corpus.identity()}

    def _restore(self, sampler: TrainingSampler, state: dict[str, Any]) -> None:
        own = self._identity()
        keys = [key for key in own | state if key not in _PLACE]
        differences = [
            f"{key} {state.get(key)!r} -> {own.get(key)!r}" for key in keys if state.get(key) != own.get(key)
        ]
        if differences:
            raise ValueError(
                f"the checkpoint was trained on other data or in another order ({', '.join(differences)}). A resumed "
                "run must keep `data.shards`, `data.filters`, `data.limit`, `data.val_fraction`, `data.shuffle_*`, "
                "`data.bucket*`, `data.mixture*` and `seed`; to begin a new run instead set `resume=never` and another "
                "`run_id`."
            )
        # Lightning asks for a loader with a state of its own; ours begins where this state says.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")
        sampler.position = Position(state["epoch"], state["samples"])
        if not sampler.remaining:
            sampler.position = Position(state["epoch"] + 1)
        if self.trainer is not None and state["global_batch_size"] != sampler.global_batch_size:
            self._recount_batches(sampler)

    def _recount_batches(self, sampler: TrainingSampler) -> None:
        """Tell Lightning how many batches of the *new* size lie behind: it ends the epoch at `len(sampler)`."""
        behind = len(sampler) - (sampler.remaining if sampler.position.samples else 0)
        progress = self._batch_progress.current
        shift = behind - progress.processed if progress.processed else 0
        for counter in ("ready", "started", "processed", "completed"):
            setattr(progress, counter, getattr(progress, counter) + shift)
