"""The order of training: one sequence per epoch, computed and never stored.

The row at position p of an epoch is a function of (index, seed, epoch, p) alone:

1. permute the shards and join their samples into one sequence of N;
2. cut it into C equal groups: position p is the sample p // C of group p mod C;
3. within a group, permute the samples inside windows of W.

So a batch mixes C places of the data set while each place is read almost in sequence, any position is reached without
replaying what came before, and no sample comes twice or never. With R processes of B samples a step takes the next
R B positions, and rank r the positions r, r + R, r + 2 R, ... among them: what is consumed up to a position does not
depend on R, B or the number of workers, so a run may be resumed with others. The position is all the state there is.

Permutations sort the raw 64-bit words of PCG64 (O'Neill 2014), a stream that NumPy promises never to change (NEP 19).
"""

from collections.abc import Iterator
from math import inf
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

_SHARDS, _WINDOW, _SUBSTITUTE = 1, 2, 3


class Position(NamedTuple):
    """A place in training: `samples` of epoch `epoch` are behind us, over all ranks."""

    epoch: int = 0
    samples: int = 0


class BatchRequest(NamedTuple):
    """What the sampler asks of a worker.

    Attributes:
        epoch: the epoch.
        rows: (B,) rows of the index.
        positions: (B,) int64, where they stand in the order of the epoch, over all ranks.
    """

    epoch: int
    rows: np.ndarray
    positions: np.ndarray


def _words(count: int, purpose: int, seed: int, epoch: int, *place: int) -> np.ndarray:
    """`count` random 64-bit words for a purpose at a place."""
    # Each number fills a fixed count of 32-bit words, so that no two keys read alike.
    key = [purpose, seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch]
    key += [word for number in place for word in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def substitute_rows(count: int, rows: int, seed: int, epoch: int, sample_id: int) -> list[int]:
    """`count` rows among `rows` to try, one after the other, in the place of a sample that cannot be decoded."""
    return (_words(count, _SUBSTITUTE, seed, epoch, sample_id) % np.uint64(rows)).tolist()


class ShuffledOrder:
    """The rows of an index in the order of an epoch.

    Args:
        starts: (S + 1,) first row of each shard, and N, as in `ShardIndex.starts`.
        seed: the run's seed.
        groups: C, places of the data set that a batch mixes; a small multiple of the usual number of ranks.
        window: W, samples permuted together. Data sets of fewer than C W samples get fewer groups, so that small ones
            are permuted as a whole.
    """

    def __init__(self, starts: np.ndarray, seed: int, groups: int = 64, window: int = 8192) -> None:
        self.starts, self.seed, self.window = np.asarray(starts, dtype=np.int64), seed, window
        self.length = int(self.starts[-1])
        self.groups = max(1, min(groups, self.length // window))
        self._epoch = -1

    def __len__(self) -> int:
        return self.length

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows at the given positions (B,) of an epoch: (B,) int64."""
        if epoch != self._epoch:
            self._enter(epoch)
        group, offset = positions % self.groups, positions // self.groups
        window, slot = offset // self.window, offset % self.window
        for number in np.unique(window):
            here = window == number
            for member in np.unique(group[here]):
                self._load(int(member), int(number))
            offset[here] += self._shuffled[group[here], slot[here]] - slot[here]
        place = self._group_start(group) + offset
        shard = np.searchsorted(self._ends, place, side="right")
        return self._shift[shard] + place

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        counts = np.diff(self.starts)
        shards = np.argsort(_words(len(counts), _SHARDS, self.seed, epoch))
        self._ends = np.cumsum(counts[shards])
        self._shift = self.starts[shards] - (self._ends - counts[shards])
        self._shuffled = np.zeros((self.groups, min(self.window, self.length)), dtype=np.int64)
        self._loaded = np.full(self.groups, -1)

    def _load(self, group: int, window: int) -> None:
        if self._loaded[group] != window:
            size = int(self._group_start(group + 1) - self._group_start(group))
            count = min(self.window, size - window * self.window)
            self._shuffled[group, :count] = np.argsort(_words(count, _WINDOW, self.seed, self._epoch, group, window))
            self._loaded[group] = window

    def _group_start(self, group: np.ndarray | int) -> np.ndarray:
        # The first N mod C groups hold one sample more, so that none is dropped.
        return np.asarray(group) * (self.length // self.groups) + np.minimum(group, self.length % self.groups)


class TrainingSampler(DistributedSampler[BatchRequest]):
    """Yields this rank's batches of an epoch, beginning at `position`, the start of training unless it is set.

    `len` is always that of the full epoch, floor(N / (R B)), because Lightning counts the batches before a resume too.
    A DistributedSampler by type, because Lightning replaces every other sampler when there are several ranks; of that
    class only the meaning is used: this rank's share, the same number of batches on every rank.

    Args:
        order: the order of the samples.
        batch_size: B, samples per rank and step.
        rank: r.
        world_size: R.
    """

    def __init__(self, order: ShuffledOrder, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.order, self.rank, self.num_replicas = order, rank, world_size
        self.global_batch_size = batch_size * world_size
        self.position = Position()
        if len(order) < self.global_batch_size:
            raise ValueError(
                f"{len(order)} training images are fewer than one global batch of {self.global_batch_size} "
                f"({batch_size} per device on {world_size}). A batch may hold at most all images: lower "
                "`data.batch_size`, or add shards to `data.shards`."
            )

    def __len__(self) -> int:
        return len(self.order) // self.global_batch_size

    def __iter__(self) -> Iterator[BatchRequest]:
        epoch, begin = self.position
        for _ in range(self.remaining):
            end = begin + self.global_batch_size
            positions = np.arange(begin + self.rank, end, self.num_replicas)
            yield BatchRequest(epoch, self.order.rows(epoch, positions), positions)
            begin = end

    @property
    def remaining(self) -> int:
        """Whole global batches from `position` to the end of its epoch."""
        return (len(self.order) - self.position.samples) // self.global_batch_size

    def advance(self, batches_per_epoch: float = inf) -> None:
        """Move `position` past one global batch, and into the next epoch where this one, or its limit, is reached."""
        epoch, samples = self.position
        self.position = Position(epoch, samples + self.global_batch_size)
        if not self.remaining or self.position.samples >= batches_per_epoch * self.global_batch_size:
            self.position = Position(epoch + 1)


class ValidationSampler(DistributedSampler[BatchRequest]):
    """Yields this rank's batches of all N rows in their own order, each row once, with equal steps on every rank.

    A step covers R B rows, of which rank r takes every R-th. What is left at the end is a smaller step, or, if it holds
    fewer rows than there are ranks, joins the step before it. Only when N < R are rows repeated, to give each rank one.

    Args:
        rows: N.
        batch_size: B.
        rank: r.
        world_size: R.
    """

    def __init__(self, rows: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.rows = np.resize(np.arange(rows), max(rows, world_size))
        self.rank, self.num_replicas = rank, world_size
        self.global_batch_size = batch_size * world_size

    def __len__(self) -> int:
        full, rest = divmod(len(self.rows), self.global_batch_size)
        return max(1, full + (rest >= self.num_replicas))

    def __iter__(self) -> Iterator[BatchRequest]:
        for step in range(len(self)):
            begin = step * self.global_batch_size
            end = begin + self.global_batch_size if step + 1 < len(self) else len(self.rows)
            positions = np.arange(begin + self.rank, end, self.num_replicas)
            yield BatchRequest(0, self.rows[positions], positions)
