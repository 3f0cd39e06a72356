"""Work on many shards at once: results in order, few in memory, and a bar that says how far it is."""

import ctypes
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
Result = TypeVar("Result")
_PR_SET_PDEATHSIG = 1
_AHEAD = 4  # items per worker that are under way: enough that none waits, few enough to fit in memory


# What this process computes, where it belongs to a pool: sent once, and what the function holds of shared memory is
# inherited by a fork, where to send it with each item would make a file descriptor each time.
_kept: list[Callable[[Any], Any]] = []


def _keep(function: Callable[[Any], Any], parent: int) -> None:
    _die_with(parent)
    _kept[:] = [function]


def _die_with(parent: int) -> None:
    """End this process with the one that forked it: an orphan would hold the locks that it inherited for ever."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was gone before it could be asked for
        os._exit(1)


def _apply(item: object) -> Any:  # noqa: ANN401 (any function's result)
    return _kept[0](item)


def map_in_order(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """`function` of each item, in their order, computed by processes.

    Args:
        function: picklable, as are items and results.
        items: taken as they are needed.
        workers: processes; 0 and 1 compute in this one.
    """
    if workers <= 1:
        yield from map(function, items)
        return
    pending: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(workers, initializer=_keep, initargs=(function, os.getpid())) as pool:
        try:
            for item in items:
                pending.append(pool.submit(_apply, item))
                if len(pending) >= _AHEAD * workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)


def tracked(items: Iterable[Item], total: int, description: str, show: bool | None = None) -> Iterator[Item]:
    """The items, under a progress bar on the error stream.

    Args:
        items: what is passed on.
        total: how many there are.
        description: what they are.
        show: whether to draw the bar; None draws it on terminals.
    """
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    is_hidden = not (sys.stderr.isatty() if show is None else show)
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=is_hidden) as progress:
        yield from progress.track(items, total=total, description=description)
