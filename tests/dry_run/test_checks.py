"""A dry run finds what a run would fail of, all of it at once, and leaves nothing behind."""

import os
import subprocess
import sys
import tempfile
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from ldm_train.__main__ import as_overrides
from ldm_train.callbacks import CheckpointWriter
from ldm_train.dry_run import dry_run, places
from ldm_train.dry_run.checks import checks
from ldm_train.train import train
from tests.callbacks.toy import ToyData, ToyStage, trainer_of
from tests.conftest import composed
from tests.locked import held_elsewhere

ROOT = Path(__file__).parents[2]
DEMO = ["experiment=demo", "debug=tiny", "logger=csv"]


INCEPTION = "callbacks.samples.extractor.inception_weights"
FEW = ["callbacks.samples=null", "sampler.num_steps=2"]


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def found(*overrides, root):
    return {check.name: check for check in checks(composed(*overrides, root=root))}


def until(name, *overrides, root):
    """The check of this name; those that follow are not made."""
    return next(check for check in checks(composed(*overrides, root=root)) if check.name == name)


def states(checked, state):
    return {name for name, check in checked.items() if check.state == state}


@pytest.fixture
def own_temporary_folder(tmp_path, monkeypatch):
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def test_a_run_that_can_start_is_told_so_and_nothing_is_left(tiny_runs, own_temporary_folder, capsys):
    before = files_below(tiny_runs)
    cfg = composed(*DEMO, root=tiny_runs)
    kept = cfg.copy()
    assert dry_run(cfg)
    assert "it can be started" in capsys.readouterr().out
    assert files_below(tiny_runs) == before
    assert not list(own_temporary_folder.iterdir())
    assert cfg == kept


def test_the_size_of_a_checkpoint_is_that_of_the_file(tiny_runs):
    """Of three stages: averaged or not, frozen parts or none, adapters alone."""
    for name in ("demo_autoencoder", "demo", "demo_lora"):
        room = until("room", f"experiment={name}", "debug=tiny", "logger=csv", root=tiny_runs)
        size = (tiny_runs / name / "default/checkpoints/last.ckpt").stat().st_size / 2**20
        told = float(room.figure.partition(" MiB")[0].rpartition(" ")[2])
        assert told == pytest.approx(size, rel=0.1, abs=0.3), name


def test_all_problems_are_told_at_once_each_with_its_remedy(tiny_runs, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    other = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"autoencoder.encoder.weight": torch.zeros(3)}}, other)
    disk = namedtuple("disk", "f_bavail f_frsize f_favail")(10, 4096, 0)
    monkeypatch.setattr(places.os, "statvfs", lambda path: disk)
    checked = found(
        *DEMO,
        "data=webdataset",
        "data.shards=nowhere/*.tar",
        f"data.index_dir={tmp_path}/file/index",
        f"{INCEPTION}={tmp_path}/inception.pth",
        f"stage.denoiser.network.checkpoint={other}",
        root=tiny_runs,
    )
    assert states(checked, "failed") == {"folders", "data", INCEPTION, "network", "two small steps"}
    assert "`data.index_dir`" in checked["folders"].remedy
    assert "paths, globs" in checked["data"].remedy
    assert "tools/fetch_weights.py" in checked[INCEPTION].remedy
    assert INCEPTION in checked[INCEPTION].remedy
    assert "groups `autoencoder`" in checked["network"].remedy
    assert states(checked, "not checked") == {"stage", "room", "SLURM"}
    room = until("room", *DEMO, root=tiny_runs)
    assert room.state == "failed"
    assert "callbacks.checkpoint.keep_every_n_steps" in room.remedy


def test_a_missing_autoencoder_keeps_nothing_else_from_being_looked_at(tmp_path):
    checked = found(*DEMO, *FEW, root=tmp_path)
    assert states(checked, "failed") == {"stage.autoencoder.checkpoint"}
    assert "demo_autoencoder" in checked["stage.autoencoder.checkpoint"].figure
    assert checked["room"].state == "ok"
    assert not list(tmp_path.rglob("*.ckpt"))


