"""A job in a process of its own, so that whatever ends it ends nothing else.

A sweep's jobs run one after the other in one process by default. What one of them leaves behind (memory of a GPU,
threads, filters of warnings) reaches the next, and a job that the kernel kills for its memory takes all others with it.
Here a job is forked from the sweep's process, which has loaded everything and computed nothing, and only waits:

    the job returns     its value is passed on
    the job raises      its traceback is printed by itself; JobFailedError has the type and the message
    the job dies        by a signal or by `os._exit`: JobDiedError
    the job exits       SystemExit, as when a signal has told it to save and leave: so does the waiting process

Signals to the waiting process are passed on to the job; if the waiting process is killed, the job is told to leave.
"""

import ctypes
import multiprocessing
import os
import platform
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import FrameType

from ldm_train.results import described

_PASSED_ON = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
_PR_SET_PDEATHSIG = 1


class JobFailedError(RuntimeError):
    """A job in another process raised; its traceback is printed there."""


class JobDiedError(RuntimeError):
    """A job ended without a word: it was killed, or left Python."""


def run_in_child(job: Callable[[], float | None]) -> float | None:
    """Run a job in a forked process and wait for it.

    Args:
        job: what to run; it sees everything this process has.

    Returns:
        What it returns.

    Raises:
        JobFailedError: if it raised.
        JobDiedError: if it ended in another way than by returning or raising.
        SystemExit: if it exited.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_child, args=(job, sender))
    child.start()
    sender.close()
    assert child.pid is not None
    try:
        with _passing_signals_on(child.pid):
            kind, value = receiver.recv()
    except EOFError:
        kind, value = "died", None
    finally:
        child.join()
    if kind == "raised":
        raise JobFailedError(value)
    if kind == "exited":
        raise SystemExit(value)
    if kind == "died":
        raise JobDiedError(_ending(child.exitcode))
    return value


def _child(job: Callable[[], float | None], sender: Connection) -> None:
    for number in _PASSED_ON:
        signal.signal(number, signal.SIG_DFL)
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    try:
        sender.send(("returned", job()))
    except SystemExit as stop:
        sender.send(("exited", stop.code))
    except BaseException as error:
        traceback.print_exception(error)
        sender.send(("raised", described(error)))
    sys.stdout.flush()
    sys.stderr.flush()


@contextmanager
def _passing_signals_on(pid: int) -> Iterator[None]:
    """Signals that mean the job; an interrupt of the keyboard reaches both processes by itself."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            return

    previous = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ending(code: int | None) -> str:
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        hint = " (as the kernel does when memory runs out)" if name == "SIGKILL" else ""
        return f"killed by {name}{hint}"
    return f"left Python with status {code}"
