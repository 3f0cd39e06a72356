"""A sweep whose jobs SLURM runs ends with a row for each: also for one that raised, and for one that was killed."""

import csv
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.thorough]

ROOT = Path(__file__).parents[2]
RUN = [
    "experiment=demo_autoencoder", "debug=tiny", "logger=csv", "callbacks=none", "trainer.max_steps=2",
    "trainer.val_check_interval=2", "autoencoder.channels=16", "data.limit=16", "data.val_fraction=0.25",
]  # fmt: skip
FOUR = [
    "optimizer.lr=-1,2e-3,3e-3,1e-3", "run_id='rate_${optimizer.lr}'",
    "+callbacks.dies._target_=tests.dying.Dying", "+callbacks.dies.learning_rate=2e-3",
    "trainer=slurm", "trainer.accelerator=cpu", "hydra/launcher=submitit_slurm",
    "hydra.launcher._target_=hydra_plugins.ldm_train_slurm.SlurmLauncher", "hydra.launcher.array_parallelism=2",
    "hydra.launcher.stderr_to_stdout=true",
]  # fmt: skip
TWO_RANKS = [
    "hydra=slurm", "trainer=slurm", "trainer.accelerator=cpu", "trainer.devices=2", "run_id='${hydra:job.num}'",
    "+callbacks.trouble._target_=tests.slurm.trouble.Raises", "+callbacks.trouble.step=1",
    "+callbacks.trouble.rank=1,null,9",
]  # fmt: skip


def start(cluster, root, *overrides):
    """The command, and what it writes to."""
    path = f"{root}:{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    with (root / "said").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "ldm_train", "-m", *overrides, f"paths.root={root}"],
            env=cluster.environment | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def sweep(cluster, root, *overrides):
    """What the command says, and the rows of its table."""
    returned = start(cluster, root, *overrides).wait(300)
    said = (root / "said").read_text()
    assert returned == 1, said[-4000:]
    (table,) = root.glob("*/sweep_*/results.csv")
    with table.open(newline="") as file:
        return said, list(csv.DictReader(file))


def test_a_sweep_of_four_with_one_that_raises_and_one_that_dies_ends_with_four_rows(cluster, tmp_path):
    """On a cluster that keeps no accounts."""
    (tmp_path / "sacct").write_text("#!/bin/sh\necho Slurm accounting storage is disabled >&2\nexit 1\n")
    (tmp_path / "sacct").chmod(0o755)
    said, rows = sweep(cluster, tmp_path, *RUN, *FOUR)
    assert [row["optimizer.lr"] for row in rows] == ["-1", "0.002", "0.003", "0.001"]
    assert [row["state"] for row in rows] == ["failed", "died", "finished", "finished"], said[-4000:]
    assert rows[0]["reason"].startswith("ConfigError: ")
    assert "ended without a result as FAILED" in rows[1]["reason"]
    assert float(rows[2]["val/psnr"]) != float(rows[3]["val/psnr"])
    assert "4 jobs, 2 of this sweep without a figure" in said


def test_a_rank_that_fails_alone_ends_its_job_with_its_reason_and_the_sweep_goes_on(cluster, tmp_path):
    """The others would wait for it until the time-out of the process group, which is ten minutes."""
    said, rows = sweep(cluster, tmp_path, *RUN, *TWO_RANKS)
    assert [row["callbacks.trouble.rank"] for row in rows] == ["1", "null", "9"]
    assert [row["state"] for row in rows] == ["failed", "failed", "finished"], said[-4000:]
    assert [row["reason"] for row in rows[:2]] == ["ValueError: a made-up mistake"] * 2
    assert "3 jobs, 2 of this sweep without a figure" in said
    log = (tmp_path / ".submitit").glob("*_0/*_1_log.out")
    assert "rank 1: ValueError: a made-up mistake" in next(log).read_text()


def test_a_job_is_deaf_to_signals_while_python_is_loading(cluster, tmp_path):
    words = [*RUN, "hydra=slurm", "trainer=slurm", "trainer.accelerator=cpu", "run_id=deaf"]
    command = start(cluster, tmp_path, *words)
    cluster._await(lambda: cluster.run("squeue", "--noheader", "--steps", "--format=%i").count(".0"), 60, "a step runs")
    job = cluster.run("squeue", "--noheader", "--states=RUNNING", "--format=%i").strip()
    time.sleep(0.5)  # the shell that is deaf to them is there, Python is not
    for name in ("USR2", "TERM", "USR1"):
        cluster.run("scancel", f"--signal={name}", job)
    assert command.wait(200) == 0, (tmp_path / "said").read_text()
    assert cluster.facts(job)["Restarts"] == "0"
