"""Asks SLURM to start this job once more.

SLURM requeues a job only when asked: one that ends by itself within its grace time counts as completed, whatever it was
told before. A job that somebody cancels gets the same SIGTERM as one that is preempted, so its state is read first. At
its time limit a job is COMPLETING, as a cancelled one is, but for the reason TimeLimit, and may be requeued.
"""

import logging
import os
import re
import signal
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

_log = logging.getLogger(__name__)

Handler = Callable[[int, FrameType | None], Any] | int | None

_ANOTHER_START = ("RUNNING", "PREEMPTED", "TIMEOUT", "SUSPENDED", "STOPPED")
_SECONDS = 30.0
_MOST_STARTS = 3


def job_id() -> str | None:
    """The name SLURM knows this batch job by, `array_task` in an array; None outside of SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID")


def gets_further(step: int) -> bool:
    """Whether another start is worth it; said no, with a warning, to the third in a row that got no step further.

    Args:
        step: that the run has come to. Where the start began, and where those that got no further did, is in files of
            the job's script (`slurm/again.sh`), which counts deaths in the same one.
    """
    if (path := os.environ.get("LDM_START_FILE")) is None:
        return True
    try:
        began = Path(path).read_text(encoding="utf-8").strip()
    except FileNotFoundError:
        began = "before the first"
    if began not in (str(step), "before the first"):
        return True
    with Path(f"{path}.deaths").open("a+", encoding="utf-8") as file:
        file.write(f"{began}\n")
        Path(f"{path}.counted").touch()
        file.seek(0)
        if file.read().splitlines()[-_MOST_STARTS:] != [began] * _MOST_STARTS:
            return True
    _log.warning(
        "found that %d starts in a row were told to go, or died, before they took a step after %s; allowed are two; "
        "ask SLURM for more time, or for a later signal (`sbatch --time=... --signal=USR1@...`), and submit it again",
        *(_MOST_STARTS, began),
    )
    return False


def refuse_another_start() -> None:
    """Let the job's script (`slurm/again.sh`) leave this job as it ends, however that is."""
    if path := os.environ.get("LDM_START_FILE"):
        Path(f"{path}.once").touch()


def tell_of_lost(ranks: Iterable[int], is_timed_out: bool) -> None:
    """Let the job's script start this job again although the process that ends it does so by an error.

    Args:
        ranks: that do not answer.
        is_timed_out: whether the error is that another rank was waited for in vain; it may answer by now.
    """
    lost = [*map(str, ranks), *(["time-out"] if is_timed_out else [])]
    if lost and (path := os.environ.get("LDM_START_FILE")):
        with Path(f"{path}.lost").open("a", encoding="utf-8") as file:
            file.write("".join(f"{each}\n" for each in lost))


def ask_for_another_start(number: int, previous: Handler) -> bool:
    """Let the one who launched this process start it again.

    Args:
        number: the signal that ends it.
        previous: the handler that the launcher had installed (submitit's requeues by itself, and exits); without one,
            `scontrol requeue` is called.

    Returns:
        Whether the job will start again, as far as is known.
    """
    job = job_id()
    if job is None:
        return False
    for each in (signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(each, signal.SIG_IGN)  # inherited by scontrol: SLURM signals every process of a step
    if (state := _state(job)) not in _ANOTHER_START:
        _log.info("Job %s is %s: it is not started again", job, state)
        return False
    if callable(previous):
        try:
            previous(number, None)
        except SystemExit:
            _log.info("Job %s was handed back to the one that launched it", job)
        return True
    return _requeued(job)


def _requeued(job: str) -> bool:
    answer = _scontrol("requeue", job)
    if answer is not None and answer.returncode == 0:
        _log.info("Job %s is in the queue again", job)
        return True
    reason = "no answer" if answer is None else answer.stderr.strip()
    _log.warning(
        "found that job %s cannot be requeued (%s); allowed are batch jobs of a cluster with JobRequeue; submit it "
        "again, or switch this off: `callbacks.preemption.requeue=false`",
        *(job, reason),
    )
    return False


def _state(job: str) -> str:
    """The job's state, RUNNING if SLURM does not say."""
    answer = _scontrol("show", "--oneliner", "job", job)
    said = "" if answer is None else answer.stdout
    found = re.search(r"\bJobState=(\w+)", said)
    state = found.group(1) if found else "RUNNING"
    return "TIMEOUT" if state == "COMPLETING" and re.search(r"\bReason=TimeLimit\b", said) else state


def _scontrol(*arguments: str) -> "subprocess.CompletedProcess[str] | None":
    try:
        return subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, timeout=_SECONDS, check=False, close_fds=True
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        _log.warning("scontrol %s: %s", arguments[0], error)
        return None
