"""Where shards lie: something that opens a location, and says which version of a file is there.

A *location* is a path on a mounted disk or a URL. Readers ask a storage for a file descriptor and `pread` from it; so
they need not know whether the bytes were always here or have just been fetched.
"""

import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

from ldm_train.data.locations import is_url

_LOOKS = 16  # files whose size and version are asked for at a time: file servers answer slowly, but many at once
_OF_WORKER = "in DataLoader worker process"


class ShardReadError(RuntimeError):
    """A shard could not be read although it was tried again: the storage is at fault, not a sample."""


def explained(error: Exception, remedy: str) -> str:
    """What an error found, what is allowed and what to change: in our own words, or around those of the system.

    Args:
        error: as it was raised, in this process or by a worker of a DataLoader.
        remedy: what to change where the system refused a file.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return (
            f"{error.filename or 'a file'}: {error.strerror}; allowed are files that this user can read, and folders "
            f"that can be written and have room; {remedy}"
        )
    if _OF_WORKER in str(error):  # it says where it happened, then what
        return str(error).rpartition(f"{type(error).__name__}: ")[2].strip()
    return str(error)


class Identity(NamedTuple):
    """What tells a file's versions apart.

    Attributes:
        size: bytes.
        version: changes when the content does.
    """

    size: int
    version: str


class Storage(Protocol):
    """What readers and the index ask of the place that holds the shards."""

    def open(self, location: str) -> int:
        """A file descriptor to `pread` from, which the caller closes; OSError or ShardReadError if it cannot be had."""
        ...

    def identity(self, location: str) -> Identity:
        """The file's size and version; OSError or ShardReadError if they cannot be had."""
        ...


class LocalFiles:
    """Files on a mounted disk; their version is the time they were last written, in nanoseconds."""

    def open(self, location: str) -> int:
        """A file descriptor to read from."""
        return os.open(location, os.O_RDONLY)

    def identity(self, location: str) -> Identity:
        """The file's size and version."""
        status = os.stat(location)
        return Identity(status.st_size, str(status.st_mtime_ns))


LOCAL_FILES = LocalFiles()


def identities(locations: Iterable[str], storage: Storage) -> list[Identity]:
    """The identities of many files, asked for in threads: a store answers each after a while."""
    with ThreadPoolExecutor(_LOOKS) as pool:
        return list(pool.map(storage.identity, locations))


class Routed:
    """Paths go to one storage, URLs to another.

    Args:
        local: takes paths.
        remote: takes URLs, see `ldm_train.data.shard_cache.ShardCache`.
    """

    def __init__(self, local: Storage, remote: Storage) -> None:
        self.local, self.remote = local, remote

    def open(self, location: str) -> int:
        """A file descriptor to read from."""
        return self._of(location).open(location)

    def identity(self, location: str) -> Identity:
        """The file's size and version."""
        return self._of(location).identity(location)

    def _of(self, location: str) -> Storage:
        return self.remote if is_url(location) else self.local
