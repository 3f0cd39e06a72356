"""A sweep whose jobs SLURM runs ends with a row for each: also for one that raised, and for one that was killed."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("submitit")
pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.thorough]

ROOT = Path(__file__).parents[2]
SWEEP = [
    "experiment=demo_autoencoder", "debug=tiny", "logger=csv", "callbacks=none", "trainer.max_steps=2",
    "trainer.val_check_interval=2", "autoencoder.channels=16", "data.limit=16", "data.val_fraction=0.25",
    "optimizer.lr=-1,2e-3,3e-3,1e-3", "run_id='rate_${optimizer.lr}'",
    "+callbacks.dies._target_=tests.dying.Dying", "+callbacks.dies.learning_rate=2e-3",
    "hydra/launcher=submitit_slurm", "hydra.launcher._target_=hydra_plugins.ldm_train_slurm.SlurmLauncher",
    "hydra.launcher.array_parallelism=2", "hydra.launcher.stderr_to_stdout=true",
]  # fmt: skip


def test_a_sweep_of_four_with_one_that_raises_and_one_that_dies_ends_with_four_rows(cluster, tmp_path):
    path = f"{Path(sys.executable).parent}:{cluster.environment['PATH']}"
    done = subprocess.run(
        [sys.executable, "-m", "ldm_train", "-m", *SWEEP, f"paths.root={tmp_path}"],
        env=cluster.environment | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 1, done.stdout[-4000:]
    with (tmp_path / "demo_autoencoder/sweep_optimizer.lr/results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optimizer.lr"] for row in rows] == ["-1", "0.002", "0.003", "0.001"]
    assert [row["state"] for row in rows] == ["failed", "died", "finished", "finished"], done.stdout[-4000:]
    assert rows[0]["reason"].startswith("ConfigError: ")
    assert "ended without a result as FAILED" in rows[1]["reason"]
    assert float(rows[2]["val/psnr"]) != float(rows[3]["val/psnr"])
    assert "4 jobs, 2 of this sweep without a figure" in done.stdout
    print(done.stdout[-2500:])
