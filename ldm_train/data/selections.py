"""Selections that are computed once: the rows that filters, a split or a ranking by hash chose, kept by the columns.

A selection is named by a hash of all that it follows from: the steps before it and its own description. The rows of
10^8 samples take minutes to choose and a moment to map, and mapped they cost no memory. Beside columns that this user
may only read, selections that others kept are opened, and all else is chosen in memory.
"""

import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_train.data.columns import ArrayWriter, open_array
from ldm_train.data.index_store import UnwritableError, locked


class Rows(NamedTuple):
    """Chosen rows of the columns, gathered block by block.

    Attributes:
        rows: (n,) int64.
        starts: (blocks + 1,) int64 where the rows of each block begin, and n.
        refused: how many were not chosen, by reason.
        file: the file they are mapped from; None in memory.
    """

    rows: np.ndarray
    starts: np.ndarray
    refused: dict[str, int]
    file: Path | None = None


class RowNumbers:
    """The numbers 0 to `count` - 1 as an array that takes no memory: what it is asked for is computed."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, rows: Any) -> Any:  # noqa: ANN401 (what an array takes and gives)
        if isinstance(rows, slice):
            return np.arange(*rows.indices(self._count), dtype=np.int64)
        if isinstance(rows, int) and 0 <= rows < self._count:  # as each member of each sample is asked for
            return rows
        wanted = np.asarray(rows)
        if wanted.dtype == bool:
            wanted = np.flatnonzero(wanted)
        wanted = wanted.astype(np.int64)
        if ((wanted < -self._count) | (wanted >= self._count)).any():
            raise IndexError(f"{rows} is not among {self._count} rows")
        return np.where(wanted < 0, wanted + self._count, wanted)[()]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:  # noqa: ANN401
        return np.arange(self._count, dtype=np.int64 if dtype is None else dtype)

    def tolist(self) -> list[int]:
        """All of them."""
        return list(range(self._count))


def selection_key(*steps: object) -> str:
    """The name of a selection, by all that it follows from."""
    return hashlib.sha256(json.dumps(steps).encode()).hexdigest()[:24]


def kept_rows(folder: Path | None, key: str | None, blocks: Iterable[np.ndarray], refused: dict[str, int]) -> Rows:
    """The rows of the blocks, taken from an earlier run if it left them.

    Args:
        folder: the columns' folder; None keeps nothing.
        key: what the rows follow from, see `selection_key`; None if that is not known.
        blocks: (n,) int64 rows each; read only where they are not known.
        refused: filled by reading the blocks.

    Raises:
        UnwritableError: if the disk filled while the rows were written.
    """
    if folder is None or key is None:
        return _in_memory(blocks, refused)
    place = folder / f"selection-{key}"
    if (found := _opened(place)) is not None:
        return found
    if not os.access(folder, os.W_OK):
        return _in_memory(blocks, refused)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "selections.lock"))
            if (found := _opened(place)) is not None:
                return found
            staging = _staged(place)
        except OSError as error:
            warnings.warn(
                f"selections cannot be kept in {folder} ({error}) and are made in memory. Allowed are folders that can "
                "be written: change `data.index_dir`.",
                stacklevel=2,
            )
            return _in_memory(blocks, refused)
        try:
            return _written(place, staging, blocks, refused)
        except OSError as error:
            shutil.rmtree(staging, ignore_errors=True)
            raise UnwritableError(
                f"the disk of {folder} took no selection: {error.strerror or error}. Allowed are folders with room for "
                "8 bytes a sample: make room, or change `data.index_dir`."
            ) from error


def smallest(blocks: Iterable[np.ndarray], count: int) -> Iterator[np.ndarray]:
    """The places of the `count` smallest numbers of the blocks, smallest first, equal ones in order; one array.

    Args:
        blocks: (n,) uint64 each; few are in memory at a time.
        count: how many.
    """
    places, numbers, begin = np.zeros(0, np.int64), np.zeros(0, np.uint64), 0
    for block in blocks:
        # What is larger than all the chosen ones cannot be among the smallest.
        here = np.flatnonzero(block < numbers[-1]) if len(numbers) == count > 0 else np.arange(len(block))
        places, numbers = np.concatenate((places, begin + here)), np.concatenate((numbers, block[here]))
        order = np.argsort(numbers, kind="stable")[:count]
        places, numbers, begin = places[order], numbers[order], begin + len(block)
    yield places


def _in_memory(blocks: Iterable[np.ndarray], refused: dict[str, int]) -> Rows:
    blocks = [np.zeros(0, np.int64), *blocks]
    return Rows(np.concatenate(blocks), np.cumsum([len(block) for block in blocks], dtype=np.int64), refused)


def _opened(place: Path) -> Rows | None:
    """The rows that were kept at a place; None if they are not there as a whole."""
    try:
        facts = json.loads((place / "selection.json").read_bytes())
        starts, rows = open_array(place / "starts.npy"), open_array(place / "rows.npy")
    except (OSError, ValueError, EOFError):
        return None
    return Rows(rows, starts, facts["refused"], place / "rows.npy") if len(rows) == facts["rows"] else None


def _staged(place: Path) -> Path:
    """A new folder beside a place, which is free then."""
    staging = place.with_name(f"building-{place.name}")
    for left in (staging, place):  # by a process that was killed, or damaged
        shutil.rmtree(left, ignore_errors=True)
    staging.mkdir()
    return staging


def _written(place: Path, staging: Path, blocks: Iterable[np.ndarray], refused: dict[str, int]) -> Rows:
    array, starts = ArrayWriter(staging / "rows.npy", np.int64), [0]
    for block in blocks:
        array.append(block)
        starts.append(starts[-1] + len(block))
    array.close()
    np.save(staging / "starts.npy", np.array(starts, dtype=np.int64))
    facts = {"rows": starts[-1], "refused": refused}
    (staging / "selection.json").write_text(json.dumps(facts), encoding="utf-8")
    staging.rename(place)
    return Rows(open_array(place / "rows.npy"), np.array(starts, dtype=np.int64), refused, place / "rows.npy")
