"""A node-local cache of remote shards: whole files in a directory, fetched once per node, the oldest given up first.

A shard at URL u lies in the file h(u).tar, h being 128 bits of SHA-256 of u without its signature: two folders of
shards named alike do not collide, no URL can name a place outside the directory, and a URL that is signed anew finds
the copy. Beside it stand

    h.lock          held by the process that fetches it, while the others of the node wait;
    h.<size>.part   what has arrived so far; its size counts as taken from the beginning;
    h.json          the size and version of the copy.

A copy appears by a rename once it is complete and on the disk, so that nothing else is ever taken for a shard; a
`.part` whose lock nobody holds was left by a process that died, and is removed. Readers hold a shared lock on the copy
they read. When room is needed, copies go in the order in which they were last opened, first those that nobody reads;
where these do not suffice the cache is too small for the order of the data, and it says so. A file that was
removed while it is open stays readable (POSIX unlink).

A copy from before this object was made is compared with the store's version once per node and run.
"""

import fcntl
import hashlib
import json
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import get_worker_info

from ldm_train.data.locations import lasting, shown
from ldm_train.data.remote import RemoteFiles
from ldm_train.data.storage import Identity, ShardReadError

_HITS, _MISSES, _BYTES, _EVICTIONS = range(4)
_POLL = 0.05  # seconds between looks for room that other downloads take
_DISK_FULL_HINT = "choose another `data.cache_dir`, lower `data.cache_bytes`, or make room"


class CacheCounts(NamedTuple):
    """What a cache did, in this process and its workers."""

    hits: int
    misses: int
    bytes_downloaded: int
    evictions: int


class _Copy(NamedTuple):
    path: Path
    size: int
    last_opened: int


def default_cache_directory() -> Path:
    """A directory of this user's own on the disk for temporary files, which follows `TMPDIR`."""
    return Path(tempfile.gettempdir()) / f"ldm_train-shards-{os.getuid()}"


