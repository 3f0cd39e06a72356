"""The corpus of a run: which samples it trains and validates on, in which order, and in which shapes.

Everything here follows from the shards' headers and metadata, before an image is read. Several data sets may be mixed,
each with its weight (`ldm_train.data.mixed_order`); they make one index, in which each owns the shards it named. Images
may be spread over shapes by their aspect ratio (`ldm_train.data.buckets`); images of one shape then follow one another
(`ldm_train.data.bucketed_order`), so that every batch has one.
"""

import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from ldm_train import distributed
from ldm_train.data.bucketed_order import BucketedOrder
from ldm_train.data.buckets import AspectBuckets, ShapeOfRow, assign
from ldm_train.data.crops import Shape
from ldm_train.data.filters import Filter
from ldm_train.data.index import Damage, ShardIndex, build_index
from ldm_train.data.locations import expand_shards, shown
from ldm_train.data.mixed_order import LARGE_BLOCK, MixedOrder, exact_shares
from ldm_train.data.order import Order, ShuffledOrder
from ldm_train.data.shard_cache import ShardCache
from ldm_train.data.storage import LOCAL_FILES, Routed, Storage

_BLOCK = 1 << 20
Shards = str | Sequence[str]


@dataclass(frozen=True)
class CorpusOptions:
    """What a corpus is made of; the keys are those of `data` in the config.

    Attributes:
        seed: the run's seed: the order follows from it.
        shards: the tar files of one data set, or None where there is a mixture.
        mixture: name -> `shards` and `weight` of each data set that is mixed; None: there is one.
        mixture_length: images of an epoch of the mixture; None is all of them.
        mixture_block: images in a row in which the shares are exact; None is 4,096.
        val_fraction: share of the samples kept for validation, chosen by a hash of their keys.
        val_shards: shards to validate on, instead of `val_fraction`.
        filters: which samples take part.
        limit: only the first samples that the filters keep; None is all.
        required: the kinds of members without which a sample is incomplete.
        segmentation: the extension of segmentation maps, which are then required too.
        buckets: the shapes that images are spread over; None: all are squares.
        bucket_unit: images of one shape in a row.
        image_size: side of the squares, or of the square among the shapes.
        shuffle_groups: see `ShuffledOrder`.
        shuffle_window: see `ShuffledOrder`.
        index_dir: folder that keeps indices between runs; None indexes in memory.
        index_workers: processes that index shards; 0 and 1 use the main one.

    Raises:
        ValueError: if options contradict each other.
    """

    seed: int
    shards: Shards | None = None
    mixture: Mapping[str, Mapping[str, Any]] | None = None
    mixture_length: int | None = None
    mixture_block: int | None = None
    val_fraction: float = 0.0
    val_shards: Shards | None = None
    filters: Sequence[Filter] = ()
    limit: int | None = None
    required: Sequence[int] = ()
    segmentation: str | None = None
    buckets: AspectBuckets | None = None
    bucket_unit: int = 0
    image_size: int = 0
    shuffle_groups: int = 64
    shuffle_window: int = 8192
    index_dir: str | None = None
    index_workers: int = 0

    def __post_init__(self) -> None:
        for key in ("limit", "mixture_length", "mixture_block", "shuffle_groups", "shuffle_window"):
            value = getattr(self, key)
            check(value is None or value > 0, key, value, "positive")
        check(0.0 <= self.val_fraction < 1.0, "val_fraction", self.val_fraction, "at least 0 and below 1")
        check(not (self.val_fraction and self.val_shards), "val_fraction", self.val_fraction, "0 beside `val_shards`")
        check(self.index_workers >= 0, "index_workers", self.index_workers, "0 (index in the main process) or more")
        self._check_mixture()
        if self.buckets is None:
            check(self.bucket_unit == 0, "bucket_unit", self.bucket_unit, "0 without `data.buckets`")
        else:
            rule = "a multiple of the global batch with `data.buckets`, such as 1024"
            check(self.bucket_unit > 0, "bucket_unit", self.bucket_unit, rule)

    def _check_mixture(self) -> None:
        if self.mixture is None:
            check(self.shards is not None, "shards", self.shards, "tar files, or null beside `data.mixture`")
            for key in ("mixture_length", "mixture_block"):
                check(getattr(self, key) is None, key, getattr(self, key), "null without `data.mixture`")
            return
        check(self.shards is None, "shards", self.shards, "null beside `data.mixture`, which names the shards")
        check(self.limit is None, "limit", self.limit, "null beside `data.mixture`")
        for name, source in self.mixture.items():
            is_whole = isinstance(source, Mapping) and set(source) == {"shards", "weight"}
            check(is_whole, f"mixture.{name}", source, "of the form {shards: ..., weight: ...}")
        exact_shares([float(source["weight"]) for source in self.mixture.values()], self.mixture_block or LARGE_BLOCK)


