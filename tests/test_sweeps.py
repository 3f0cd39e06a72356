"""Sweeps: every job has a row, whatever became of it, and one that fails costs the others nothing."""

import csv
import math
import sys

from ldm_train.__main__ import main

TINY = [
    "experiment=demo_autoencoder", "debug=tiny", "logger=csv", "callbacks=none", "trainer.max_steps=2",
    "trainer.val_check_interval=2", "autoencoder.channels=16", "data.limit=16", "data.val_fraction=0.25",
    "run_id='${optimizer.lr}'",
]  # fmt: skip


def sweep(monkeypatch, capfd, *overrides):
    """A multirun by the command line's function, in this process: its exit status and what it said."""
    monkeypatch.setattr(sys, "argv", ["ldm_train", "-m", *overrides])
    monkeypatch.delenv("WANDB_RUN_GROUP", raising=False)
    status = 0
    try:
        main()
    except SystemExit as stop:
        status = stop.code
    return status, "".join(capfd.readouterr())


def table_rows(directory):
    with (directory / "results.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def test_a_job_that_raises_and_one_that_dies_cost_the_others_nothing(monkeypatch, capfd, tmp_path):
    """The first job is refused, the second is killed in its second step, the third's loss becomes NaN."""
    dies = ["+callbacks.dies._target_=tests.dying.Dying", "+callbacks.dies.learning_rate=2e-3"]
    jobs = [*TINY, "optimizer.lr=-1,2e-3,1e30,1e-3", f"paths.root={tmp_path}", *dies]
    status, said = sweep(monkeypatch, capfd, *jobs)
    assert status == 1, said
    rows = table_rows(tmp_path / "demo_autoencoder/sweep_optimizer.lr")
    assert [row["optimizer.lr"] for row in rows] == ["-1", "0.002", "1e+30", "0.001"]
    assert [row["state"] for row in rows] == ["failed", "died", "failed", "finished"]
    assert [row["reason"].split(":")[0] for row in rows[:3]] == [
        "ConfigError", "killed by SIGKILL (as the kernel does when memory runs out)", "NonFiniteLossError"
    ]  # fmt: skip
    assert math.isfinite(float(rows[3]["val/psnr"]))
    assert rows[3]["steps"] == "2"
    assert "4 jobs, 3 of this sweep not finished" in said
    # Once more, of two: the one that finished has its figure without a step more, the other goes on to its end.
    status, said = sweep(monkeypatch, capfd, *jobs[:-2], "optimizer.lr=2e-3,1e-3")
    assert status == 0, said
    again = {row["optimizer.lr"]: row for row in table_rows(tmp_path / "demo_autoencoder/sweep_optimizer.lr")}
    assert [again[lr]["state"] for lr in ("-1", "0.002", "1e+30", "0.001")] == [
        "failed",
        "finished",
        "failed",
        "finished",
    ]
    assert again["0.001"]["val/psnr"] == rows[3]["val/psnr"]
