import csv
import os
import socket
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wandb
from PIL import Image

from ldm_train.callbacks import (
    EMACallback,
    MetricsCSV,
    SampleEvaluation,
    ThroughputMonitor,
    finish_wandb,
    leave_wandb,
    wandb_logger,
)
from ldm_train.callbacks.tracking import save_picture, wandb_id
from ldm_train.metrics import RandomConvFeatures
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, trainer_of
from tests.wandb_record import history, record_files, records, run_record


@pytest.fixture(autouse=True)
def _no_account(monkeypatch, tmp_path):
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    yield
    finish_wandb()


def _rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_wandb_s_record_holds_every_figure_and_picture_that_was_logged(tmp_path):
    run_dir = tmp_path / "run"
    loggers = [wandb_logger(str(run_dir), "emoji", "demo", "default", tags=["toy"]), MetricsCSV(str(run_dir))]
    samples = SampleEvaluation(str(run_dir), RandomConvFeatures(), NUM_IMAGES, num_pairs=16)
    callbacks = [ThroughputMonitor(), EMACallback(), samples]
    trainer_of(tmp_path, callbacks, logger=loggers, val_check_interval=3).fit(ToyStage(), ToyData())
    finish_wandb()
    assert wandb.run is None

    (path,) = record_files(run_dir)
    run = run_record(path)
    assert (run.run_id, run.project, run.display_name) == (wandb_id(run_dir), "emoji", "demo default")
    assert list(run.tags) == ["toy"]
    rows = history(path)
    for row in _rows(run_dir / "metrics.csv"):
        figures = {key: float(value) for key, value in row.items() if value and key not in ("step", "epoch")}
        assert figures, row
        match = [r for r in rows if figures.keys() <= r.keys() and r["trainer/global_step"] == int(row["step"])]
        assert len(match) == 1, row
        assert {key: match[0][key] for key in figures} == pytest.approx(figures)
    keys = {key for row in rows for key in row}
    expected = {"loss", "grad_norm", "learning_rate", "images_per_second", "data_wait_share", "images_seen"}
    assert {f"train/{name}" for name in expected} <= keys
    assert {"val/loss", "val/fid_randomconv", "val/retrieval_at_1", "val/retrieval_times_chance"} <= keys
    pictures = [name for row in rows for name in row.get("val/samples/filenames", [])]
    assert len(pictures) == 2
    assert all((path.parent / "files" / name).is_file() for name in pictures)


@pytest.mark.parametrize(
    "secret",
    [
        "data.shards=[https://me:SECRET@h/a.tar]",
        "data.shards=https://h/a?sig=SECRET",
        "+data.storage_options.s3.key=SECRET",
    ],
)
def test_secrets_of_the_command_line_are_not_in_wandb_s_record(tmp_path, monkeypatch, secret):
    monkeypatch.setattr("sys.argv", ["ldm_train", "experiment=demo", secret])
    wandb_logger(str(tmp_path / "run"), "emoji", "demo", "default", offline=True).log_metrics({"loss": 1.0})
    finish_wandb()
    assert record_files(tmp_path / "run")
    written = b"".join(path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file())
    assert b"loss" in written
    assert b"SECRET" not in written


def test_records_longer_than_a_block_are_joined(tmp_path):
    logger = wandb_logger(str(tmp_path), "p", "long", "run")
    texts = [str(i) * size for i, size in enumerate((10, 40_000, 100_000, 32_740, 5))]
    for text in texts:
        logger.experiment.log({"text": text})
    finish_wandb()
    (path,) = record_files(tmp_path)
    assert [row["text"] for row in history(path)] == texts
    assert [record.WhichOneof("record_type") for record in records(path)][-1] == "exit"


