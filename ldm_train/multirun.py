"""What a sweep does about its jobs: notes what became of each, goes on when one fails, and ends with a table.

Hydra calls this around every job, in the process that the job runs in, and around the whole multirun. A job that raises
ends Hydra's own sweeps, and one that returns no number ends Optuna's. Here, by default,

- a job that fails is noted with its reason and gives the sweeper no value: the others go on, and Optuna counts a failed
  trial, from which it learns nothing;
- of a job of several processes that SLURM runs, one that fails ends at once with the status 1, so that the others do
  not wait for it, and its reason is the job's;
- a metric that is NaN, infinite, or was never logged is no value either;
- the sweep ends with its table (`ldm_train.sweeps`) and, if any job of it did not finish, with the status 1.

The table on the disk is made anew after each job, so that it is there whatever happens to the sweep's own process.
"""

import logging
import math
import os
import re
import socket
import sys
import traceback
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

from ldm_train.isolation import JobDiedError, JobFailedError
from ldm_train.results import described
from ldm_train.roll_call import told_silence
from ldm_train.submission import SWEPT_KEYS
from ldm_train.sweeps import (
    FINISHED,
    draw_table,
    jobs_of_start,
    read_job,
    save_job,
    save_plan,
    shown,
    table_of_sweep,
    unfinished,
    write_table,
)

_log = logging.getLogger(__name__)

GROUP = "WANDB_RUN_GROUP"
_BAD_ENDS = ("failed", "died")
_MOST_CHARACTERS = 100  # of a sweep's name: file systems have limits


class SweepResults(Callback):
    """Notes results and keeps a sweep going; see the module. `conf/hydra/default.yaml` installs it.

    Args:
        on_failure: `continue` with the other jobs, or `stop` the sweep at the first that fails, where jobs run one
            after the other.
        failed_value: what a sweeper is told of a job without a value; null, no value, is the honest answer. A number
            makes a sampler of Optuna's that only learns from values keep away from such settings.

    Raises:
        ValueError: if `on_failure` is another word, or the value is not finite.
    """

    def __init__(self, on_failure: Literal["continue", "stop"] = "continue", failed_value: float | None = None) -> None:
        if on_failure not in ("continue", "stop"):
            raise ValueError(
                f"on_failure is {on_failure!r}; allowed are continue and stop; change "
                "`hydra.callbacks.results.on_failure`"
            )
        if failed_value is not None and not math.isfinite(failed_value):
            raise ValueError(
                f"failed_value is {failed_value}; allowed are null and finite numbers; change "
                "`hydra.callbacks.results.failed_value`"
            )
        self.on_failure, self.failed_value = on_failure, failed_value
        # Known in the process of the sweep; a launcher sends this object to the processes of the jobs.
        self._directory: Path | None = None
        self._group, self._start, self._owner = "", "", ("", 0)

    def on_multirun_start(self, config: DictConfig, **_: Any) -> None:  # noqa: ANN401
        """Make the sweep's directory, and note the jobs that are known beforehand."""
        _refuse_trainer_without_slurm(config)
        name = sweep_name(config)
        directory = Path(os.path.abspath(config.hydra.sweep.dir)) / f"sweep_{name}"
        self._group = f"{OmegaConf.select(config, 'name', default='unnamed')} {name}"
        self._start = datetime.now().astimezone().isoformat()
        self._directory, self._owner = directory, _process()
        os.environ[SWEPT_KEYS] = ",".join(_swept_keys(config))
        save_plan(directory, _planned(config), self._start)

    def on_job_start(self, config: DictConfig, **_: Any) -> None:  # noqa: ANN401
        """Note that the job began; W&B shows the jobs of a sweep as one group."""
        if self._directory is None:
            return
        self._refuse_shared_directory(config)
        os.environ.setdefault(GROUP, self._group)
        # The sweep's own process comes here too for a job of another one that died, and keeps what that has noted.
        is_known = self._has_failed_here(config) if self._owner != _process() else self._note_of(config) is not None
        if not is_known:
            self._note(config, "running")

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:  # noqa: ANN401
        """Note what became of the job, and give the sweeper something it can go on with."""
        if self._directory is None:
            return
        metric = str(OmegaConf.select(config, "metric"))
        state, reason = _outcome(job_return, metric)
        if job_return.status == JobStatus.FAILED and self._is_task_of_several():
            self._leave_others(config, job_return._return_value, state, reason)
        if state == "died" and (note := self._note_of(config)) and note["state"] in _BAD_ENDS:
            state, reason = note["state"], note["reason"]  # one of its ranks has said why
        self._note(config, state, reason=reason)
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            write_table(table_of_sweep(self._directory), self._directory)
        if state == FINISHED:
            return
        _log.error("Job %s in %s: %s: %s", config.hydra.job.num, config.hydra.runtime.output_dir, state, reason)
        job_return.status, job_return.return_value = JobStatus.COMPLETED, self.failed_value
        if self.on_failure == "stop" and self._owner == _process():
            self._report()
            sys.exit(1)

    def on_multirun_end(self, config: DictConfig, **_: Any) -> None:  # noqa: ANN401
        """Show the table; the status says whether all of its jobs finished."""
        if self._directory is None:
            return
        os.environ.pop(SWEPT_KEYS, None)
        if os.environ.get(GROUP) == self._group:
            del os.environ[GROUP]
        if self._report():
            sys.exit(1)

    def _refuse_shared_directory(self, config: DictConfig) -> None:
        """End the sweep if an earlier job of it has the same directory: this one would go on with that one's run."""
        assert self._directory is not None
        run_dir, words = str(config.hydra.runtime.output_dir), _words(config)
        for other in jobs_of_start(self._directory, self._start):
            if other["run_dir"] == run_dir and other["overrides"] != words and other["number"] < config.hydra.job.num:
                print(
                    f"ldm_train: jobs {other['number']} and {config.hydra.job.num} of this sweep have the same "
                    f"directory, {run_dir}; allowed is one for each; change `run_id`, so that it tells them apart",
                    file=sys.stderr,
                )
                sys.exit(2)

    def _is_task_of_several(self) -> bool:
        """Whether this process is one of a job's that SLURM runs, and not the sweep's own."""
        return self._owner != _process() and int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1

    def _leave_others(self, config: DictConfig, error: Exception, state: str, reason: str) -> NoReturn:
        """End this process as one that failed, with a note of why.

        SLURM ends the other ranks then, which may wait for this one. The first to fail is the reason: those that lose
        the connection to it fail as well. Python's own end may wait for them too.
        """
        traceback.print_exception(error)
        if not self._has_failed_here(config):
            self._write_note(config, state, reason=reason)
        _log.error("Job %s, rank %s: %s", config.hydra.job.num, os.environ.get("SLURM_PROCID"), reason)
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)

    def _has_failed_here(self, config: DictConfig) -> bool:
        """Whether a rank of this very start of the job has noted that it failed."""
        note = self._note_of(config)
        return note is not None and note["state"] in _BAD_ENDS and note["slurm"] == _start_in_slurm() != ""

    def _note_of(self, config: DictConfig) -> dict[str, Any] | None:
        """What was noted last of this job of this sweep."""
        assert self._directory is not None
        found = read_job(self._directory, _words(config))
        is_its_own = found is not None and (found["start"], found["number"]) == (self._start, config.hydra.job.num)
        return found if is_its_own else None

    def _note(self, config: DictConfig, state: str, **more: object) -> None:
        if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
            self._write_note(config, state, **more)

    def _write_note(self, config: DictConfig, state: str, **more: object) -> None:
        assert self._directory is not None
        facts = {
            "run_dir": str(config.hydra.runtime.output_dir),
            "metric": str(OmegaConf.select(config, "metric")),
            "start": self._start,
            "number": config.hydra.job.num,
            "slurm": _start_in_slurm(),
        }
        save_job(self._directory, _words(config), {**facts, "state": state, **more})

    def _report(self) -> bool:
        """Print the table and draw it; whether a job of this start has not finished."""
        assert self._directory is not None
        table = table_of_sweep(self._directory)
        path, picture = write_table(table, self._directory), draw_table(table, self._directory)
        bad = unfinished(table, self._start)
        where = f"{path}" if picture is None else f"{path}, {picture.name}"
        count = "1 job" if len(table.rows) == 1 else f"{len(table.rows)} jobs"
        print(f"\n{shown(table)}\n\n{count}, {len(bad)} of this sweep without a figure: {where}", flush=True)
        return bool(bad)


