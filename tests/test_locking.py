"""A directory has one writer, whoever asks second is told who has it, and no lock outlives its holder."""

import errno
import fcntl
import os
import signal
import time

import pytest

from ldm_train.locking import LockHeldError, sole_writer


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Another process that holds the lock, as job 17, with a child of its own that outlives it."""
    ready, told = os.pipe()
    if not (pid := os.fork()):
        os.environ["SLURM_JOB_ID"] = "17"
        os.environ.pop("SLURM_RESTART_COUNT", None)
        with sole_writer(tmp_path / "lock", "run_id"):
            if not os.fork():
                time.sleep(20)
                os._exit(0)
            os.write(told, b"1")
            time.sleep(20)
        os._exit(0)
    os.read(ready, 1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_the_second_is_refused_and_told_who_is_there(tmp_path, holder, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    message = rf"written by process {holder} on \S+, job 17; allowed is one run .*change `run_id`"
    with pytest.raises(LockHeldError, match=message), sole_writer(tmp_path / "lock", "run_id", patience=0.3):
        pass


def test_the_lock_ends_with_its_holder_though_a_child_of_it_lives(tmp_path, holder):
    os.kill(holder, signal.SIGKILL)
    with sole_writer(tmp_path / "lock", "run_id", patience=5):
        pass


def test_a_requeued_job_is_not_kept_out_by_its_own_first_start(tmp_path, holder, monkeypatch, caplog):
    """On a node that went down the lock may outlive the job by minutes."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    with sole_writer(tmp_path / "lock", "run_id", patience=0.3):
        assert "still locked by this job's earlier start" in caplog.text


def test_a_second_run_in_the_same_start_of_a_job_is_refused(tmp_path, holder, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    with pytest.raises(LockHeldError, match="job 17"), sole_writer(tmp_path / "lock", "run_id", patience=0.3):
        pass


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def lockf(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with sole_writer(tmp_path / "lock", "run_id"):
        assert "start no second run of the same `run_id`" in caplog.text
