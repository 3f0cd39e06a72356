"""Hydra's launcher of SLURM jobs by submitit, for which a job that dies is one that failed.

Hydra looks for launchers in packages of this name alone. The one it extends waits for its jobs in their order and gives
up at the first that has no result: killed for its memory, cancelled, on a node that broke. The others then run on with
nobody to collect them; and where a cluster keeps no accounts, it waits for a dead job without end. Here every job is
waited for until it has a result, or is over by SLURM's queue. For one without a result Hydra's callbacks are told, as
they are by a job that raises: `ldm_train.multirun` gives it its row.

Named by `hydra.launcher._target_` beside `hydra/launcher=submitit_slurm`. Without submitit there is nothing here.
"""

import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Sequence
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, run_job
from omegaconf import DictConfig, open_dict

from ldm_train.isolation import JobDiedError
from ldm_train.submission import SWEPT_KEYS, Queue

# In the shell of the job's script; `LDM_TASK` is of slurm/again.sh, which `hydra.launcher.setup` reads if it is there.
_PYTHON = """bash -c "${{LDM_TASK:-:}}"'; exec "$@"' task {}"""

if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is not None:
    from hydra_plugins.hydra_submitit_launcher import submitit_launcher
    from hydra_plugins.hydra_submitit_launcher.config import BaseQueueConf

    class SlurmLauncher(submitit_launcher.SlurmLauncher):
        """Submits the jobs of a multirun as one array, and returns something for each."""

        def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
            """Submit and wait.

            Args:
                job_overrides: of each job.
                initial_job_idx: the number of the first.
            """
            self._swept = os.environ.get(SWEPT_KEYS, "")
            numbered = list(enumerate(job_overrides, start=initial_job_idx))
            calls = [
                (list(overrides), "hydra.sweep.dir", number, f"job_{number}", Singleton.get_state())
                for number, overrides in numbered
            ]
            jobs = self._executor().map_array(self, *zip(*calls, strict=True))
            print(f"Submitted {len(jobs)} jobs to SLURM: {', '.join(job.job_id for job in jobs)}", flush=True)
            returns: dict[int, JobReturn] = {}
            queue = Queue()
            while len(returns) < len(jobs):
                for job, (number, overrides) in zip(jobs, numbered, strict=True):
                    found = None if number in returns else self._return_of(job, number, overrides, queue)
                    if found is not None:
                        returns[number] = found
                time.sleep(1)
            return [returns[number] for number, _ in numbered]

        def __call__(self, *arguments: Any) -> JobReturn:  # noqa: ANN401
            """Run a job, in a process of its own: the site may keep the sweep's environment from it."""
            os.environ[SWEPT_KEYS] = self._swept
            return super().__call__(*arguments)

        def _return_of(self, job: Any, number: int, overrides: Sequence[str], queue: Queue) -> JobReturn | None:  # noqa: ANN401
            """What the job returned, or would have returned had it raised and not died; None while it goes on."""
            from submitit.core.utils import FailedJobError, UncompletedJobError

            if job.done():
                try:
                    return job.results()[0]
                except (UncompletedJobError, FailedJobError):
                    state = job.state
            elif (state := queue.ending_of(job.job_id)) is None:
                return None
            ending = f"job {job.job_id} ended without a result as {state}; see {job.paths.stdout}"
            return self._return_of_dead(overrides, number, job.job_id, ending)

        def _executor(self) -> Any:  # noqa: ANN401
            import submitit

            own, general = ("submitit_folder", "max_num_timeout"), BaseQueueConf.__dataclass_fields__
            executor = submitit.AutoExecutor(
                self.params["submitit_folder"],
                cluster=self._EXECUTOR,
                slurm_python=_PYTHON.format(shlex.quote(sys.executable)),
                slurm_max_num_timeout=self.params["max_num_timeout"],
            )
            asked = {key: value for key, value in self.params.items() if key not in own}
            executor.update_parameters(
                **{key if key in general else f"{self._EXECUTOR}_{key}": value for key, value in asked.items()}
            )
            return executor

        def _return_of_dead(self, overrides: Sequence[str], number: int, job_id: str, ending: str) -> JobReturn:
            """What the job would have returned had it raised, its callbacks called here in its place."""

            def dead(cfg: DictConfig) -> None:
                raise JobDiedError(ending)

            assert self.hydra_context is not None
            config = self.hydra_context.config_loader.load_sweep_config(self.config, list(overrides))
            with open_dict(config):
                config.hydra.job.id, config.hydra.job.num = job_id, number
            return run_job(
                dead, config, "hydra.sweep.dir", "hydra.sweep.subdir", self.hydra_context, configure_logging=False
            )
