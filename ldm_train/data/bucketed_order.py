"""Runs of images of one shape: the order of aspect-ratio buckets.

Images of one shape make a bucket. Bucket b has N_b rows; a *unit* is U images of one bucket that follow one another:

1. each bucket's rows are shuffled as a data set of their own, see `ShuffledOrder`, and cut into u_b = N_b // U units;
2. block t of T takes the units round(u_b t / T) to round(u_b (t + 1) / T) of each bucket b and permutes them;
3. position p is place p mod U of unit p // U in the sequence of the blocks.

So a global batch that divides U has one shape on all processes, while which shape comes next is random. All buckets
advance together and permute the shards alike, so each place of the data set is still read almost in sequence: that is
why units are permuted in blocks, of about 4,096, and not over the whole epoch. T is 1 for data sets of fewer.

The N_b mod U images that fill no unit wait for another epoch; the shuffle chooses others each time. A bucket of fewer
than U images never has a unit: see `BucketedOrder.starved`.

Where the j-th image of a bucket lies is found by rank and select (Jacobson, "Space-efficient static trees and graphs",
FOCS 1989): counts up to every 4,096th row are kept, and the rest is counted. That is 8 K bytes for 4,096 rows and K
buckets, beside one byte a row for the buckets themselves.
"""

import numpy as np

from ldm_train.data.order import Purpose, ShuffledOrder, interleave, keyed_words

_ROWS_PER_BLOCK = 4096
_UNITS_PER_BLOCK = 4096
_BLOCKS_AT_ONCE = 256


