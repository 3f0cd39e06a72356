"""The samples' columns: flat arrays, a row for each sample of all shards, in memory or mapped from files.

Mapped columns cost no memory of their own: the pages that are read are the system's cache, shared by all processes of a
machine. They are never copied into another process either: a copy opens the same files.

Letters: N samples in S shards, K kinds of members, B bytes of keys.
"""

import mmap
import os
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ldm_train.data.scanning import ShardScan

_HEADER = 128  # bytes of a .npy file before its data; a file of no rows cannot be mapped


@dataclass(frozen=True, eq=False)
class Columns:
    """The columns of an index.

    Attributes:
        offsets: (N, K) int64 byte offset of each member in its shard.
        sizes: (N, K) int32 bytes of each member, -1 where there is none.
        key_ends: (N,) int64; key n ends at byte `key_ends[n]` of `key_bytes` and begins where the one before ends.
        key_bytes: (B,) uint8, all keys joined.
        dimensions: (N, 2) int32 width and height in pixels, -1 where unknown; None if they are not indexed.
        folder: the files that are mapped; None in memory.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    key_ends: np.ndarray
    key_bytes: np.ndarray
    dimensions: np.ndarray | None = None
    folder: Path | None = None

    def __len__(self) -> int:
        return len(self.key_ends)

    def keys(self, rows: np.ndarray) -> list[bytes]:
        """The keys of rows (n,) in ascending order, best of one shard: all bytes between them are read."""
        if not len(rows):
            return []
        ends = self.key_ends[rows]
        begins = np.where(rows > 0, self.key_ends[rows - 1], 0)
        first = int(begins[0])
        data = self.key_bytes[first : int(ends[-1])].tobytes()
        spans = zip((begins - first).tolist(), (ends - first).tolist(), strict=True)
        return [data[begin:end] for begin, end in spans]

    def part(self, begin: int, end: int) -> "Columns":
        """The rows from `begin` to `end`, as columns of their own."""
        first = int(self.key_ends[begin - 1]) if begin else 0
        ends = self.key_ends[begin:end]
        last = int(ends[-1]) if len(ends) else first
        dimensions = None if self.dimensions is None else self.dimensions[begin:end]
        return Columns(
            self.offsets[begin:end], self.sizes[begin:end], ends - first, self.key_bytes[first:last], dimensions
        )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.folder is None else {"folder": self.folder}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state if state["folder"] is None else open_columns(state["folder"]).__dict__)


def of_scan(scanned: ShardScan) -> Columns:
    """The columns of one shard."""
    ends = np.cumsum([len(key) for key in scanned.keys], dtype=np.int64)
    key_bytes = np.frombuffer(b"".join(scanned.keys), dtype=np.uint8)
    offsets, sizes = scanned.places[..., 0], scanned.places[..., 1].astype(np.int32)
    return Columns(offsets, sizes, ends, key_bytes, scanned.dimensions)


def joined(parts: Iterable[Columns]) -> Columns:
    """The columns of several shards, at least one, in memory."""
    parts = list(parts)
    bytes_before = np.cumsum([0, *(len(part.key_bytes) for part in parts)])
    measured = [part.dimensions for part in parts if part.dimensions is not None]
    return Columns(
        np.concatenate([part.offsets for part in parts]),
        np.concatenate([part.sizes for part in parts]),
        np.concatenate([part.key_ends + before for part, before in zip(parts, bytes_before[:-1], strict=True)]),
        np.concatenate([part.key_bytes for part in parts]),
        np.concatenate(measured) if measured else None,
    )


def open_array(path: Path) -> np.ndarray:
    """Map a `.npy` file.

    Raises:
        OSError: if there is none.
        ValueError: if it is damaged.
    """
    if os.path.getsize(path) <= _HEADER:
        return np.load(path)
    array = np.load(path, mmap_mode="r")
    # A batch reads rows far apart; that the system reads on after each costs a hundred times as much as the row.
    array._mmap.madvise(mmap.MADV_RANDOM)
    return array.view(np.ndarray)


def gathered(array: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """The rows (n,) of an array; of a mapped one all pages are asked for before the first is waited for.

    A disk or file server answers a hundred requests in little more than the time of one.
    """
    mapped = array.base
    if isinstance(mapped, np.memmap):
        begins = mapped.offset + np.asarray(rows, np.int64) * array.strides[0]
        pages = np.unique(np.stack((begins, begins + array.strides[0] - 1)) // mmap.PAGESIZE)
        for page in pages.tolist():
            mapped._mmap.madvise(mmap.MADV_WILLNEED, page * mmap.PAGESIZE, mmap.PAGESIZE)  # type: ignore[attr-defined]
    return array[rows]


def open_columns(folder: Path) -> Columns:
    """Map the columns that a `ColumnsWriter` wrote.

    Raises:
        FileNotFoundError: if they are gone.
        ValueError: if a file is damaged.
    """
    try:
        arrays = {
            column.name: open_array(folder / f"{column.name}.npy")
            for column in fields(Columns)
            if column.name not in ("folder", "dimensions")
        }
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"the index {folder} is gone: another process has put a newer one in its place. An index must stay while a "
            "run starts its workers: do not change the shards under a run, or give each run its own `data.index_dir`."
        ) from error
    measured = folder / "dimensions.npy"
    return Columns(**arrays, dimensions=open_array(measured) if measured.exists() else None, folder=folder)


class ArrayWriter:
    """Writes a `.npy` file of any number of rows, block by block.

    Args:
        path: the file.
        kind: its numbers.
        width: numbers in a row; none makes an array of one axis.
    """

    def __init__(self, path: Path, kind: type[np.generic], *width: int) -> None:
        self._kind, self._width, self._rows = np.dtype(kind), width, 0
        self._file = path.open("wb")
        self._write_header()

    def append(self, block: np.ndarray) -> None:
        """Add rows."""
        self._file.write(np.ascontiguousarray(block, self._kind).tobytes())
        self._rows += len(block)

    def close(self) -> None:
        """Say in the header how many rows there are, and make sure they are on the disk."""
        self._file.seek(0)
        self._write_header()
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def _write_header(self) -> None:
        # NumPy leaves room for the first axis to grow, so that the header keeps its length.
        shape = (self._rows, *self._width)
        header = {"descr": np.lib.format.dtype_to_descr(self._kind), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(self._file, header)


class ColumnsWriter:
    """Writes the columns of shards one after the other; in memory is one shard at a time.

    Args:
        folder: an existing folder.
        kinds: K.
        dimensions: whether there are widths and heights.
    """

    def __init__(self, folder: Path, kinds: int, dimensions: bool) -> None:
        self._bytes = 0
        self._arrays = {
            "offsets": ArrayWriter(folder / "offsets.npy", np.int64, kinds),
            "sizes": ArrayWriter(folder / "sizes.npy", np.int32, kinds),
            "key_ends": ArrayWriter(folder / "key_ends.npy", np.int64),
            "key_bytes": ArrayWriter(folder / "key_bytes.npy", np.uint8),
        }
        if dimensions:
            self._arrays["dimensions"] = ArrayWriter(folder / "dimensions.npy", np.int32, 2)

    def append(self, part: Columns) -> None:
        """Add a shard's rows."""
        for name, array in self._arrays.items():
            block = getattr(part, name)
            array.append(block + self._bytes if name == "key_ends" else block)
        self._bytes += len(part.key_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for array in self._arrays.values():
            array.close()
