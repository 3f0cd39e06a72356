"""Indices on disk: made once, by many processes, opened by all, brought up to date instead of made again.

    <directory>/<name>-<hash>/          one for each list of shards and what was asked of them
        index.json                      format, the current columns, and the checksum of their table
        columns-<id>/table.json         the shards: location, size, version, rows, promise of the stats file, damage
        columns-<id>/<column>.npy       a row for each sample, see `Columns`
        columns-<id>/selection-<hash>/  rows that filters or a split kept, see `ldm_train.data.selections`
    <directory>/<name>-<hash>.lock      held by the process that builds

New columns are written beside the old ones, and `index.json` is replaced by renaming: whatever happens, it names
complete columns, the old ones or the new ones. A shard whose location, size and version are those of an earlier index
of any list of shards in the directory is copied from there and not scanned. A file that does not fit its checksum or
its shape is not believed: the index is built anew, said aloud.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

import numpy as np

from ldm_train.data.columns import Columns, ColumnsWriter, joined, of_scan, open_columns
from ldm_train.data.locations import is_url, lasting, shown
from ldm_train.data.parallel import map_in_order, tracked
from ldm_train.data.scanning import Contents, scan
from ldm_train.data.storage import ShardReadError, Storage, identities
from ldm_train.locking import take_flock

_log = logging.getLogger(__name__)
_FORMAT = 1


class UnwritableError(OSError):
    """Nothing can be kept in a directory."""


@dataclass
class Table:
    """The shards of an index, S of them, in order.

    Attributes:
        contents: what is indexed of each sample.
        locations: where they are: absolute paths, and URLs without their secrets, see `lasting`.
        sizes: their bytes.
        versions: what `Storage.identity` says beside the size.
        rows: their samples.
        promised: the samples that stats files promise, None without one.
        damage: (number of the shard, what was left out).
    """

    contents: Contents
    locations: list[str]
    sizes: list[int] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    promised: list[int | None] = field(default_factory=list)
    damage: list[tuple[int, str]] = field(default_factory=list)

    @property
    def starts(self) -> np.ndarray:
        """(S + 1,) int64 first row of each shard, and N."""
        return np.concatenate(([0], np.cumsum(self.rows, dtype=np.int64)))

    def unscanned(self) -> "Table":
        """A table of the same shards as they were looked up."""
        return Table(self.contents, self.locations, self.sizes, self.versions)

    def identities(self) -> list[tuple[str, int, str]]:
        """What tells whether a shard is still the one that was scanned."""
        return list(zip(self.locations, self.sizes, self.versions, strict=True))


@dataclass(frozen=True)
class ShardFiles:
    """How the shards of a table are read.

    Attributes:
        locations: where they are, in the order of the table.
        storage: what opens them.
        workers: processes that scan them; 0 and 1 use this one.
    """

    locations: Sequence[str]
    storage: Storage
    workers: int = 0


def relative_names(locations: Sequence[str]) -> tuple[str, ...]:
    """The locations relative to the folder that holds them all; a URL's query is no part of it if they differ without.

    They are for people and for fingerprints, and hold no secrets.
    """
    if any(map(is_url, locations)):
        kept = [lasting(location) for location in locations]
        plain = [place.partition("?")[0] if is_url(place) else place for place in kept]
        parts = [place.split("/") for place in (plain if len({*plain}) == len(plain) else kept)]
        folders = zip(*(part[:-1] for part in parts), strict=False)
        shared = sum(1 for _ in takewhile(lambda names: len(set(names)) == 1, folders))
        return tuple("/".join(part[shared:]) for part in parts)
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in locations])
    return tuple(os.path.relpath(path, root) for path in locations)


def looked_up(locations: Sequence[str], contents: Contents, storage: Storage) -> Table:
    """The table of shards as they are now, not scanned yet."""
    with _readable():
        found = identities(locations, storage)
    kept = [lasting(location) for location in locations]
    return Table(contents, kept, [size for size, _ in found], [version for _, version in found])


@contextmanager
def _readable() -> Iterator[None]:
    """Inside, what the system refuses is a shard."""
    try:
        yield
    except OSError as error:
        raise ShardReadError(
            f"{shown(str(error.filename or 'a shard'))} could not be read: {error.strerror or error}. A shard must "
            "exist and be readable by this user: check its permissions and the storage behind `data.shards`."
        ) from error


def built(table: Table, shards: ShardFiles, show: bool | None) -> tuple[Table, Columns]:
    """The index in memory, of a table that was looked up."""
    table = table.unscanned()
    return table, joined(_parts(table, {}, shards, show))


def opened_or_built(wanted: Table, directory: Path, shards: ShardFiles, show: bool | None) -> tuple[Table, Columns]:
    """The index of the wanted shards in a directory, made or brought up to date if need be.

    Of the processes that find it missing one builds; the others wait and open what it made.

    Raises:
        UnwritableError: if the directory cannot be written.
        ShardReadError: if a shard cannot be read.
    """
    folder = index_folder(directory, wanted)
    if (current := _opened_if_current(folder, wanted)) is not None:
        return current
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UnwritableError(str(error)) from error
    with locked(folder.with_name(folder.name + ".lock")):
        if (current := _opened_if_current(folder, wanted)) is not None:
            return current
        return _build(folder, wanted.unscanned(), shards, show)


def index_folder(directory: Path, table: Table) -> Path:
    """Where the index of these shards lies."""
    what = json.dumps([table.locations, asdict(table.contents)])
    name = Path(table.locations[0]).parent.name or "shards"
    return directory / f"{name}-{hashlib.sha256(what.encode()).hexdigest()[:12]}"


def open_index(folder: Path) -> tuple[Table, Columns]:
    """The index in a folder as it is, whether or not the shards have changed since.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another version.
    """
    head = json.loads((folder / "index.json").read_bytes())
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise ValueError(f"it is no index of format {_FORMAT}")
    columns_folder = folder / Path(str(head.get("columns"))).name
    body = (columns_folder / "table.json").read_bytes()
    if hashlib.sha256(body).hexdigest() != head.get("sha256"):
        raise ValueError("its table does not fit its checksum")
    facts = json.loads(body)
    what = facts.pop("contents")
    contents = Contents(tuple(what["required"]), what["segmentation"], what["dimensions"])
    table = Table(contents, **{**facts, "damage": [(shard, reason) for shard, reason in facts["damage"]]})
    columns = open_columns(columns_folder)
    _check_shapes(columns, int(table.starts[-1]), contents)
    return table, columns


def _check_shapes(columns: Columns, rows: int, contents: Contents) -> None:
    bytes_of_keys = int(columns.key_ends[-1]) if len(columns.key_ends) else 0
    expected = {
        "offsets": ((rows, contents.width), np.int64),
        "sizes": ((rows, contents.width), np.int32),
        "key_ends": ((rows,), np.int64),
        "key_bytes": ((bytes_of_keys,), np.uint8),
    }
    if contents.dimensions:
        expected["dimensions"] = ((rows, 2), np.int32)
    for name, (shape, kind) in expected.items():
        column = getattr(columns, name)
        if column is None or column.shape != shape or column.dtype != kind:
            raise ValueError(f"its column {name} has not the shape {shape}")


def _opened(folder: Path) -> tuple[Table, Columns] | None:
    """The index in a folder; None, said aloud, if it cannot be used."""
    try:
        return open_index(folder)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError, EOFError, OSError) as error:
        warnings.warn(f"the index {folder} is not used and will be built anew: {error}", stacklevel=2)
        return None


def _opened_if_current(folder: Path, wanted: Table) -> tuple[Table, Columns] | None:
    found = _opened(folder)
    return found if found is not None and found[0].identities() == wanted.identities() else None


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a lock that processes of this machine, and of others that mount the folder, exclude each other by.

    Raises:
        UnwritableError: if there can be no lock.
    """
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise UnwritableError(str(error)) from error
    try:
        _lock(fd, path)
        yield
    finally:
        os.close(fd)


