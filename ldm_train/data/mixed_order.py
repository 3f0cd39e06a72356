"""Several data sets in one sequence, each with its weight: deterministic mixing.

Source k of K has an order of its own and is drawn with weight w_k. The sequence has no end; an epoch is a piece of it
of L positions, so position p of epoch e is g = e L + p. It is made of blocks of M positions, 4,096 unless a smaller
number has exact shares:

1. each block holds exactly n_k positions of source k, the largest remainders of M w_k / (w_1 + ... + w_K);
2. position g is in block q = g // M, whose positions are dealt to the sources in a random permutation; if r positions
   before it in the block belong to its source k, it is draw i = q n_k + r of that source;
3. draw i is position i mod N_k of epoch i // N_k of the source's own order.

So shares are exact in every block, and in every global batch that small blocks divide; each source goes through its
own permutation completely before it begins another, whatever its weight, and a jump costs one block. Weights
proportional to the sizes N_k with L = N_1 + ... + N_K show each sample about once an epoch. A small source of large
weight comes several times within one epoch of the mixture: `visits` gives its own epoch, which tells these visits apart
where draws are keyed by (seed, epoch, sample id).

Sources may be in units of one shape, see `BucketedOrder`, if all have the same unit U; then "position" in the above
reads "unit", and N_k and L count units.
"""

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from ldm_train.data.order import Order, Purpose, interleave, keyed_words

LARGE_BLOCK = 4096
_TOLERANCE = 1e-9  # of a share, which floats state inexactly


def apportion(weights: Sequence[float], places: int) -> np.ndarray:
    """Whole numbers (K,) in proportion to the weights that add up to `places`, by largest remainders."""
    # Fractions are exact: a remainder never depends on how a sum of floats was rounded.
    exact = [Fraction(weight) for weight in weights]
    quotas = [places * weight / sum(exact) for weight in exact]
    counts = [quota.numerator // quota.denominator for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda k: counts[k] - quotas[k])
    for k in by_remainder[: places - sum(counts)]:
        counts[k] += 1
    return np.array(counts, dtype=np.int64)


def exact_shares(weights: Sequence[float], block: int) -> np.ndarray:
    """The places (K,) that data sets of weights (K,) have in each block.

    Raises:
        ValueError: if a weight is no positive number or has no place, or a small block has no exact shares.
    """
    if not all(0 < weight < float("inf") for weight in weights):
        raise ValueError(f"weights are {list(weights)}; each must be above 0 and finite: change `data.mixture`.")
    counts = apportion(weights, block)
    if not counts.all():
        raise ValueError(
            f"weights are {list(weights)}, of which the smallest has no place among {block} images. Each must be about "
            f"1/{block} of their sum at least: change `data.mixture` or `data.mixture_block`."
        )
    shares = np.array(weights) / sum(weights)
    if block < LARGE_BLOCK and np.abs(counts / block - shares).max() > _TOLERANCE:
        raise ValueError(
            f"weights are {list(weights)}, of which {block} images would have {counts.tolist()}. In small blocks "
            "shares must be exact, as 2 to 1 are in 3 images or 6: change `data.mixture_block`, to null for blocks of "
            f"{LARGE_BLOCK}, or the weights in `data.mixture`."
        )
    return counts


class MixedOrder:
    """The rows of several data sets in one sequence with exact shares.

    Args:
        sources: K orders, each over rows from 0.
        first_rows: (K,) the row of the joint index that is row 0 of each source.
        weights: (K,) shares, of any sum.
        seed: the run's seed.
        length: L, positions of an epoch; None is the sum of the sources' lengths.
        block: M; below 4,096 the weights must have exact places in it.

    Raises:
        ValueError: if the arguments contradict each other, or a weight is too small to have a place in a block.
    """

    def __init__(
        self,
        sources: Sequence[Order],
        first_rows: Sequence[int],
        weights: Sequence[float],
        seed: int,
        length: int | None = None,
        block: int = LARGE_BLOCK,
    ) -> None:
        units = sorted({source.unit for source in sources})
        if not len(sources) == len(first_rows) == len(weights) > 0 or len(units) > 1:
            raise ValueError(
                f"{len(sources)} data sets, {len(first_rows)} first rows and {len(weights)} weights, in units of "
                f"{units}. There must be as many of each, at least one, of one unit: change `data.mixture`."
            )
        self.sources, self.seed, self.unit = list(sources), seed, units[0]
        self._size = self.unit or 1
        self._block, self._counts = block, exact_shares(weights, block)
        self._first_rows = [int(row) for row in first_rows]
        total = sum(map(len, sources)) if length is None else length
        self._length = total // self._size  # in units
        if self._length <= 0 or not all(map(len, sources)):
            raise ValueError(
                f"an epoch of {total} images of data sets of {[len(source) for source in sources]}. Neither may be "
                "empty: change `data.mixture_length` or `data.mixture`."
            )
        self._source_lengths = np.array([len(source) for source in sources])
        self._entered = -1

    def __len__(self) -> int:
        return self._length * self._size

    def rows(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The rows at the given positions (B,) of an epoch: (B,) int64."""
        source, own_epoch, place = self._draws(epoch, positions)
        rows = np.empty(len(positions), dtype=np.int64)
        for k in np.unique(source).tolist():
            of_source = source == k
            for number in np.unique(own_epoch[of_source]).tolist():
                here = of_source & (own_epoch == number)
                rows[here] = self._first_rows[k] + self.sources[k].rows(number, place[here])
        return rows

    def visits(self, epoch: int, positions: np.ndarray) -> np.ndarray:
        """The sources' own epochs at the given positions (B,): (B,) int64."""
        return self._draws(epoch, positions)[1]

    def describe(self) -> dict[str, object]:
        """Each source's places in a block, first row, length and own description; and the length of an epoch."""
        return {
            "mixture": self._counts.tolist(),
            "mixture_length": len(self),
            "mixture_rows": self._first_rows,
            "mixture_sources": [{"length": len(source), **source.describe()} for source in self.sources],
        }

    def _draws(self, epoch: int, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of positions (B,) the source, its own epoch, and the position in that."""
        unit, place = np.divmod(positions, self._size)
        block, slot = np.divmod(epoch * self._length + unit, self._block)
        source, draw = np.empty_like(slot), np.empty_like(slot)
        for number in np.unique(block).tolist():
            here = block == number
            self._enter(number)
            source[here], draw[here] = self._source[slot[here]], self._draw[slot[here]]
        own_epoch, position = np.divmod(draw * self._size + place, self._source_lengths[source])
        return source, own_epoch, position

    def _enter(self, block: int) -> None:
        if self._entered != block:
            words = keyed_words(self._block, Purpose.SOURCES, self.seed, 0, block)
            self._source, before = interleave(self._counts, words)
            self._draw = block * self._counts[self._source] + before
            self._entered = block
