"""What there is to train on: every complete sample of the shards, found once from the tar headers.

A sample is the members of a shard that share a name up to the first dot: an image, a `.txt` caption, a `.json` with
metadata (the layout of WebDataset and img2dataset), if wanted a segmentation map. The index holds its position in
columns (`ldm_train.data.columns`), one row a sample, in the order of the shards; they lie in memory, or in a directory
(`ldm_train.data.index_store`) from which they are mapped. A selection is a list of their rows. The number of a sample
within it is all that the order of training and the workers exchange. What is no complete sample is listed as damage,
what a filter refuses is counted by reason: nothing is left out in silence.

The fingerprint hashes the shards' names and sizes, the samples they hold, and how these were selected. Runs with
equal fingerprints see equal rows.
"""

import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ldm_train.data.columns import Columns, gathered, open_array
from ldm_train.data.filters import Filter
from ldm_train.data.index_store import ShardFiles, UnwritableError, built, looked_up, opened_or_built, relative_names
from ldm_train.data.judging import Judge, ShardSamples, read_metadata
from ldm_train.data.locations import is_url
from ldm_train.data.parallel import map_in_order, tracked
from ldm_train.data.parquet import parquet_of
from ldm_train.data.scanning import CAPTION, IMAGE, KINDS, METADATA, SEGMENTATION, Contents
from ldm_train.data.selections import RowNumbers, kept_rows, selection_key, smallest
from ldm_train.data.shards import ShardReader
from ldm_train.data.storage import LOCAL_FILES, ShardReadError, Storage

__all__ = [
    "CAPTION",
    "IMAGE",
    "METADATA",
    "SEGMENTATION",
    "Damage",
    "ShardIndex",
    "build_index",
]
_LOOKS = 16  # files asked for at a time: file servers answer slowly, but many at once