@dataclass(frozen=True, eq=False)
class Split:
    """Samples, and the bucket of each, (N,) uint8 or uint16; None where all are squares."""

    index: ShardIndex
    buckets: np.ndarray | None


@dataclass(frozen=True, eq=False)
class Corpus:
    """The samples that the options ask for.

    Args:
        options: what is asked for.
        cache: where shards behind URLs come from.
    """

    options: CorpusOptions
    cache: ShardCache
    seconds: list[float] = field(default_factory=list)

    @property
    def storage(self) -> Storage:
        """Where the shards lie."""
        return Routed(LOCAL_FILES, self.cache)

    @property
    def training(self) -> Split:
        """The training samples."""
        return self._splits[0]

    @property
    def validation(self) -> Split:
        """The validation samples; none when there are none."""
        return self._splits[1]

    @property
    def damage(self) -> list[Damage]:
        """What was left out of all shards as incomplete or unreadable."""
        return [*self.training.index.damage, *(self.validation.index.damage if self.options.val_shards else ())]

    @cached_property
    def shapes(self) -> list[Shape] | None:
        """The buckets' shapes."""
        buckets = self.options.buckets
        return None if buckets is None else buckets.shapes(self.options.image_size)

    def shape_of(self, split: Split) -> ShapeOfRow | None:
        """The shapes in which the rows of a split are delivered; None: as squares."""
        return None if self.shapes is None or split.buckets is None else ShapeOfRow(self.shapes, split.buckets)

    @cached_property
    def order(self) -> Order:
        """The order of training; says, on the first process, what it never comes to."""
        order = self._whole_order()
        if (starved := self._starved(order)) and distributed.global_rank() == 0:
            images, named = sum(count for _, count in starved), ", ".join(name for name, _ in starved[:8])
            rest = f" and {len(starved) - 8} more" if len(starved) > 8 else ""
            warnings.warn(
                f"{images} images of {len(starved)} shapes are never trained: {named}{rest}. A shape needs "
                f"{self.options.bucket_unit} images of a data set at least: lower `data.bucket_unit`, which the global "
                "batch must divide, or have fewer shapes (`data.buckets`).",
                stacklevel=2,
            )
        return order

    def _whole_order(self) -> Order:
        starts = self.training.index.starts
        if self.options.mixture is None:
            return self._order(0, len(starts) - 1)
        shards = list(self._shards_of.values())
        weights = [float(source["weight"]) for source in self.options.mixture.values()]
        first_rows = [int(starts[first]) for first, _ in shards]
        orders = [self._order(*span) for span in shards]
        options = self.options
        return MixedOrder(
            orders, first_rows, weights, options.seed, options.mixture_length, options.mixture_block or LARGE_BLOCK
        )

    def rows_of(self, name: str) -> tuple[int, int]:
        """The first training row of a data set of the mixture, and the one after its last.

        Raises:
            ValueError: if there is no such data set.
        """
        spans = self._shards_of
        if name not in spans:
            raise ValueError(
                f"there is no data set {name!r}; allowed are {', '.join(spans)}; change `data.mixture`, or what asks "
                "for it (`callbacks.before_after.data_set`, null for all)"
            )
        first, end = (int(self.training.index.starts[shard]) for shard in spans[name])
        return first, end

    def identity(self) -> dict[str, object]:
        """What the meaning of a position in training depends on, as plain values."""
        shapes = {} if self.shapes is None else {"bucket_shapes": [list(shape) for shape in self.shapes]}
        return {
            "fingerprint": self.training.index.fingerprint,
            "seed": self.options.seed,
            **self.order.describe(),
            **shapes,
        }

    def summary(self) -> dict[str, object]:
        """Plain facts for the start-up table."""
        index, order = self.training.index, self.order
        facts: dict[str, object] = {
            "training images": len(index),
            "validation images": len(self.validation.index),
            "shards": len(index.paths),
            "damage found": len(index.damage),
            "refused by filters": index.refused.total(),
        }
        if self.options.mixture is not None:
            facts["data sets"] = ", ".join(f"{name} x {s['weight']:g}" for name, s in self.options.mixture.items())
            facts["images an epoch"] = len(order)
        if self.shapes is not None:
            facts["shapes"] = ", ".join(f"{shape.width}x{shape.height}" for shape in self.shapes)
            facts["images waiting per epoch"] = sum(part.waiting for _, part in self._bucketed_orders(order))
            if starved := self._starved(order):
                few = ", ".join(name for name, _ in starved)
                facts["shapes never trained"] = f"{few}: fewer than data.bucket_unit"
        return facts | {"fingerprint": index.fingerprint[:12], "index opened in": f"{sum(self.seconds):.1f} s"}

    def _bucketed_orders(self, order: Order) -> list[tuple[str, BucketedOrder]]:
        """Those that an order is made of, each with what to call its data set before a shape: nothing if it is one."""
        parts = order.sources if isinstance(order, MixedOrder) else [order]
        names = [f"{name} " for name in self._sources] if isinstance(order, MixedOrder) else [""]
        return [(name, part) for name, part in zip(names, parts, strict=True) if isinstance(part, BucketedOrder)]

    def _starved(self, order: Order) -> list[tuple[str, int]]:
        """The shapes that are never trained, in words, each with its number of images."""
        if self.shapes is None:
            return []
        return [
            (f"{name}{self.shapes[bucket].width}x{self.shapes[bucket].height} ({count})", count)
            for name, part in self._bucketed_orders(order)
            for bucket, count in part.starved.items()
        ]

    def _order(self, first: int, end: int) -> Order:
        """The order of the shards from `first` to `end`, over rows from 0."""
        options, index, buckets = self.options, self.training.index, self.training.buckets
        starts = index.starts[first : end + 1] - index.starts[first]
        shuffle = options.seed, options.shuffle_groups, options.shuffle_window
        if buckets is None:
            return ShuffledOrder(starts, *shuffle)
        own = buckets[int(index.starts[first]) : int(index.starts[end])]
        return BucketedOrder(starts, own, options.bucket_unit, *shuffle)

    @property
    def locations(self) -> tuple[str, ...]:
        """All shards, of training and validation, before any of them is read."""
        return tuple(dict.fromkeys([*(path for paths in self._sources.values() for path in paths), *self._val_paths]))

    @cached_property
    def _val_paths(self) -> tuple[str, ...]:
        shards = self.options.val_shards
        return expand_shards(shards, "data.val_shards", self.cache.glob) if shards else ()

    @property
    def _shards_of(self) -> dict[str, tuple[int, int]]:
        """Name -> the number of the first shard of each data set, and of the one after its last."""
        ends = np.cumsum([len(paths) for paths in self._sources.values()]).tolist()
        return dict(zip(self._sources, zip([0, *ends[:-1]], ends, strict=True), strict=True))

    @cached_property
    def _sources(self) -> dict[str, tuple[str, ...]]:
        """Name -> shards of each data set."""
        if self.options.mixture is None:
            assert self.options.shards is not None
            return {"data": expand_shards(self.options.shards, "data.shards", self.cache.glob)}
        sources = {
            name: expand_shards(source["shards"], f"data.mixture.{name}.shards", self.cache.glob)
            for name, source in self.options.mixture.items()
        }
        expand_shards(
            [path for paths in sources.values() for path in paths], "data.mixture", self.cache.glob
        )  # each once
        return sources

    @cached_property
    def _splits(self) -> tuple[Split, Split]:
        options, began = self.options, time.perf_counter()
        index = self._indexed([path for paths in self._sources.values() for path in paths])
        if options.limit is not None:
            index = index.first(options.limit)
        training, validation = index.split(options.val_fraction)
        if options.val_shards:
            validation = self._indexed(self._val_paths)
        if not len(training):
            raise ValueError(
                f"no training image is left: {len(index.damage)} damaged, refused {dict(index.refused)}. At least one "
                "global batch is needed: see `data.shards`, `data.filters` and `data.val_fraction`."
            )
        if options.val_fraction and not len(validation):
            raise ValueError(
                f"none of {len(index)} images falls into the share {options.val_fraction} for validation. At least one "
                "must: raise `data.val_fraction`, or set it to 0 to go without validation."
            )
        splits = Split(training, self._bucketed(training)), Split(validation, self._bucketed(validation))
        self.seconds.append(time.perf_counter() - began)
        return splits

    def _indexed(self, paths: Sequence[str]) -> ShardIndex:
        options = self.options
        index = build_index(
            paths,
            options.required,
            options.segmentation,
            options.index_dir,
            options.index_workers,
            self.storage,
            dimensions=options.buckets is not None,
        )
        return index.filtered(options.filters, options.index_workers)

    def _bucketed(self, index: ShardIndex) -> np.ndarray | None:
        if self.shapes is None:
            return None
        blocks = [
            assign(index.dimensions(np.arange(begin, min(begin + _BLOCK, len(index)))), self.shapes)
            for begin in range(0, len(index), _BLOCK)
        ]
        return np.concatenate(blocks) if blocks else np.zeros(0, dtype=np.uint8)


def check(is_allowed: bool, key: str, found: object, rule: str) -> None:
    """Refuse, with ValueError, a value of a key of `data`."""
    if not is_allowed:
        raise ValueError(f"`data.{key}` is {shown(repr(found))}; it must be {rule}.")