class BucketRows:
    """Which rows are in which bucket.

    Args:
        buckets: (N,) the number of each row's bucket, from 0; of a small integer type, it is kept as it is and may be
            memory-mapped.

    Attributes:
        sizes: (K,) int64, N_b.
    """

    def __init__(self, buckets: np.ndarray) -> None:
        self.buckets = buckets
        count = int(buckets.max()) + 1 if len(buckets) else 0
        counts = [np.zeros((1, count), dtype=np.int64)]
        for begin in range(0, len(buckets), _ROWS_PER_BLOCK * _BLOCKS_AT_ONCE):
            some = buckets[begin : begin + _ROWS_PER_BLOCK * _BLOCKS_AT_ONCE]
            block = np.arange(len(some)) // _ROWS_PER_BLOCK
            blocks = -(-len(some) // _ROWS_PER_BLOCK)
            counts.append(np.bincount(block * count + some, minlength=blocks * count).reshape(blocks, count))
        # (K, blocks + 1) rows of a bucket before a block
        self._before = np.ascontiguousarray(np.concatenate(counts).T).cumsum(axis=1)
        self.sizes = self._before[:, -1]

    def rank(self, row: int) -> np.ndarray:
        """How many rows of each bucket lie before a row: (K,) int64."""
        block = row // _ROWS_PER_BLOCK
        rest = self.buckets[block * _ROWS_PER_BLOCK : row]
        return self._before[:, block] + np.bincount(rest, minlength=len(self.sizes))

    def select(self, bucket: int, ordinals: np.ndarray) -> np.ndarray:
        """The rows that are the given ordinals (B,) of a bucket, counted from 0: (B,) int64."""
        before = self._before[bucket]
        block = np.searchsorted(before, ordinals, side="right") - 1
        rows = block * _ROWS_PER_BLOCK
        rest = ordinals - before[block]
        for number in np.unique(block):
            here, begin = block == number, number * _ROWS_PER_BLOCK
            inside = np.flatnonzero(self.buckets[begin : begin + _ROWS_PER_BLOCK] == bucket)
            rows[here] += inside[rest[here]]
        return rows


class BucketedOrder:
    """The rows of one data set in units of one bucket, permuted anew each epoch.

    Args:
        starts: (S + 1,) first row of each shard, and N, as in `ShardIndex.starts`.
        buckets: (N,) the number of each row's bucket, see `BucketRows`.
        unit: U, which the global batch must divide.
        seed: the run's seed.
        groups: C, see `ShuffledOrder`.
        window: W, see `ShuffledOrder`. A bucket permutes its share of W, so that the windows of all buckets span the
            same rows.

    Attributes:
        waiting: images of an epoch that fill no unit.
        starved: bucket -> its images, of the buckets with fewer than U, which are never trained.

    Raises:
        ValueError: if there are other than N numbers of buckets, a row is in none, or no bucket fills a unit.
    """

    def __init__(
        self, starts: np.ndarray, buckets: np.ndarray, unit: int, seed: int, groups: int = 64, window: int = 8192
    ) -> None:
        starts = np.asarray(starts, dtype=np.int64)
        length = int(starts[-1])
        if len(buckets) != length or (length and int(buckets.min()) < 0):
            raise ValueError(
                f"{len(buckets)} rows have a bucket, the lowest being {buckets.min(initial=0)}, where there are "
                f"{length} rows. Each must be in one bucket, numbered from 0: change the buckets or `data.shards`."
            )
        self.unit, self.seed, self.groups, self.window = unit, seed, groups, window
        self._rows = BucketRows(buckets)
        sizes = self._rows.sizes
        units = sizes // unit
        if not units.sum():
            raise ValueError(
                f"the largest of {len(sizes)} buckets holds {sizes.max(initial=0)} images. A unit of {unit} of one "
                "shape is needed at least: lower `data.bucket_unit`, have fewer buckets, or add to `data.shards`."
            )
        self.waiting = int((sizes % unit).sum())
        self.starved = {int(bucket): int(sizes[bucket]) for bucket in np.flatnonzero((sizes > 0) & (units == 0))}
        ranks = np.stack([self._rows.rank(int(start)) for start in starts], axis=1)
        # The share is rounded up, so that a bucket's whole is one window where the data set's is.
        windows = -(-sizes * window // length)
        self._orders = [
            ShuffledOrder(rank, seed, groups, max(1, int(own))) for rank, own in zip(ranks, windows, strict=True)
        ]
        blocks = -(-int(units.sum()) // _UNITS_PER_BLOCK)
        # (K, T + 1) units of a bucket before a block: u_b t / T, rounded in whole numbers
        self._units_before = (2 * units[:, None] * np.arange(blocks + 1) + blocks) // (2 * blocks)
        self._block_starts = self._units_before.sum(axis=0)
        self._entered = (-1, -1)

    def __len__(self) -> int:
        return int(self._block_starts[-1]) * self.unit

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows at the given positions (B,) of an epoch: (B,) int64."""
        unit, place = np.divmod(positions, self.unit)
        bucket, ordinal = self._units(epoch, unit)
        place = ordinal * self.unit + place
        rows = np.empty(len(positions), dtype=np.int64)
        for number in np.unique(bucket).tolist():
            here = bucket == number
            rows[here] = self._rows.select(number, self._orders[number].rows(epoch, place[here]))
        return rows

    def visits(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(B,) zeros: no row comes twice in an epoch."""
        return np.zeros_like(positions)

    def describe(self) -> dict[str, object]:
        """The arguments of the shuffle, the unit, and how many rows each bucket has."""
        sizes = self._rows.sizes.tolist()
        shuffle = {"shuffle_groups": self.groups, "shuffle_window": self.window}
        return {**shuffle, "bucket_unit": self.unit, "bucket_sizes": sizes}

    def _units(self, epoch: int, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of units (B,) of an epoch the bucket, and which of its bucket's they are."""
        block = np.searchsorted(self._block_starts, units, side="right") - 1
        bucket, ordinal = np.empty_like(units), np.empty_like(units)
        for number in np.unique(block).tolist():
            here = block == number
            self._enter(epoch, number)
            slot = units[here] - self._block_starts[number]
            bucket[here], ordinal[here] = self._bucket[slot], self._ordinal[slot]
        return bucket, ordinal

    def _enter(self, epoch: int, block: int) -> None:
        if self._entered != (epoch, block):
            first, end = self._units_before[:, block], self._units_before[:, block + 1]
            words = keyed_words(int((end - first).sum()), Purpose.UNITS, self.seed, epoch, block)
            self._bucket, before = interleave(end - first, words)
            self._ordinal = first[self._bucket] + before
            self._entered = (epoch, block)