class Damage(NamedTuple):
    """Something in a shard that is not a complete sample and was left out."""

    shard: str
    reason: str


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a list of shards, or a selection of them; N rows in S shards.

    Attributes:
        paths: S shard files.
        names: their paths relative to the folder that holds them all, for people and for the fingerprint.
        file_sizes: their bytes.
        starts: (S + 1,) int64; shard s holds the rows from `starts[s]` to `starts[s + 1]`.
        columns: where the members lie, for all samples before any selection.
        rows: (N,) int64 rows of the columns that were selected, in order; None: all.
        rows_file: the file the rows are mapped from; None: they are in memory.
        selection: how the rows were selected, one line a step.
        lineage: the selection's name where it can be kept beside the columns; None if it cannot.
        damage: what was left out as incomplete or unreadable.
        refused: samples left out by filters, counted by reason.
        storage: where the shards lie.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    file_sizes: tuple[int, ...]
    starts: np.ndarray
    columns: Columns
    rows: np.ndarray | None = None
    rows_file: Path | None = None
    selection: tuple[str, ...] = ()
    lineage: str | None = ""
    damage: tuple[Damage, ...] = ()
    refused: Counter[str] = field(default_factory=Counter)
    storage: Storage = LOCAL_FILES

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def sample_id(self) -> np.ndarray | RowNumbers:
        """(N,) int64, the sample's number before any filter or split, so that neither changes it."""
        return RowNumbers(len(self.columns)) if self.rows is None else self.rows

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def key(self, row: int) -> str:
        """The sample's own name, `__key__` in WebDataset's terms."""
        return self.columns.keys(np.asarray(self.sample_id[[row]]))[0].decode()

    def full_key(self, row: int) -> str:
        """`<shard>/<key>`, unique among all shards."""
        return f"{self.names[self.shard_of(row)].removesuffix('.tar')}/{self.key(row)}"

    def places(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where the members of rows (n,) lie: (n, K) int64 byte offsets and (n, K) int32 sizes, -1 where absent."""
        chosen = self.sample_id[rows] if self.rows is None else gathered(self.rows, rows)
        return gathered(self.columns.offsets, chosen), gathered(self.columns.sizes, chosen)

    def dimensions(self, rows: np.ndarray) -> np.ndarray:
        """(n, 2) int32 width and height in pixels of the images of rows (n,), -1 where their header is unreadable.

        Raises:
            ValueError: if the index was built without.
        """
        if self.columns.dimensions is None:
            raise ValueError(
                "this index has no width and height; they are read from the images' headers when asked for; build it "
                "with dimensions=True, or `--dimensions` of tools/index_shards.py"
            )
        return self.columns.dimensions[self.sample_id[rows]]

    def key_hash(self, purpose: str) -> np.ndarray:
        """(N,) uint64 hashes of the keys, uniform and independent of how samples are spread over shards."""
        hashes = np.empty(len(self), dtype="<u8")
        for begin, end in self._spans():
            hashes[begin:end] = self._hashes(purpose, begin, end)
        return hashes

    def ranked(self, purpose: str, count: int | None = None) -> np.ndarray:
        """The rows with the smallest hashes of their keys, smallest first: a fixed sample in a fixed mixed order.

        Args:
            purpose: which hash, see `key_hash`.
            count: rows; None is all of them.
        """
        if count is None:
            return np.argsort(self.key_hash(purpose), kind="stable")
        lineage = None if self.lineage is None else selection_key(self.lineage, "ranked", purpose, count)
        hashes = (self._hashes(purpose, begin, end) for begin, end in self._spans())
        return kept_rows(self.columns.folder, lineage, smallest(hashes, count), {}).rows

    def _spans(self) -> Iterator[tuple[int, int]]:
        """First row and end of each shard."""
        yield from zip(self.starts[:-1].tolist(), self.starts[1:].tolist(), strict=True)

    def _hashes(self, purpose: str, begin: int, end: int) -> np.ndarray:
        keys, person = self.columns.keys(np.asarray(self.sample_id[begin:end])), purpose.encode()
        hashes = (hashlib.blake2b(key, digest_size=8, person=person).digest() for key in keys)
        return np.frombuffer(b"".join(hashes), dtype="<u8")

    def select(self, keep: np.ndarray, description: str) -> "ShardIndex":
        """The index of the rows where `keep` (N,) is true; the description enters the fingerprint."""
        blocks = (np.asarray(self.sample_id[begin:end])[keep[begin:end]] for begin, end in self._spans())
        return self._selected(blocks, description, None)

    def first(self, count: int) -> "ShardIndex":
        """The index of the first rows."""
        blocks = (np.asarray(self.sample_id[min(begin, count) : min(end, count)]) for begin, end in self._spans())
        return self._selected(blocks, f"the first {count}", self.lineage)

    def split(self, fraction: float, purpose: str = "validation") -> tuple["ShardIndex", "ShardIndex"]:
        """The index without a share of the samples, and the index of this share, chosen by a hash of the keys.

        Args:
            fraction: the share, from 0 to below 1.
            purpose: which hash, see `key_hash`.
        """
        if not fraction:
            nothing = np.zeros(0, np.int64)
            return self, self._selected((nothing for _ in self.paths), f"{fraction} by key", self.lineage)
        threshold = np.uint64(fraction * 2**64)
        spans = list(self._spans())
        held_out = self._selected(
            (
                np.asarray(self.sample_id[begin:end])[self._hashes(purpose, begin, end) < threshold]
                for begin, end in spans
            ),
            f"{fraction} by key",
            self.lineage,
            purpose,
        )
        assert held_out.rows is not None
        rest = (
            np.setdiff1d(self.sample_id[begin:end], held_out.rows[first:last], assume_unique=True)
            for (begin, end), (first, last) in zip(spans, held_out._spans(), strict=True)
        )
        return self._selected(rest, f"all but {fraction} by key", self.lineage, purpose), held_out

    def _selected(
        self,
        blocks: Iterable[np.ndarray],
        description: str,
        lineage: str | None,
        *grounds: object,
        refused: Counter[str] | None = None,
    ) -> "ShardIndex":
        """The index of the columns' rows in the blocks, one block a shard.

        Args:
            blocks: (n,) int64 each; read only if the selection is not found beside the columns.
            description: enters the fingerprint.
            lineage: names what the selection starts from, None where blocks do not follow from it.
            grounds: what the blocks follow from beside the lineage and the description.
            refused: filled by reading the blocks.
        """
        name = None if lineage is None else selection_key(lineage, description, *grounds)
        refused = Counter() if refused is None else refused
        kept = kept_rows(self.columns.folder, name, blocks, refused)
        return replace(
            self,
            starts=kept.starts,
            rows=kept.rows,
            rows_file=kept.file,
            selection=(*self.selection, description),
            lineage=name,
            refused=self.refused + Counter(kept.refused),
        )

    def filtered(self, filters: Iterable[Filter], workers: int = 0, progress: bool | None = None) -> "ShardIndex":
        """The samples that every filter keeps; the first filter that refuses a sample is the one that is counted.

        Args:
            filters: the filters; none keeps everything.
            workers: processes that work on shards; 0 and 1 use this one.
            progress: whether to draw a bar; None draws it on terminals.
        """
        filters = list(filters)
        if not filters:
            return self
        judge, refused = Judge(filters, self.storage), Counter[str]()
        description = " and ".join(filter_.description for filter_ in filters)
        blocks = self._judged(judge, refused, workers, progress)
        grounds = [[type(filter_).__qualname__ for filter_ in filters]]
        if self.columns.folder is not None and judge.fields:
            grounds.append(self._parquets())
        return self._selected(blocks, description, self.lineage, *grounds, refused=refused)

    def _judged(self, judge: Judge, refused: Counter[str], workers: int, progress: bool | None) -> Iterator[np.ndarray]:
        verdicts = map_in_order(judge, map(self._samples, range(len(self.paths))), workers)
        shards = zip(verdicts, self._spans(), strict=True)
        for (keep, reasons), (begin, end) in tracked(shards, len(self.paths), "filtering shards", progress):
            refused.update(reasons)
            yield np.asarray(self.sample_id[begin:end])[keep]

    def _samples(self, shard: int) -> ShardSamples:
        rows = np.asarray(self.sample_id[int(self.starts[shard]) : int(self.starts[shard + 1])])
        places = np.stack((self.columns.offsets[rows, METADATA], self.columns.sizes[rows, METADATA]), axis=1)
        return ShardSamples(self.paths[shard], self.columns.keys(rows), places)

    def _parquets(self) -> list[str]:
        """Size and version of the parquet beside each shard: what filters say follows from it."""

        def look(path: str) -> str:
            try:
                return " ".join(map(str, self.storage.identity(parquet_of(path))))
            except (OSError, ShardReadError):
                return ""

        with ThreadPoolExecutor(_LOOKS) as pool:
            return list(pool.map(look, self.paths))

    def metadata(self, reader: ShardReader, row: int) -> dict[str, Any]:
        """The sample's `.json`; KeyError if it has none, MetadataError if it is no JSON object."""
        return read_metadata(reader, self.shard_of(row), *self._place(row, METADATA))

    def read(self, reader: ShardReader, row: int, kind: int) -> bytes:
        """The bytes of a sample's `IMAGE`, `CAPTION`, `METADATA` or `SEGMENTATION`; KeyError if it has none."""
        offset, size = self._place(row, kind)
        if size < 0:
            raise KeyError(f"no {KINDS[kind]}")
        return reader.read(self.shard_of(row), offset, size)

    def _place(self, row: int, kind: int) -> tuple[int, int]:
        chosen = int(self.sample_id[row])
        return int(self.columns.offsets[chosen, kind]), int(self.columns.sizes[chosen, kind])

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the shards' names, sizes and rows, and of the selection, as 64 hexadecimal digits."""
        rows = np.diff(self.starts).tolist()
        identity = [list(self.names), list(self.file_sizes), rows, list(self.selection)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ if self.rows_file is None else {**self.__dict__, "rows": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.rows_file is not None:
            self.__dict__["rows"] = open_array(self.rows_file)


def build_index(
    paths: Sequence[str],
    required: Sequence[int] = (IMAGE, CAPTION),
    segmentation: str | None = None,
    directory: str | Path | None = None,
    workers: int = 0,
    storage: Storage = LOCAL_FILES,
    dimensions: bool = False,
    progress: bool | None = None,
) -> ShardIndex:
    """Index shards by reading their tar headers, or open the index that an earlier run left.

    Args:
        paths: tar files, see `ldm_train.data.locations.expand_shards`.
        required: the members without which a sample is incomplete.
        segmentation: the extension of segmentation maps, in lower case, without which a sample is incomplete too;
            `None` indexes none.
        directory: a folder that keeps indices, each list of shards and requirements in a subfolder of its own; None
            builds in memory.
        workers: processes that scan shards; 0 and 1 use this one.
        storage: where the shards lie.
        dimensions: index width and height, which costs a read for each image.
        progress: whether to draw a bar; None draws it on terminals.

    Raises:
        ShardReadError: if a shard cannot be read.
    """
    locations = [path if is_url(path) else os.path.abspath(path) for path in paths]
    contents = Contents(tuple(required), segmentation, dimensions)
    wanted, shards, found = looked_up(locations, contents, storage), ShardFiles(locations, storage, workers), None
    if directory is not None:
        try:
            found = opened_or_built(wanted, Path(directory), shards, progress)
        except UnwritableError as error:
            warnings.warn(
                f"the index cannot be kept in {directory} ({error}) and is built in memory. Allowed are folders that "
                "can be written: change `data.index_dir`.",
                stacklevel=2,
            )
    table, columns = built(wanted, shards, progress) if found is None else found
    names = relative_names(paths)
    return ShardIndex(
        paths=tuple(paths),
        names=names,
        file_sizes=tuple(table.sizes),
        starts=table.starts,
        columns=columns,
        damage=tuple(Damage(names[shard], reason) for shard, reason in table.damage),
        storage=storage,
    )
