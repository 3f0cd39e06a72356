"""Where shards lie, as the index sees it: something that opens a location and says which version of it is there."""

import os
from typing import NamedTuple, Protocol


class Identity(NamedTuple):
    """What tells a file's versions apart.

    Attributes:
        size: bytes.
        version: changes when the content does.
    """

    size: int
    version: str


class Storage(Protocol):
    """What the index asks of the place that holds the shards."""

    def open(self, location: str) -> int:
        """A file descriptor to read from, which the caller closes; OSError if there is no such file."""
        ...

    def identity(self, location: str) -> Identity:
        """The file's size and version; OSError if there is no such file."""
        ...


class LocalFiles:
    """Files on a mounted disk; their version is the time they were last written."""

    def open(self, location: str) -> int:
        """A file descriptor to read from."""
        return os.open(location, os.O_RDONLY)

    def identity(self, location: str) -> Identity:
        """The file's size and version."""
        status = os.stat(location)
        return Identity(status.st_size, str(status.st_mtime_ns))


LOCAL_FILES = LocalFiles()