def _lock(fd: int, path: Path) -> None:
    try:
        if not take_flock(fd, wait=False):
            _log.warning("waiting for another process, which makes the index and holds %s", path)
            take_flock(fd, wait=True)
    except OSError as error:  # some file servers have no locks
        raise UnwritableError(f"{path} cannot be locked: {error}") from error


@dataclass(frozen=True)
class _Known:
    """A shard in an earlier index: its rows there, and what was said of it."""

    columns: Columns
    begin: int
    end: int
    promised: int | None
    damage: list[str]


def _known(directory: Path, wanted: Table) -> dict[tuple[str, int, str], _Known]:
    """The wanted shards that need no scan, by their identity."""
    missing, known = set(wanted.identities()), {}
    for head in sorted(directory.glob("*/index.json")):
        found = _opened(head.parent) if missing else None
        if found is None or found[0].contents != wanted.contents:
            continue
        table, columns = found
        reasons: dict[int, list[str]] = {}
        for shard, reason in table.damage:
            reasons.setdefault(shard, []).append(reason)
        for shard, identity in enumerate(table.identities()):
            if identity in missing:
                begin, end = int(table.starts[shard]), int(table.starts[shard + 1])
                known[identity] = _Known(columns, begin, end, table.promised[shard], reasons.get(shard, []))
                missing.remove(identity)
    return known


