"""Jobs of several processes in a sweep by SLURM: one that fails ends at once, and its reason is that of the job."""

import os

from lightning.pytorch.utilities import rank_zero_only

from ldm_train.isolation import JobDiedError
from ldm_train.roll_call import _GONE

from .test_sweeps import returned, started, table_rows

__all__ = ["started"]


def fails_in_slurm(started, rank, error, restarts=0, tasks=2):
    """The status of a rank of a job of so many processes that raises in SLURM."""
    (_, job, _), results = started
    if not (child := os.fork()):
        environment = {"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_PROCID": str(rank)}
        os.environ.update(environment | {"SLURM_RESTART_COUNT": str(restarts)})
        rank_zero_only.rank = rank
        job(results, 0, returned(error))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_rank_that_fails_ends_with_status_1_and_the_first_one_s_reason_is_the_job_s(started):
    start, job, directory = started
    results = start()
    assert fails_in_slurm((started, results), 1, ValueError("a mistake")) == 1
    assert fails_in_slurm((started, results), 0, RuntimeError("Connection closed by peer")) == 1
    died = job(results, 0, returned(JobDiedError("job 7 ended without a result as FAILED")))
    row = table_rows(directory)[0]
    assert (row["state"], row["reason"], died.return_value) == ("failed", "ValueError: a mistake", None)


def test_a_rank_that_has_missed_another_one_says_so_in_its_row(started):
    start, job, directory = started
    results, error = start(), RuntimeError("Connection closed by peer")
    error.add_note(f"rank 1 does not answer; {_GONE}\nThe ranks were last heard of so:\n  - rank 0: batch 3")
    assert fails_in_slurm((started, results), 0, error) == 1
    job(results, 0, returned(JobDiedError("job 7 ended without a result as FAILED")))
    row = table_rows(directory)[0]
    assert (row["state"], row["reason"]) == ("died", f"rank 1 does not answer; {_GONE}")


def test_another_start_of_a_job_has_a_reason_of_its_own(started):
    start, job, directory = started
    results = start()
    assert fails_in_slurm((started, results), 1, ValueError("a mistake")) == 1
    assert fails_in_slurm((started, results), 0, ValueError("another"), restarts=1) == 1
    job(results, 0, returned(JobDiedError("job 7 ended without a result as FAILED")))
    assert table_rows(directory)[0]["reason"] == "ValueError: another"


def test_a_job_of_one_process_in_slurm_ends_as_anywhere_else(started):
    start, _, directory = started
    results = start()
    assert fails_in_slurm((started, results), 0, ValueError("a mistake"), tasks=1) == 0
    row = table_rows(directory)[0]
    assert (row["state"], row["reason"]) == ("failed", "ValueError: a mistake")
