"""Sweeps: every job has a row, whatever became of it, and one that fails costs the others nothing."""

import csv
import json
import math
import os
import signal
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optuna
import pytest
from hydra.core.utils import JobReturn, JobStatus
from omegaconf import open_dict

from ldm_train.__main__ import main
from ldm_train.charts import Panel, _round_values, _spelled, panels
from ldm_train.isolation import JobDiedError, JobFailedError, run_in_child
from ldm_train.locking import sole_writer
from ldm_train.multirun import SweepResults
from ldm_train.results import read_result, recorded, shortened
from ldm_train.sweeps import draw_table, table_of_sweep
from tools.collect_sweep import main as collect

from .conftest import composed
from .wandb_record import record_files, run_record

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


@pytest.mark.slow
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
    assert "4 jobs, 3 of this sweep without a figure" in said
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


@pytest.mark.slow
def test_a_study_on_the_disk_grows_and_learns_nothing_from_failed_trials(monkeypatch, capfd, tmp_path):
    """Of two starts the first has one trial, which fails, the second two, recorded by W&B."""
    directory = tmp_path / "demo_autoencoder/sweep_optuna"
    command = [*TINY, "sweep=optuna", "hydra.sweeper.direction=maximize", f"paths.root={tmp_path}"]
    starts = [
        (["resume=/nowhere", "hydra.sweeper.n_trials=1"], 1),
        (["hydra.sweeper.n_trials=2", "logger=default"], 0),
    ]
    monkeypatch.setenv("WANDB_MODE", "offline")
    for overrides, expected in starts:
        status, said = sweep(monkeypatch, capfd, *command, *overrides)
        assert status == expected, said
    storage = f"sqlite:///{directory}/study.db"
    (study,) = optuna.get_all_study_summaries(storage)
    trials = optuna.load_study(study.study_name, storage).trials
    assert [trial.state.name for trial in trials] == ["FAIL", "COMPLETE", "COMPLETE"]
    assert len({trial.params["optimizer.lr"] for trial in trials}) == 3
    rows = table_rows(directory)
    assert [row["state"] for row in rows] == ["failed", "finished", "finished"]
    assert [float(row["val/psnr"]) for row in rows[1:]] == pytest.approx([trial.value for trial in trials[1:]], 1e-5)
    runs = [run_record(record_files(row["run"])[0]) for row in rows[1:]]
    assert [run.run_group for run in runs] == ["demo_autoencoder optuna"] * 2
    assert [run.display_name for run in runs] == [f"demo_autoencoder {Path(row['run']).name}" for row in rows[1:]]
    assert "WANDB_RUN_GROUP" not in os.environ


