"""Where a process stands that does not move: the stacks of its threads, on the error stream.

A rank that waits for ever says nothing by itself, and when a time-out has ended it nobody can look any more. So
SIGQUIT, which ends a process by default, prints stacks instead: the handler is written in C and speaks even where
Python is stuck in a call. Processes that are forked later inherit it: loading processes ignore the signals by which
runs are told to leave, but not this one.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import time

_STDERR = 2
_SECONDS_TO_WRITE = 0.2  # of a child, whose lines would else be between those of the next


def answer_with_stacks() -> None:
    """From now on SIGQUIT prints the stacks of this process, and of those that it forks, and ends none of them."""
    faulthandler.register(signal.SIGQUIT, _STDERR, all_threads=True)


def end_at_once() -> None:
    """SIGQUIT ends this process again."""
    faulthandler.unregister(signal.SIGQUIT)


def say_stacks(name: str) -> None:
    """Print where each thread of this process is, and of each process that it has forked since `answer_with_stacks`.

    Args:
        name: whose stacks these are, for people.
    """
    _announce(f"{name}, process {os.getpid()}, stands here")
    faulthandler.dump_traceback(_STDERR, all_threads=True)
    for child in multiprocessing.active_children():
        _announce(f"its process {child.name}, {child.pid}, stands here")
        try:
            os.kill(child.pid, signal.SIGQUIT)  # type: ignore[arg-type]
        except ProcessLookupError:
            continue
        time.sleep(_SECONDS_TO_WRITE)


def _announce(words: str) -> None:
    sys.stderr.flush()
    os.write(_STDERR, f"\n{words} (the last call of each thread comes first):\n".encode())
