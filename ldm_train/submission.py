"""What a submitted job asks SLURM for, as the trainer's config says it, and how its end is seen.

It has a process per GPU, and no GPU on the CPU: `conf/hydra/slurm.yaml` reads `tasks_per_node` and `gpus_per_node` by
the resolvers of the same names; everything else there is plain keys. `study_of` names what `conf/sweep/optuna.yaml`
learns from, `job_name` the jobs of a multirun. `Queue` is asked by the command that waits for its jobs
(`hydra_plugins.ldm_train_slurm`).
"""

import hashlib
import logging
import subprocess
import time
from collections.abc import Collection, Iterable, Sequence

_log = logging.getLogger(__name__)

SWEPT_KEYS = "LDM_SWEPT_KEYS"  # environment variable: which keys a multirun varies, for its jobs wherever they run
_MOST_CHARACTERS = 150  # of a job's name: file systems allow 255 bytes
_NO_SETTING = ("logger", "paths.", "resume=", "run_id=", "name=", "metric=", "sweep=")


def tasks_per_node(devices: object) -> int:
    """The processes of a job on each of its nodes.

    Args:
        devices: `trainer.devices`.

    Raises:
        ValueError: if it is no number: a job asks for its GPUs before anyone has seen its nodes.
    """
    if not isinstance(devices, int) or isinstance(devices, bool) or devices < 1:
        raise ValueError(
            f"trainer.devices is {devices!r}; allowed in a job that is submitted is the number of its GPUs, or of its "
            "processes, on each node; take `trainer=slurm`, and change `trainer.devices`"
        )
    return devices


def gpus_per_node(accelerator: str, devices: object) -> int | None:
    """The GPUs of a job on each of its nodes; None, which asks for nothing, where it computes on the CPU.

    Args:
        accelerator: `trainer.accelerator`.
        devices: `trainer.devices`.
    """
    return None if accelerator == "cpu" else tasks_per_node(devices)


def study_of(name: str, metric: str, overrides: Iterable[str]) -> str:
    """The name of a study of Optuna's: trials of other budgets or settings tell it nothing, and have one of their own.

    Args:
        name: of the runs.
        metric: what is compared.
        overrides: of the command, as they were written.
    """
    settings = sorted(each for each in overrides if not each.lstrip("+~").startswith(_NO_SETTING))
    return f"{name} {metric} {_digest(settings)}"


def job_name(overrides: Iterable[str], swept: Collection[str], excluded: Collection[str]) -> str:
    """The name of a job of a multirun: what it varies, and a hash of its other settings, `optimizer.lr=1e-4-5f2c81`.

    Jobs of equal settings have equal names, whatever the order in which these are written, and others have others.

    Args:
        overrides: of the job, as they were written.
        swept: the keys that the multirun varies; none: all are told, so that jobs differ.
        excluded: keys that belong to no job's name.
    """
    last = {each.lstrip("+~").split("=", 1)[0]: each for each in overrides}
    told = {key: last[key] for key in sorted(last) if key not in excluded}
    varied = [each for key, each in told.items() if key in swept] or list(told.values())
    name, rest = ",".join(varied).replace("/", "_"), [each for each in told.values() if each not in varied]
    shortened = name if len(name) <= _MOST_CHARACTERS else f"{name[:130]}-{_digest([name], 12)}"
    return f"{shortened}-{_digest(rest)}" if rest else shortened


def _digest(words: Sequence[str], digits: int = 6) -> str:
    return hashlib.sha1(chr(10).join(words).encode()).hexdigest()[:digits]


# All others are on their way, may come back, or are held for somebody to release.
_OVER = frozenset({"BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY"})
_OVER |= {"PREEMPTED", "REVOKED", "TIMEOUT"}
_SQUEUE = ("squeue", "--me", "--noheader", "--states=all", "--array", "--format=%i %T")
_SECONDS_TO_ANSWER = 60.0


class Queue:
    """Which jobs are over, by SLURM's queue, which every cluster has: accounts (`sacct`) are a choice of the site.

    A job that is over for good and one that is about to be requeued, or whose result is still on its way through a
    file system, look alike for a while. So what the queue says has to stay so.

    Args:
        every: seconds between two looks.
        patience: seconds for which a job has to be over.
    """

    def __init__(self, every: float = 15.0, patience: float = 30.0) -> None:
        self._every, self._patience = every, patience
        self._asked_at = self._answered_at = -every
        self._known: set[str] = set()
        self._over: dict[str, tuple[str, float]] = {}  # state, and since when

    def ending_of(self, job: str) -> str | None:
        """The state in which a job has ended for good; None as long as it has not.

        Args:
            job: as the queue names it, `array_task` in an array.
        """
        now = time.monotonic()
        if now - self._asked_at >= self._every:
            self._asked_at = now
            self._look(now)
        state, since = self._over.get(job, ("", now))
        return state if state and self._answered_at - since >= self._patience else None

    def _look(self, now: float) -> None:
        try:
            answer = subprocess.run(_SQUEUE, capture_output=True, text=True, timeout=_SECONDS_TO_ANSWER, check=True)
        except (OSError, subprocess.SubprocessError) as error:
            _log.debug("squeue: %s", error)  # the controller is busy, or being started again
            return
        self._answered_at = now
        found = dict(line.split(maxsplit=1) for line in answer.stdout.splitlines())
        over = {job: state for job, state in found.items() if state in _OVER}
        # The queue forgets a job some minutes after its end; one that it has never known may be another cluster's.
        over |= dict.fromkeys(self._known - found.keys(), "forgotten by SLURM")
        self._known |= found.keys()
        self._over = {job: (state, self._over.get(job, ("", now))[1]) for job, state in over.items()}