@pytest.fixture
def started(tmp_path):
    """A sweep of three jobs that has just begun, and what calls it for job `number`, as a launcher does."""

    def start(**options):
        words = ["experiment=demo_autoencoder", "seed=0,1,2", f"paths.root={tmp_path}"]
        cfg = composed(*words[:1], *words[2:], return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.overrides.task = words
        results = SweepResults(**options)
        results.on_multirun_start(cfg)
        return results

    def job(results, number, returned=None, folder="seed_{}"):
        cfg = composed("experiment=demo_autoencoder", return_hydra_config=True)
        with open_dict(cfg):
            cfg.hydra.overrides.task = ["experiment=demo_autoencoder", f"seed={number}", f"paths.root={tmp_path}"]
            cfg.hydra.job.num, cfg.hydra.runtime.output_dir = number, str(tmp_path / folder.format(number))
        results.on_job_start(cfg)
        if returned is not None:
            results.on_job_end(cfg, returned)
        return returned

    return start, job, tmp_path / "demo_autoencoder/sweep_seed"


def returned(value):
    done = JobReturn(status=JobStatus.FAILED if isinstance(value, Exception) else JobStatus.COMPLETED)
    done.return_value = value
    return done


@pytest.mark.parametrize(
    ("value", "state", "reason"),
    [
        (20.5, "finished", ""),
        (math.nan, "no figure", "val/psnr is nan"),
        (math.inf, "no figure", "val/psnr is inf"),
        (None, "no figure", "val/psnr was never logged; change `metric`"),
        (ValueError("two\nlines"), "failed", "ValueError: two lines"),
        (JobFailedError("KeyError: 'x'"), "failed", "KeyError: 'x'"),
        (JobDiedError("killed by SIGKILL"), "died", "killed by SIGKILL"),
    ],
)
def test_a_sweeper_is_told_finite_figures_and_no_others(started, value, state, reason):
    start, job, directory = started
    done = job(start(), 0, returned(value))
    assert done.return_value == (value if state == "finished" else None)
    row, *others = table_rows(directory)
    assert (row["seed"], row["state"], row["reason"]) == ("0", state, reason)
    assert [(other["seed"], other["state"]) for other in others] == [("1", "not started"), ("2", "not started")]
    assert job(start(failed_value=1e9), 0, returned(value)).return_value == (value if state == "finished" else 1e9)


def test_a_sweep_that_is_told_to_stops_at_the_first_failure_and_shows_its_table(started, capsys):
    start, job, _ = started
    results = start(on_failure="stop")
    job(results, 0, returned(1.0))
    with pytest.raises(SystemExit) as stop:
        job(results, 1, returned(ValueError("bad")))
    assert stop.value.code == 1
    assert "3 jobs, 2 of this sweep without a figure" in capsys.readouterr().out


def test_two_jobs_of_a_sweep_with_one_directory_are_refused(started, capsys):
    """The second would find the first one's run, and give its figure."""
    start, job, _ = started
    results = start()
    job(results, 0, returned(1.0), folder="same")
    job(results, 0, returned(1.0), folder="same")
    with pytest.raises(SystemExit):
        job(results, 1, folder="same")
    assert "jobs 0 and 1 of this sweep have the same directory" in capsys.readouterr().err
    job(start(), 1, folder="same")  # another start may


@pytest.mark.parametrize("options", [{"on_failure": "ignore"}, {"failed_value": math.nan}])
def test_a_policy_that_does_not_exist_is_refused(options):
    with pytest.raises(ValueError, match=r"allowed are .*change `hydra\.callbacks\.results\."):
        SweepResults(**options)


def test_a_single_run_has_no_table(tmp_path):
    cfg = composed("experiment=demo_autoencoder", root=tmp_path, return_hydra_config=True)
    results = SweepResults()
    results.on_job_start(cfg)
    done = returned(ValueError("seen by the user"))
    results.on_job_end(cfg, done)
    assert done.status == JobStatus.FAILED
    assert not list(tmp_path.iterdir())


def test_a_run_without_an_end_is_running_while_it_holds_its_lock(started):
    start, job, directory = started
    results, run_dir = start(), directory.parents[1] / "seed_0"
    job(results, 0)
    run_dir.mkdir()

    def states():
        return [row.state for row in table_of_sweep(directory).rows]

    with sole_writer(run_dir / ".lock", "run_id"):  # a lock is a process's: another one looks
        assert run_in_child(lambda: float(states()[0] == "running")) == 1.0
    assert states() == ["not finished", "not started", "not started"]
    with pytest.raises(SystemExit), recorded(run_dir, trainer(3), goes_on=False):
        raise SystemExit(143)
    assert states()[0] == "stopped"
    assert read_result(run_dir).reason == "by SIGTERM; the same command goes on"


def trainer(steps, **figures):
    return SimpleNamespace(is_global_zero=True, global_step=steps, callback_metrics=figures)


def test_the_record_of_a_run_is_read_as_it_was_written_and_grows_with_its_starts(tmp_path):
    def fails():
        with recorded(tmp_path, trainer(2, a=math.nan, b=1.5, c=-math.inf), goes_on=False):
            assert read_result(tmp_path).state == "running"
            raise ValueError("bad")

    with pytest.raises(ValueError, match="bad"):
        fails()
    first = read_result(tmp_path)
    assert (first.state, first.reason, first.steps) == ("failed", "ValueError: bad", 2)
    assert math.isnan(first.figures["a"])
    assert (first.figures["b"], first.figures["c"]) == (1.5, -math.inf)
    json.loads((tmp_path / "result.json").read_text(), parse_constant=pytest.fail)
    with recorded(tmp_path, trainer(5, b=2.5), goes_on=True):
        pass
    second = read_result(tmp_path)
    assert (second.state, second.steps, second.figures["b"], second.figures["c"]) == ("finished", 5, 2.5, -math.inf)
    assert second.seconds >= first.seconds
    with recorded(tmp_path, trainer(1, b=3.5), goes_on=False):
        pass
    assert (read_result(tmp_path).steps, read_result(tmp_path).figures) == (1, {"b": 3.5})


def test_runs_that_were_started_one_by_one_have_a_table(monkeypatch, tmp_path, capsys):
    for name, loss in (("a", 0.5), ("b", 0.25)):
        with recorded(made(tmp_path / name), trainer(7, **{"val/loss": loss}), goes_on=False):
            pass
    (tmp_path / "a/metrics.csv").write_text("step,val/loss,train/loss\n3,0.4,\n7,0.5,2\n")
    command = [str(tmp_path / "a"), str(tmp_path / "b"), "--metric", "val/loss", "--output", str(tmp_path / "table")]
    monkeypatch.setattr(sys, "argv", ["collect_sweep.py", *command])
    assert collect() == 0
    first, second = table_rows(tmp_path / "table")
    assert [first[key] for key in ("run", "state", "val/loss", "train/loss", "min val/loss", "steps")] == [
        str(tmp_path / "a"), "finished", "0.5", "2", "0.4", "7"
    ]  # fmt: skip
    assert second["val/loss"] == "0.25"
    assert (tmp_path / "table/results.png").is_file()
    assert "finished" in capsys.readouterr().out


def made(path):
    path.mkdir()
    return path


def raises():
    raise ValueError("it is so")


def exits():
    raise SystemExit(143)


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (raises, JobFailedError, "ValueError: it is so"),
        (lambda: os._exit(3), JobDiedError, "left Python with status 3"),
        (lambda: os.kill(os.getpid(), signal.SIGTERM), JobDiedError, "killed by SIGTERM"),
        (exits, SystemExit, "143"),
    ],
)
def test_whatever_ends_a_job_its_parent_lives_to_tell(job, error, message, capfd):
    with pytest.raises(error, match=message):
        run_in_child(job)


