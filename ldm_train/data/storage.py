"""Where shards lie: something that opens a location, and says which version of a file is there.

A *location* is a path on a mounted disk or a URL. Readers ask a storage for a file descriptor and `pread` from it; so
they need not know whether the bytes were always here or have just been fetched.
"""

import os
from typing import NamedTuple, Protocol

from ldm_train.data.locations import is_url


class ShardReadError(RuntimeError):
    """A shard could not be read although it was tried again: the storage is at fault, not a sample."""


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
