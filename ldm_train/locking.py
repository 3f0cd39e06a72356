"""One writer for a directory: a lock on a file in it, with the name of the one who holds it.

The lock is the kernel's (POSIX record locks): it ends with the process that took it, however that ends, is not
inherited by the processes that it forks, and holds between machines where their shared file system knows locks. Where
it does not, nothing is locked and a warning says so.
"""

import errno
import fcntl
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_log = logging.getLogger(__name__)

_UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
_HELD = (errno.EACCES, errno.EAGAIN)
_FLOCK = "hhqqi"  # of Linux: kind of the lock, where it is counted from, start, length, process


class LockHeldError(ValueError):
    """Another process holds the lock; the message says which one."""


def take_flock(descriptor: int, wait: bool) -> bool:
    """Take the lock that threads and processes exclude each other by (`flock`); closing the file gives it back.

    Args:
        descriptor: of the open file.
        wait: until whoever holds it gives it back.

    Returns:
        False, unless told to wait, if another holds it.

    Raises:
        OSError: if the file system has no locks.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


@contextmanager
def sole_writer(path: Path, key: str, patience: float = 10.0) -> Iterator[None]:
    """Hold the lock of a file for the context.

    Args:
        path: the file, made if it is not there; it stays, and holds the host, process and job of the last holder.
        key: the config key that leads to another file, for errors.
        patience: seconds to wait for a holder that is about to end.

    Raises:
        LockHeldError: if another process holds it for longer.
        OSError: if the file cannot be written.
    """
    with path.open("a+", encoding="utf-8") as file:
        _take(file.fileno(), path, key, time.monotonic() + patience)
        file.truncate(0)
        file.write(json.dumps(_self()) + "\n")
        file.flush()
        yield


def is_locked(path: Path) -> bool:
    """Whether another process holds the lock of a file now. Not to be asked by the process that holds it."""
    try:
        with path.open("r+", encoding="utf-8") as file:
            fcntl.lockf(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in _HELD
    return False


def _take(descriptor: int, path: Path, key: str, deadline: float) -> None:
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _UNSUPPORTED:
                _log.warning("%s cannot be locked here (%s): start no second run of the same `%s`", path, error, key)
                return
            if error.errno not in _HELD:
                raise
        holder = _holder(path)
        if time.monotonic() > deadline:
            if _is_of_earlier_start(holder):
                # This job is here twice because it was requeued and its first node does not answer.
                _log.warning("%s is still locked by this job's earlier start on %s", path, holder.get("host"))
                return
            job = f", job {holder['job']}" if holder.get("job") else ""
            raise LockHeldError(
                f"{path.parent} is being written by process {holder.get('process')} on {holder.get('host')}{job}; "
                f"allowed is one run at a time in a directory; wait for it, end it, or change `{key}`"
            )
        time.sleep(0.2)


def _self() -> dict[str, str | int | None]:
    job, start = os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))
    return {"host": socket.gethostname(), "process": os.getpid(), "job": job, "start": start}


def _is_of_earlier_start(holder: dict[str, str | int | None]) -> bool:
    """Whether this job has been started again since; a second run in the same start of a job is as foreign as any."""
    own, start = _self(), holder.get("start")
    is_same_job = own["job"] is not None and holder.get("job") == own["job"]
    return is_same_job and isinstance(start, int) and start < int(own["start"] or 0)


def _holder(path: Path) -> dict[str, str | int | None]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def holder_of(path: Path) -> int | None:
    """The process that holds the lock of a file, which is neither taken nor made; `None` if none does.

    A holder on another machine is seen where the file system tells of it, and its number may then be negative.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return None
    try:
        asked = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        kind, _, _, _, process = struct.unpack(_FLOCK, fcntl.fcntl(descriptor, fcntl.F_GETLK, asked))
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return None if kind == fcntl.F_UNLCK else int(process)