def test_a_job_returns_its_value_and_hears_the_signals_that_its_parent_gets():
    assert run_in_child(lambda: 2.5) == 2.5
    assert run_in_child(lambda: None) is None

    def listens():
        signal.signal(signal.SIGUSR1, lambda *_: sys.exit(138))
        ready.set()
        signal.pause()

    handler = signal.getsignal(signal.SIGUSR1)
    ready = Flag()
    threading.Thread(target=lambda: (ready.wait(), os.kill(os.getpid(), signal.SIGUSR1))).start()
    with pytest.raises(SystemExit, match="138"):
        run_in_child(listens)
    assert signal.getsignal(signal.SIGUSR1) == handler


class Flag:
    """An event that another process may set."""

    def __init__(self):
        self.read, self.write = os.pipe()

    def set(self):
        os.write(self.write, b"1")

    def wait(self):
        os.read(self.read, 1)


def test_a_chart_puts_larger_figures_higher_and_decades_at_equal_distances():
    chart = np.asarray(panels([Panel("rate", ["1e-4", "1e-3", "1e-2"], [1.0, 3.0, 2.0])], "val/psnr"))
    blue = (chart == (0x1F, 0x5F, 0xBF)).all(-1)
    columns = np.flatnonzero(blue.any(0))
    points = np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1)
    assert len(points) == 3
    across = [float(point.mean()) for point in points]
    assert across[1] - across[0] == pytest.approx(across[2] - across[1], abs=1.5)
    heights = [float(np.flatnonzero(blue[:, point].any(1)).mean()) for point in points]
    assert heights[1] < heights[2] < heights[0]


def test_the_numbers_beside_a_chart_tell_its_lines_apart():
    values = _round_values(0.569563, 0.56957)
    assert len(values) >= 3
    assert [float(text) for text in _spelled(values)] == pytest.approx(values, rel=1e-9)
    assert _spelled([0.2, 0.4]) == ["0.2", "0.4"]


def test_a_job_that_fails_before_its_run_begins_has_no_figures_of_an_earlier_start(started):
    start, job, directory = started
    run_dir = made(directory.parents[1] / "seed_0")
    with recorded(run_dir, trainer(7, **{"val/psnr": 20.0}), goes_on=False):
        pass
    (run_dir / "metrics.csv").write_text("step,val/psnr\n7,20\n")
    os.utime(run_dir / "result.json", (0, 0))
    results = start()
    job(results, 0, returned(ValueError("it is refused")))
    row = table_of_sweep(directory).rows[0]
    assert (row.state, row.steps, row.figures, row.largest) == ("failed", None, {}, None)
    with pytest.raises(ValueError, match="late"), recorded(run_dir, trainer(8, **{"val/psnr": 21.0}), goes_on=False):
        raise ValueError("late")
    table = table_of_sweep(directory)
    assert (table.rows[0].steps, table.rows[0].figures) == (8, {"val/psnr": 21.0})
    assert draw_table(table, directory) is None


def test_a_long_reason_keeps_what_to_change():
    text = "ValueError: " + "found " * 40 + "; allowed is another; change `data.batch_size`"
    for most in (100, 200):
        assert len(shortened(text, most)) <= most
        assert shortened(text, most).endswith("… change `data.batch_size`")
    assert shortened("x" * 200, 100) == "x" * 99 + "…"
