"""The order of training: one sequence per epoch, computed and never stored.

An order gives the row at position p of an epoch as a function of (index, seed, epoch, p) alone: no position depends on
the number of processes or workers, on the batch size, or on what was asked before. There are three:

- `ShuffledOrder`: one data set, each sample once an epoch;
- `BucketedOrder` (`data/bucketed_order.py`): the same in runs of images of one shape;
- `MixedOrder` (`data/mixed_order.py`): several data sets with a weight each.

The shuffle of N samples in S shards has three steps:

1. permute the shards and join their samples into one sequence of N;
2. cut it into C equal groups: position p is the sample p // C of group p mod C;
3. within a group, permute the samples inside windows of W.

So a batch mixes C places of the data set while each place is read almost in sequence, any position is reached without
replaying what came before, and no sample comes twice or never.

Permutations sort the raw 64-bit words of PCG64 (O'Neill 2014), a stream that NumPy promises never to change (NEP 19).
"""

from enum import IntEnum
from typing import Protocol

import numpy as np

_FEW = 4  # positions of a window that are found faster than the window is sorted
_NONE = -1


class Order(Protocol):
    """The contract: a sequence of rows for every epoch, of which any part can be asked for at any time.

    Attributes:
        unit: images of one shape that follow one another from every multiple of this position, so that a global batch
            that divides it holds one shape; 0, which every batch divides, if the order knows nothing of shapes.
    """

    unit: int

    def __len__(self) -> int:
        """Positions of an epoch."""
        ...

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows at the given positions (B,) of an epoch: (B,) int64."""
        ...

    def visits(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(B,) int64 numbers that tell the visits of one row within an epoch apart; 0 where no row comes twice."""
        ...

    def describe(self) -> dict[str, object]:
        """What, besides index and seed, the meaning of a position depends on: names, plain integers and lists."""
        ...


class Purpose(IntEnum):
    """What random words are for; those of different purposes are independent. The numbers are part of every order."""

    SHARDS = 1
    WINDOW = 2
    SUBSTITUTE = 3
    UNITS = 4
    SOURCES = 5


def keyed_words(count: int, purpose: Purpose, seed: int, epoch: int, *place: int) -> np.ndarray:
    """`count` random 64-bit words for a purpose at a place: (count,) uint64."""
    # Each number fills a fixed count of 32-bit words, so that no two keys read alike.
    key = [int(purpose), seed & 0xFFFFFFFF, seed >> 32 & 0xFFFFFFFF, epoch]
    key += [word for number in place for word in (number & 0xFFFFFFFF, number >> 32)]
    return np.random.PCG64(np.random.SeedSequence(key)).random_raw(count)


def interleave(counts: np.ndarray, words: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shuffle `counts[k]` labels k, of M in all, for each k.

    Args:
        counts: (K,) how often each label comes.
        words: (M,) random words, by which the labels are sorted.

    Returns:
        The label at each place, (M,) int64, and how often it came before, (M,) int64.
    """
    first = np.cumsum(counts) - counts
    labels = np.repeat(np.arange(len(counts)), counts)[np.argsort(words)]
    before = np.empty_like(labels)
    before[np.argsort(labels, kind="stable")] = np.arange(len(labels)) - np.repeat(first, counts)
    return labels, before


class ShuffledOrder:
    """The rows of one data set, permuted anew each epoch.

    Args:
        starts: (S + 1,) first row of each shard, and N, as in `ShardIndex.starts`.
        seed: the run's seed.
        groups: C, places of the data set that a batch mixes; a small multiple of the usual number of ranks.
        window: W, samples permuted together. Data sets of fewer than C W samples get fewer groups, so that small ones
            are permuted as a whole.
    """

    unit = 0

    def __init__(self, starts: np.ndarray, seed: int, groups: int = 64, window: int = 8192) -> None:
        self.starts, self.seed, self.window = np.asarray(starts, dtype=np.int64), seed, window
        self.length, self._groups_asked = int(self.starts[-1]), groups
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
            for member in np.unique(group[here & (self._loaded[group] != number)]).tolist():
                self._load(member, int(number), slot[here & (group == member)])
            offset[here] += self._shuffled[group[here], slot[here]] - slot[here]
        place = self._group_start(group) + offset
        shard = np.searchsorted(self._ends, place, side="right")
        return self._shift[shard] + place

    def visits(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """(B,) zeros: no row comes twice in an epoch."""
        return np.zeros_like(positions)

    def describe(self) -> dict[str, object]:
        """The groups as asked for, and the window."""
        return {"shuffle_groups": self._groups_asked, "shuffle_window": self.window}

    def _enter(self, epoch: int) -> None:
        self._epoch = epoch
        counts = np.diff(self.starts)
        shards = np.argsort(keyed_words(len(counts), Purpose.SHARDS, self.seed, epoch))
        self._ends = np.cumsum(counts[shards])
        self._shift = self.starts[shards] - (self._ends - counts[shards])
        self._shuffled = np.zeros((self.groups, min(self.window, self.length)), dtype=np.int64)
        self._met, self._loaded = np.full((2, self.groups), _NONE)

    def _load(self, group: int, window: int, slots: np.ndarray) -> None:
        size = int(self._group_start(group + 1) - self._group_start(group))
        count = min(self.window, size - window * self.window)
        words = keyed_words(count, Purpose.WINDOW, self.seed, self._epoch, group, window)
        if self._met[group] != window and len(slots) <= _FEW:
            # All groups enter a window at the same step: to sort each at its second request halves the longest wait.
            self._shuffled[group, slots] = np.argpartition(words, slots)[slots]
            self._loaded[group] = _NONE
        else:
            self._shuffled[group, :count] = np.argsort(words)
            self._loaded[group] = window
        self._met[group] = window

    def _group_start(self, group: np.ndarray | int) -> np.ndarray:
        # The first N mod C groups hold one sample more, so that none is dropped.
        return np.asarray(group) * (self.length // self.groups) + np.minimum(group, self.length % self.groups)
