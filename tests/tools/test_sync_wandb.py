"""Runs recorded without a network become runs of a server: in order, whole, each row once."""

import shutil

import pytest
import sync_wandb
import wandb_records
from PIL import Image

from ldm_train.callbacks import finish_wandb, wandb_logger
from ldm_train.callbacks.tracking import wandb_id
from tests.tools.wandb_server import wandb_server
from tests.wandb_record import history, record_files, records


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    """A run of two starts: steps 1 to 3, and, as after a kill, 3 to 5 again."""
    root = tmp_path_factory.mktemp("runs")
    run_dir = root / "demo" / "default"
    for number, (first, last) in enumerate(((1, 4), (3, 6))):
        logger = wandb_logger(str(run_dir), "emoji", "demo", "default", offline=True)
        for step in range(first, last):
            logger.log_metrics({"train/loss": 1 / step}, step=step)
        logger.log_image("val/samples", [Image.new("RGB", (8, 8), (number, 0, 0))], step=last)
        finish_wandb()
        record_files(run_dir)
        (folder,) = (path for path in run_dir.glob("wandb/offline-run-2*") if "_start" not in path.name)
        folder.rename(folder.with_name(f"offline-run-20260101_00000{number}_start-{wandb_id(run_dir)}"))
    return root


@pytest.fixture
def runs(recorded, tmp_path):
    """A copy of its own."""
    shutil.copytree(recorded, tmp_path / "runs", symlinks=True)
    return tmp_path / "runs"


@pytest.fixture
def server(monkeypatch):
    with wandb_server() as found:
        monkeypatch.setenv("WANDB_BASE_URL", found.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        yield found


def only(server):
    (run,) = server.runs.values()
    return run


def trained_steps(run):
    return [row["trainer/global_step"] for row in run.rows if "train/loss" in row]


def test_the_starts_of_a_run_become_one_run_whose_rows_are_counted_on(runs, server, capsys):
    assert sync_wandb.main([str(runs)]) == 0
    run = only(server)
    assert trained_steps(run) == [1, 2, 3, 3, 4, 5]
    assert [row["_step"] for row in run.rows] == list(range(8))
    assert (run.project, run.display_name) == ("emoji", "demo default")
    assert f"{server.url}/me/emoji/runs/{run.name}" in capsys.readouterr().out
    pictures = {row["val/samples"]["filenames"][0] for row in run.rows if "val/samples" in row}
    assert len(pictures) == 2
    for picture in pictures:
        (file,) = runs.rglob(f"offline-run-*/files/{picture}")
        assert server.files[picture] == file.read_bytes()
    assert sync_wandb.main([str(runs)]) == 0
    assert len(run.rows) == 8


def test_what_is_lost_on_the_way_is_sent_the_next_time_and_once(runs, server, capsys):
    server.streams_to_answer = 1
    assert sync_wandb.main([str(runs)]) == 1
    sent = len(list(runs.rglob("*.synced")))
    assert sent < 2
    assert "Fatal error" in capsys.readouterr().out
    server.streams_to_answer = float("inf")
    assert sync_wandb.main([str(runs)]) == 0
    assert trained_steps(only(server)) == [1, 2, 3, 3, 4, 5]
    assert len(list(runs.rglob("*.synced"))) == 2


def test_rows_that_have_arrived_are_not_sent_again(runs, server):
    """As when the answer to what arrived is lost."""
    assert sync_wandb.main([str(runs)]) == 0
    for marker in runs.rglob("*.synced"):
        marker.unlink()
    assert sync_wandb.main([str(runs)]) == 0
    assert trained_steps(only(server)) == [1, 2, 3, 3, 4, 5]


def test_a_start_that_was_killed_is_sent_as_far_as_it_is_whole(runs, server):
    _, second = sorted(runs.rglob("*.wandb"))
    second.write_bytes(second.read_bytes()[:-30])
    assert not any(record.HasField("exit") for record in records(second))
    assert sync_wandb.main([str(runs)]) == 0
    assert trained_steps(only(server))[:5] == [1, 2, 3, 3, 4]


def test_a_dry_run_lists_and_sends_nothing(runs, server, capsys):
    assert sync_wandb.main([str(runs), "--dry-run"]) == 0
    assert server.runs == {}
    assert "of 2 starts 2 to be sent" in capsys.readouterr().out
    assert not list(runs.rglob("*.synced"))


def test_a_run_that_is_being_written_waits(runs, server, monkeypatch, capsys):
    monkeypatch.setattr(sync_wandb, "holder_of", lambda path: 17)
    assert sync_wandb.main([str(runs)]) == 0
    assert server.runs == {}
    assert "is being written" in capsys.readouterr().out


def test_a_server_that_is_not_there_costs_nothing(runs, monkeypatch, capsys):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    assert sync_wandb.main([str(runs)]) == 1
    assert "does not tell what it has" in capsys.readouterr().out
    assert not list(runs.rglob("*.synced"))


def test_a_folder_that_is_not_there_is_named(tmp_path, capsys):
    assert sync_wandb.main([str(tmp_path / "nowhere")]) == 2
    assert "allowed are folders of runs" in capsys.readouterr().err


def test_without_a_key_nothing_is_tried(runs, monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    assert sync_wandb.main([str(runs)]) == 2
    assert "WANDB_API_KEY" in capsys.readouterr().err


def test_a_record_file_that_is_written_again_is_the_same(runs, tmp_path):
    path = next(runs.rglob("*.wandb"))
    again = tmp_path / "again.wandb"
    wandb_records.write_records(again, wandb_records.read_records(path))
    assert [record.SerializeToString() for record in records(again)] == [r.SerializeToString() for r in records(path)]
    moved = tmp_path / "moved.wandb"
    wandb_records.write_records(moved, wandb_records.shifted(wandb_records.read_records(path), 10))
    assert [row["_step"] for row in history(moved)] == [row["_step"] + 10 for row in history(path)]


@pytest.mark.parametrize("size", [1, 32741 - 10, 32741, 32742, 70_000])
def test_records_of_any_length_survive(tmp_path, size):
    """Around the length of a block, and of several."""
    record = wandb_records.Record()
    record.history.item.add(key="text", value_json='"' + "x" * size + '"')
    wandb_records.write_records(tmp_path / "a.wandb", [record] * 3)
    assert list(wandb_records.read_records(tmp_path / "a.wandb")) == [record] * 3
    assert list(records(tmp_path / "a.wandb")) == [record] * 3