def test_a_run_is_offline_without_a_key_and_without_asking_the_network(tmp_path, monkeypatch):
    def no_network(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", no_network)
    assert wandb_logger(str(tmp_path), "p", "n", "r")._wandb_init["mode"] == "offline"


@pytest.mark.parametrize(
    ("environment", "reachable", "offline", "mode"),
    [
        ({"WANDB_API_KEY": "k"}, True, None, "online"),
        ({"WANDB_API_KEY": "k"}, False, None, "offline"),
        ({"WANDB_API_KEY": "k", "WANDB_MODE": "offline"}, True, None, "offline"),
        ({"WANDB_MODE": "disabled"}, False, None, "disabled"),
        ({"WANDB_API_KEY": "k"}, True, True, "offline"),
        ({"WANDB_MODE": "offline"}, False, False, "online"),
    ],
)
def test_the_mode_follows_config_environment_key_and_network(
    tmp_path, monkeypatch, environment, reachable, offline, mode
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("ldm_train.callbacks.tracking._reachable", lambda host, port: reachable)
    assert wandb_logger(str(tmp_path), "p", "n", "r", offline=offline)._wandb_init["mode"] == mode


def test_a_key_in_netrc_counts(tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine api.wandb.ai login user password secret\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setattr("ldm_train.callbacks.tracking._reachable", lambda host, port: host == "api.wandb.ai")
    assert wandb_logger(str(tmp_path), "p", "n", "r")._wandb_init["mode"] == "online"


def test_the_id_follows_from_the_directory_however_it_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert wandb_id("runs/a") == wandb_id(tmp_path / "runs" / "a")
    assert wandb_id("runs/a") != wandb_id("runs/b")
    assert len(wandb_id("runs/a")) == 12


def test_rows_of_a_resumed_run_follow_the_old_ones_and_columns_grow(tmp_path):
    first = MetricsCSV(str(tmp_path / "run"))
    first.log_metrics({"b": 1.0}, step=1)
    first.save()
    first.log_metrics({"b": 2.0, "a": 0.5}, step=2)
    first.save()
    resumed = MetricsCSV(str(tmp_path / "run"))
    resumed.log_metrics({"c": 7.0}, step=3)
    resumed.log_metrics({"a": 8.0}, step=3)
    resumed.finalize("success")
    assert _rows(tmp_path / "run" / "metrics.csv") == [
        {"step": "1", "a": "", "b": "1.0", "c": ""},
        {"step": "2", "a": "0.5", "b": "2.0", "c": ""},
        {"step": "3", "a": "", "b": "", "c": "7.0"},
        {"step": "3", "a": "8.0", "b": "", "c": ""},
    ]


def test_a_row_that_a_kill_cut_short_spoils_no_other(tmp_path):
    logger = MetricsCSV(str(tmp_path))
    logger.log_metrics({"a": 1.0, "b": 2.0}, step=1)
    logger.save()
    path = tmp_path / "metrics.csv"
    path.write_text(path.read_text() + "2,3.")
    for step, metrics in ((2, {"a": 3.0, "b": 4.0}), (3, {"c": 5.0})):
        logger = MetricsCSV(str(tmp_path))
        logger.log_metrics(metrics, step=step)
        logger.save()
    rows = _rows(path)
    assert [row["step"] for row in rows] == ["1", "2", "2", "3"]
    assert rows[2] == {"step": "2", "a": "3.0", "b": "4.0", "c": ""}


def test_a_picture_is_written_as_it_was_drawn(tmp_path):
    pixels = torch.randint(0, 256, (5, 4, 3), dtype=torch.uint8).numpy()
    save_picture(trainer_of(tmp_path, []), Image.fromarray(pixels), tmp_path / "new" / "a.png", "val/a", 3)
    assert (Image.open(tmp_path / "new" / "a.png").tobytes()) == pixels.tobytes()


def test_closing_that_takes_longer_than_there_is_goes_on_alone(monkeypatch, caplog):
    has_time = threading.Event()
    monkeypatch.setattr(wandb, "run", SimpleNamespace(finish=has_time.wait))
    leave_wandb(0.1)
    assert "has not received everything" in caplog.text
    has_time.set()
    for thread in threading.enumerate():
        if thread.name == "leave_wandb":
            thread.join()
    monkeypatch.setattr(wandb, "run", None)


def test_a_run_that_leaves_takes_wandb_s_process_with_it_and_the_next_one_has_its_own(tmp_path):
    for name in ("one", "two"):
        wandb_logger(str(tmp_path / name), "p", "n", name, offline=True).log_metrics({"loss": 1.0}, step=1)
        leave_wandb(60)
        assert not [child for child in commands_of_children() if "wandb-core" in child]
        (path,) = record_files(tmp_path / name, timeout=0)
        assert [row["loss"] for row in history(path)] == [1.0]


def commands_of_children():
    """The commands of this process's children."""
    pids = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return [Path(f"/proc/{pid}/cmdline").read_text() for pid in pids]