class ShardCache:
    """Opens remote shards from a directory of copies; safe to copy into worker processes.

    Args:
        directory: on a disk of the node; None is `default_cache_directory`.
        max_bytes: of all files in it.
        remote: where the shards are fetched from.
        num_workers: worker processes, each of which counts for itself in memory that all can read.
    """

    def __init__(self, directory: str | Path | None, max_bytes: int, remote: RemoteFiles, num_workers: int = 0) -> None:
        self.directory = default_cache_directory() if directory is None else Path(directory)
        self.max_bytes, self.remote = max_bytes, remote
        self._counts = torch.zeros(num_workers + 1, 4, dtype=torch.int64, device="cpu").share_memory_()
        self._too_small = torch.zeros(1, dtype=torch.int64, device="cpu").share_memory_()
        self._born = time.time()
        self._known: dict[str, Identity] = {}

    @property
    def counts(self) -> CacheCounts:
        """What was done so far, in all workers."""
        return CacheCounts(*self._counts.sum(dim=0).tolist())

    def counters(self) -> dict[str, int]:
        """The same by name, for those who log."""
        return self.counts._asdict()

    def glob(self, pattern: str) -> list[str]:
        """The URLs that a pattern matches."""
        return self.remote.glob(pattern)

    def identity(self, location: str) -> Identity:
        """The size and version that the store has now."""
        self._known[lasting(location)] = identity = self.remote.identity(location)
        return identity

    def open(self, location: str) -> int:
        """A file descriptor of the shard's copy, fetched if it is not here."""
        self._make_directory()
        stem = hashlib.sha256(lasting(location).encode()).hexdigest()[:32]
        fd = self._copy(stem, is_trusted=False)
        if fd is None:
            with self._locked(stem):
                fd = self._copy(stem, is_trusted=False)  # another process may just have fetched it
                if fd is None:
                    fd = self._renewed(stem, location)
                if fd is None:
                    return self._fetched(stem, location)
        self._count(_HITS, 1)
        return fd

    def _make_directory(self) -> None:
        try:
            self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            is_writable = os.access(self.directory, os.W_OK | os.X_OK)
        except OSError:
            is_writable = False
        if not is_writable:
            raise ShardReadError(
                f"the cache directory {self.directory} cannot be written. Allowed is a directory that this user can "
                "write, best on a disk of the node: change `data.cache_dir`."
            )
        if self.directory.stat().st_uid != os.getuid():
            raise ShardReadError(
                f"the cache directory {self.directory} belongs to another user, who could change the shards in it. "
                "Allowed is a directory of your own: change `data.cache_dir`."
            )

    def _copy(self, stem: str, is_trusted: bool) -> int | None:
        """The copy, opened and locked for reading; None if there is none that was verified in this run."""
        try:
            if not is_trusted and (self.directory / f"{stem}.json").stat().st_mtime < self._born:
                return None
            identity = self._recorded(stem)
            fd = os.open(self.directory / f"{stem}.tar", os.O_RDONLY)
        except FileNotFoundError:
            return None
        fcntl.flock(fd, fcntl.LOCK_SH)
        status = os.fstat(fd)
        if identity is None or status.st_size != identity.size or not status.st_nlink:
            os.close(fd)
            return None
        os.utime(fd)
        return fd

    def _recorded(self, stem: str) -> Identity | None:
        try:
            return Identity(*json.loads((self.directory / f"{stem}.json").read_text())["identity"])
        except (ValueError, KeyError, TypeError):
            return None

    def _renewed(self, stem: str, location: str) -> int | None:
        """A copy of an earlier run, if the store still has the same; else it is removed."""
        fd = self._copy(stem, is_trusted=True)
        if fd is None:
            return None
        if self._recorded(stem) == self._unchanged(location):
            os.utime(self.directory / f"{stem}.json")
            return fd
        os.close(fd)
        (self.directory / f"{stem}.tar").unlink(missing_ok=True)
        return None

    def _unchanged(self, location: str) -> Identity:
        name, identity = lasting(location), self.remote.identity(location)
        known = self._known.get(name)
        if known not in (None, identity):
            raise ShardReadError(
                f"{shown(location)} has changed since the run began: {known} became {identity}. A shard must stay "
                "unchanged during a run: restore it, or start anew with `data.shards` as they are now."
            )
        self._known[name] = identity
        return identity

    def _fetched(self, stem: str, location: str) -> int:
        """Fetch a shard, whose lock this process holds, and open it."""
        identity = self._unchanged(location)
        part, copy = self.directory / f"{stem}.{identity.size}.part", self.directory / f"{stem}.tar"
        self._reserve(part, identity.size, location)
        try:
            self.remote.download(location, str(part), identity.size)
            self._record(stem, location, identity)
            fd = os.open(part, os.O_RDONLY)
            fcntl.flock(fd, fcntl.LOCK_SH)
            part.replace(copy)
        except OSError as error:
            raise ShardReadError(
                f"the disk of {self.directory} took no shard of {identity.size} bytes ({error.strerror}); it must hold "
                f"up to {self.max_bytes} bytes: {_DISK_FULL_HINT}."
            ) from error
        finally:
            part.unlink(missing_ok=True)
        self._count(_MISSES, 1)
        self._count(_BYTES, identity.size)
        return fd

    def _record(self, stem: str, location: str, identity: Identity) -> None:
        text = json.dumps({"location": lasting(location), "identity": identity})
        temporary = self.directory / f"{stem}.json.new"
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(self.directory / f"{stem}.json")

    def _reserve(self, part: Path, size: int, location: str) -> None:
        """Make room for a file, waiting for other downloads if they take it all, and claim it."""
        if size > self.max_bytes:
            raise ShardReadError(
                f"{shown(location)} has {size} bytes and does not fit into the cache of {self.max_bytes}. The cache "
                "must hold at least every shard that is read at a time: raise `data.cache_bytes`."
            )
        for left in self.directory.glob(f"{part.name.partition('.')[0]}.*.part"):
            left.unlink(missing_ok=True)  # of a process that died: it would count as claimed, for this one has its lock
        while True:
            with self._locked("cache"):
                if self._has_room(size):
                    free = shutil.disk_usage(self.directory).free
                    if free < size:
                        raise ShardReadError(
                            f"the disk of {self.directory} has {free} bytes left, and {shown(location)} needs {size}; "
                            f"the cache may take up to {self.max_bytes}: {_DISK_FULL_HINT}."
                        )
                    part.touch()
                    return
            time.sleep(_POLL)

    def _has_room(self, size: int) -> bool:
        """Whether `size` bytes fit, after copies were removed as needed."""
        copies, taken = self._contents()
        excess = taken + sum(copy.size for copy in copies) + size - self.max_bytes
        copies.sort(key=lambda copy: copy.last_opened)
        for evict in (self._evict_unread, self._evict):
            for copy in [*copies]:
                if excess <= 0:
                    return True
                if evict(copy):
                    copies.remove(copy)
                    excess -= copy.size
        return excess <= 0

    def _contents(self) -> tuple[list[_Copy], int]:
        """The copies, and the bytes that downloads have claimed; what dead processes left is removed."""
        copies, claimed = [], 0
        for path in self.directory.iterdir():
            try:
                if path.suffix == ".tar":
                    status = path.stat()
                    copies.append(_Copy(path, status.st_size, status.st_mtime_ns))
                elif path.suffix == ".part":
                    stem, size, _ = path.name.split(".")
                    if self._is_abandoned(stem):
                        path.unlink(missing_ok=True)
                    else:
                        claimed += int(size)
            except FileNotFoundError:  # it was completed or removed meanwhile
                continue
        return copies, claimed

    def _is_abandoned(self, stem: str) -> bool:
        fd = os.open(self.directory / f"{stem}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _evict_unread(self, copy: _Copy) -> bool:
        """Remove a copy unless someone has it open."""
        try:
            fd = os.open(copy.path, os.O_RDWR)
        except FileNotFoundError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._remove(copy)
        except BlockingIOError:
            return False
        finally:
            os.close(fd)
        return True

    def _evict(self, copy: _Copy) -> bool:
        """Remove a copy that is being read: the readers keep their descriptors, others will fetch it again."""
        self._remove(copy)
        if not self._too_small[0]:
            self._too_small[0] = 1
            warnings.warn(
                f"the cache {self.directory} of {self.max_bytes} bytes is smaller than the shards that are read at a "
                "time, so that they are fetched again and again: raise `data.cache_bytes` above 2 "
                "`data.shuffle_groups` shards, or lower `data.shuffle_groups`.",
                stacklevel=2,
            )
        return True

    def _remove(self, copy: _Copy) -> None:
        copy.path.unlink(missing_ok=True)
        copy.path.with_suffix(".json").unlink(missing_ok=True)
        self._count(_EVICTIONS, 1)

    @contextmanager
    def _locked(self, stem: str) -> Iterator[None]:
        """Hold one of the cache's locks, waiting for it; the system lets go of it if this process dies."""
        fd = os.open(self.directory / f"{stem}.lock", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    def _count(self, what: int, amount: int) -> None:
        info = get_worker_info()
        with self._locked("counts"):  # processes that index, and threads, share a row
            self._counts[0 if info is None else info.id + 1, what] += amount
