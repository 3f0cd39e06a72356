"""Who takes what of the order of training, and where training stands in it.

With R processes of B samples a step takes the next R B positions of an order (`data/order.py`), and rank r the
positions r, r + R, r + 2 R, ... among them: what is consumed up to a position does not depend on R, B or the number of
workers, so a run may be resumed with others. The position is all the state there is.
"""

from collections.abc import Iterator
from itertools import pairwise
from math import inf
from typing import NamedTuple

import numpy as np
from torch.utils.data import DistributedSampler

from ldm_train.data.order import Order, Purpose, keyed_words


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
        visits: (B,) int64, what tells the visits of one row within the epoch apart, see `Order.visits`.
    """

    epoch: int
    rows: np.ndarray
    positions: np.ndarray
    visits: np.ndarray | int = 0


def substitute_rows(count: int, rows: int, seed: int, epoch: int, sample_id: int) -> list[int]:
    """`count` rows among `rows` to try, one after the other, in the place of a sample that cannot be decoded."""
    return (keyed_words(count, Purpose.SUBSTITUTE, seed, epoch, sample_id) % np.uint64(rows)).tolist()


class TrainingSampler(DistributedSampler[BatchRequest]):
    """Yields this rank's batches of an epoch, beginning at `position`, the start of training unless it is set.

    `len` is always that of the full epoch, floor(N / (R B)), because Lightning counts the batches before a resume too.
    A DistributedSampler by type, because Lightning replaces every other sampler when there are several ranks; of that
    class only the meaning is used: this rank's share, the same number of batches on every rank.

    In an order of shapes, batches begin at multiples of R B, so that none holds two shapes. A run that is resumed with
    another batch size between two of these takes one smaller batch first.

    Args:
        order: the order of the samples.
        batch_size: B, samples per rank and step.
        rank: r.
        world_size: R.

    Raises:
        ValueError: if a global batch is larger than the epoch, or holds more than one shape.
    """

    def __init__(self, order: Order, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.order, self.rank, self.num_replicas = order, rank, world_size
        self.global_batch_size = batch_size * world_size
        self.position = Position()
        if order.unit % self.global_batch_size:
            raise ValueError(
                f"a global batch of {self.global_batch_size} images ({batch_size} per device on {world_size}) would "
                f"hold more than one shape, because {order.unit} images of one shape follow one another. Allowed are "
                "batches that divide this number: change `data.batch_size` or `data.bucket_unit`."
            )
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
            end = self._end(begin)
            if (end - begin) % self.num_replicas:
                raise ValueError(
                    f"training stands at image {begin} of an epoch, and {end - begin} of one shape are left before the "
                    f"next global batch of {self.global_batch_size}: {self.num_replicas} processes cannot share them "
                    f"equally. Allowed is every global batch that divides {begin}: change `data.batch_size` or "
                    "`trainer.devices`."
                )
            positions = np.arange(begin + self.rank, end, self.num_replicas)
            rows, visits = self.order.rows(epoch, positions), self.order.visits(epoch, positions)
            yield BatchRequest(epoch, rows, positions, visits)
            begin = end

    @property
    def remaining(self) -> int:
        """Global batches from `position` to the end of its epoch: whole ones, and in an order of shapes all."""
        samples = self.position.samples
        return (len(self.order) - samples + self._late(samples)) // self.global_batch_size

    def advance(self, batches_per_epoch: float = inf) -> None:
        """Move `position` past one global batch, and into the next epoch where this one, or its limit, is reached."""
        epoch, samples = self.position
        self.position = Position(epoch, self._end(samples))
        if not self.remaining or self.position.samples >= batches_per_epoch * self.global_batch_size:
            self.position = Position(epoch + 1)

    def _end(self, begin: int) -> int:
        """Where the global batch ends that begins at a position."""
        return begin - self._late(begin) + self.global_batch_size

    def _late(self, samples: int) -> int:
        """How far a position lies behind the last one where a batch may begin."""
        return samples % self.global_batch_size if self.order.unit else 0


class ValidationSampler(DistributedSampler[BatchRequest]):
    """Yields this rank's batches of all N rows in their own order, each row once, with equal steps on every rank.

    A step covers R B rows, of which rank r takes every R-th. What is left at the end is a smaller step, or, if it holds
    fewer rows than there are ranks, joins the step before it. Only when N < R are rows repeated, to give each rank one.
    With buckets all this holds for the rows of each bucket, one bucket after the other, so that no step mixes two.

    Args:
        rows: N.
        batch_size: B.
        rank: r.
        world_size: R.
        buckets: (N,) the number of each row's bucket; None: all rows are of one shape.
    """

    def __init__(
        self, rows: int, batch_size: int, rank: int = 0, world_size: int = 1, buckets: np.ndarray | None = None
    ) -> None:
        everything = np.arange(rows)
        parts = [everything] if buckets is None else [everything[buckets == number] for number in np.unique(buckets)]
        parts = [np.resize(part, max(len(part), world_size)) for part in parts]
        self.rows = np.concatenate(parts)
        self.rank, self.num_replicas = rank, world_size
        self.global_batch_size = batch_size * world_size
        self._edges = [0]  # positions at which steps begin, and the end
        for part in parts:
            full, rest = divmod(len(part), self.global_batch_size)
            steps = max(1, full + (rest >= world_size))
            first = self._edges[-1]
            self._edges += [first + step * self.global_batch_size for step in range(1, steps)] + [first + len(part)]

    def __len__(self) -> int:
        return len(self._edges) - 1

    def __iter__(self) -> Iterator[BatchRequest]:
        for begin, end in pairwise(self._edges):
            positions = np.arange(begin + self.rank, end, self.num_replicas)
            yield BatchRequest(0, self.rows[positions], positions)