def sweep_name(config: DictConfig) -> str:
    """What a multirun is called: its option of the group `sweep`, else the keys that are swept."""
    choice = config.hydra.runtime.choices.get("sweep")
    if choice:
        return str(choice)
    return re.sub(r"[^\w.,-]", "_", ",".join(_swept_keys(config)))[:_MOST_CHARACTERS] or "jobs"


def _swept_keys(config: DictConfig) -> list[str]:
    last = {each.get_key_element(): each for each in _overrides(config)}
    return [key.lstrip("+~") for key, each in last.items() if each.is_sweep_override()]


def _process() -> tuple[str, int]:
    """This process among those of all machines."""
    return socket.gethostname(), os.getpid()


def _start_in_slurm() -> str:
    """The job that this process belongs to, and how often it was started again; empty outside of SLURM."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return job and f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}"


def _refuse_trainer_without_slurm(config: DictConfig) -> None:
    """End a sweep whose jobs SLURM would start as processes that know nothing of each other.

    An experiment's trainer wins over the one that `hydra=slurm` chooses.
    """
    choices = config.hydra.runtime.choices
    if choices.get("hydra/launcher") == "submitit_slurm" and not config.trainer.get("plugins"):
        print(
            f"ldm_train: the jobs go to SLURM, and trainer={choices.get('trainer')}, which the experiment may have "
            "chosen, knows nothing of it; allowed are trainers with its plugin; change `trainer=slurm`, with "
            "`trainer.accelerator=cpu` where there is no GPU",
            file=sys.stderr,
        )
        sys.exit(2)


def _words(config: DictConfig) -> list[str]:
    """The overrides as they were written: what they interpolate belongs to each job."""
    words = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
    assert isinstance(words, list)
    return words


def _overrides(config: DictConfig) -> list[Any]:
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    texts = [*(f"{key}={value}" for key, value in params.items()), *_words(config)]
    return OverridesParser.create().parse_overrides(texts)


def _planned(config: DictConfig) -> Sequence[Sequence[str]]:
    """The overrides of every job, in the words of Hydra's own sweeper; other sweepers decide as they go."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    if not str(config.hydra.sweeper._target_).endswith(f".{BasicSweeper.__name__}"):
        return []
    return BasicSweeper.split_arguments(_overrides(config), None)[0]


def _outcome(job_return: JobReturn, metric: str) -> tuple[str, str]:
    if job_return.status == JobStatus.FAILED:
        error = job_return._return_value
        if isinstance(error, JobDiedError):
            return "died", str(error)
        if silence := told_silence(error):
            return "died", silence
        return "failed", str(error) if isinstance(error, JobFailedError) else described(error)
    value = job_return.return_value
    if value is None:
        return "no figure", f"{metric} was never logged; change `metric`"
    if not math.isfinite(value):
        return "no figure", f"{metric} is {value}"
    return FINISHED, ""