def test_a_config_that_is_refused_ends_it(tmp_path, capsys):
    assert not dry_run(composed("experiment=demo", "trainer.precision=16-true", root=tmp_path))
    printed = " ".join(capsys.readouterr().out.split())
    assert "1 of 1 checks failed" in printed
    assert "trainer.precision is '16-true'" in printed


def test_a_run_that_is_being_written_is_told_and_its_lock_is_not_taken(tiny_runs):
    cfg = composed(*DEMO, root=tiny_runs)
    with held_elsewhere(tiny_runs / "demo/default/.lock") as holder:
        check = places.check_free(cfg)
        assert (check.state, check.figure.endswith(f"by process {holder}")) == ("failed", True)
        assert "change `run_id`" in check.remedy
    assert places.check_free(cfg).state == "ok"


def test_a_checkpoint_of_other_data_or_another_recipe_is_refused(tiny_runs):
    resume = until("resume", *DEMO, "optimizer.lr=0.5", root=tiny_runs)
    assert resume.state == "failed"
    assert "stage.optimizer.lr" in resume.figure
    data = until("data of the checkpoint", *DEMO, "data.limit=100", root=tiny_runs)
    assert data.state == "failed"
    assert "data.limit" in data.remedy
    assert until("data of the checkpoint", *DEMO, root=tiny_runs).state == "ok"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"keep_every_n_steps": 2},
        {"keep_every_images": 8},
        {"keep_every_n_steps": 5, "keep_every_images": 8},
        {"keep_every_n_steps": 4, "best_metric": "train/loss"},
    ],
)
def test_what_is_kept_is_counted_as_it_is_kept(tmp_path, options):
    """Names of one file count once in truth, and may count twice in what is asked for."""
    writer = CheckpointWriter(str(tmp_path), every_n_steps=1, **options)
    trainer_of(tmp_path, [writer], limit_val_batches=1, enable_checkpointing=True).fit(ToyStage(), ToyData())
    files = {path.stat().st_ino for path in tmp_path.glob("*.ckpt")}
    given = [f"callbacks.checkpoint.{key}={value}" for key, value in options.items()]
    cfg = composed("experiment=demo", *given, "trainer.max_steps=6", "data.batch_size=4")
    counted = places.num_kept(cfg, cfg.callbacks.checkpoint)
    assert len(files) <= counted <= len(files) + 2


def test_a_job_needs_a_task_for_each_process(monkeypatch, tmp_path):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    for tasks, state in ((8, "ok"), (2, "failed")):
        monkeypatch.setenv("SLURM_NTASKS", str(tasks))
        cfg = composed("experiment=demo", "trainer=slurm", "trainer.devices=4", "trainer.num_nodes=2", root=tmp_path)
        assert places.check_slurm(cfg).state == state


@pytest.mark.slow
def test_the_flag_is_the_key_and_leaves_no_file_of_hydra(tmp_path):
    assert as_overrides(["x", "--dry-run", "a=b"]) == ["x", "dry_run=true", "a=b"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    environment.pop("LDM_RUNS", None)
    (tmp_path / "temporary").mkdir()
    command = [sys.executable, "-m", "ldm_train", "experiment=demo", "trainer.precision=16-true", "--dry-run"]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1, ended.stderr
    assert "change `trainer.precision`" in " ".join(ended.stdout.replace("│", " ").split())
    assert [path.name for path in tmp_path.rglob("*")] == ["temporary"]


@pytest.mark.slow
def test_what_a_dry_run_passes_can_be_trained(tiny_runs, tmp_path):
    own = [*DEMO, f"stage.autoencoder.checkpoint={tiny_runs}/demo_autoencoder/default/checkpoints/last.ckpt"]
    options = ["sampler.num_steps=2", "callbacks.samples=null", "trainer.max_steps=2"]
    assert not states(found(*own, *options, root=tmp_path), "failed")
    train(composed(*own, *options, root=tmp_path))


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_several_jobs_are_not_started_to_be_checked(flag):
    assert as_overrides(["x", flag, "a=1,2"]) == ["x", flag, "a=1,2"]
    with pytest.raises(SystemExit, match=rf"several jobs \({flag}\); allowed is one job"):
        as_overrides(["x", flag, "a=1,2", "--dry-run"])
