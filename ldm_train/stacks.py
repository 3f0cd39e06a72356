"""Where a process stands that does not move: the stacks of its threads, on the error stream.

A rank that waits for ever says nothing by itself, and when a time-out has ended it nobody can look any more. So
SIGQUIT, which ends a process by default, prints stacks instead: the handler is written in C and speaks even where
Python is stuck in a call. Processes that are forked later inherit it: loading processes ignore the signals by which
runs are told to leave, but not this one. A process that waits in the kernel, for a disk that is gone, does not answer.
"""

import faulthandler
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_STDERR = 2
_SECONDS_TO_WRITE = 0.2  # of a child, whose lines would else be between those of the next


@contextmanager
def answering_with_stacks() -> Iterator[None]:
    """The context in which SIGQUIT prints the stacks of this process, and of those that it forks, and ends none."""
    faulthandler.register(signal.SIGQUIT, _STDERR, all_threads=True)
    try:
        yield
    finally:
        faulthandler.unregister(signal.SIGQUIT)


def say_stacks(name: str) -> None:
    """Print where each thread of this process is, and of each child that answers.

    Args:
        name: whose stacks these are, for people.
    """
    with suppress(OSError):  # nobody reads the error stream, or it is closed
        _announce(f"{name}, process {os.getpid()}, stands here")
        faulthandler.dump_traceback(_STDERR, all_threads=True)
        for child in multiprocessing.active_children():
            if child.pid is not None and _answers(child.pid):
                _announce(f"its process {child.name}, {child.pid}, stands here")
                os.kill(child.pid, signal.SIGQUIT)
                time.sleep(_SECONDS_TO_WRITE)


def _announce(words: str) -> None:
    os.write(_STDERR, f"\n{words} (the last call of each thread comes first):\n".encode())


def _answers(process: int) -> bool:
    """Whether a process has a handler of the signal, which would end it otherwise."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    caught = next(int(line.split()[1], 16) for line in lines if line.startswith("SigCgt:"))
    return bool(caught >> (signal.SIGQUIT - 1) & 1)