def _parts(
    table: Table, known: dict[tuple[str, int, str], _Known], shards: ShardFiles, show: bool | None
) -> Iterator[Columns]:
    """The columns of each shard, copied where it is known; fills the table."""
    identities = table.identities()
    pairs = zip(shards.locations, identities, strict=True)
    unknown = [location for location, identity in pairs if identity not in known]
    scans = map_in_order(partial(scan, contents=table.contents, storage=shards.storage), unknown, shards.workers)
    for shard, identity in enumerate(tracked(identities, len(identities), "indexing shards", show)):
        old = known.get(identity)
        if old is None:
            with _readable():
                scanned = next(scans)
            part, promised, damage = of_scan(scanned), scanned.promised, scanned.damage
        else:
            part, promised, damage = old.columns.part(old.begin, old.end), old.promised, old.damage
        table.rows.append(len(part))
        table.promised.append(promised)
        table.damage += [(shard, reason) for reason in damage]
        yield part


def _build(folder: Path, table: Table, shards: ShardFiles, show: bool | None) -> tuple[Table, Columns]:
    """Write new columns, make `index.json` name them, remove the old; the lock is held."""
    for left in folder.glob("building-*"):  # by a process that was killed
        shutil.rmtree(left, ignore_errors=True)
    name = f"{time.time_ns():x}-{os.getpid()}"
    staging, columns_folder = folder / f"building-{name}", folder / f"columns-{name}"
    try:
        staging.mkdir()
        with ColumnsWriter(staging, table.contents.width, table.contents.dimensions) as writer:
            for part in _parts(table, _known(folder.parent, table), shards, show):
                writer.append(part)
        staging.rename(columns_folder)
        _write_table(folder, columns_folder, table)
    except OSError as error:  # of the writing: what cannot be read is a ShardReadError
        shutil.rmtree(columns_folder, ignore_errors=True)
        raise UnwritableError(str(error)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    for old in folder.glob("columns-*"):
        if old != columns_folder:
            shutil.rmtree(old, ignore_errors=True)
    return table, open_columns(columns_folder)


def _write_table(folder: Path, columns_folder: Path, table: Table) -> None:
    """Put the table beside the columns, and make them the current ones."""
    body = json.dumps(asdict(table)).encode()
    _write(columns_folder / "table.json", body)
    head = {"format": _FORMAT, "columns": columns_folder.name, "sha256": hashlib.sha256(body).hexdigest()}
    _write(folder / "index.json.new", json.dumps(head).encode())
    (folder / "index.json.new").replace(folder / "index.json")


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
