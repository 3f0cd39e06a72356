"""The platform as its users meet it: stages that feed one another, interruptions, several processes, sweeps."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from ldm_train.callbacks import LatentCalibration
from ldm_train.checkpoint import read_checkpoint
from ldm_train.config import ConfigError, load_run
from ldm_train.train import train

from .conftest import TINY_RUNS, composed
from .wandb_record import history, record_files

TINY_DEMO = ["experiment=demo", "debug=tiny", "callbacks.samples=null", "sampler.num_steps=2"]


def first_stage(runs):
    return f"stage.autoencoder.checkpoint={runs / 'demo_autoencoder/default/checkpoints/last.ckpt'}"


def last(root, name="demo", run_id="default"):
    return read_checkpoint(root / name / run_id / "checkpoints" / "last.ckpt")


def metrics(run_dir):
    """Key -> {step: value} of a run's metrics.csv."""
    lines = (run_dir / "metrics.csv").read_text().splitlines()
    header, found = lines[0].split(","), {}
    for line in lines[1:]:
        row = dict(zip(header, line.split(","), strict=True))
        for key, value in row.items():
            if value and key not in ("step", "epoch"):
                found.setdefault(key, {})[int(float(row["step"]))] = float(value)
    return found


def equal(a, b):
    """Whether two checkpoints' values are the same bit for bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def test_every_stage_leaves_pictures_figures_and_a_checkpoint(tiny_runs):
    pictures = {
        "demo_autoencoder": "reconstructions/*.png",
        "demo": "samples/*.png",
        "demo_lora": "lora/before_after.png",
    }
    for name, pattern in pictures.items():
        run_dir = tiny_runs / name / "default"
        found = list(run_dir.glob(pattern))
        assert found, name
        assert min(Image.open(found[0]).size) > 100
        assert (run_dir / "metrics.csv").is_file()
        assert last(tiny_runs, name)["global_step"] == 4


def test_the_autoencoder_s_checkpoint_is_calibrated(tiny_runs):
    stage, _ = load_run(tiny_runs / "demo_autoencoder/default/checkpoints/last.ckpt")
    assert stage.autoencoder.is_calibrated


def test_a_stage_is_rebuilt_from_one_file_with_its_averaged_weights(tiny_runs):
    path = tiny_runs / "demo/default/checkpoints/last.ckpt"
    stage, cfg = load_run(path)
    checkpoint = read_checkpoint(path)
    assert cfg.name == "demo"
    average = checkpoint["ema"]["average"]
    parameters = dict(stage.named_parameters())
    assert all(torch.equal(parameters[name], value) for name, value in average.items())
    assert any(not torch.equal(value, checkpoint["state_dict"][name]) for name, value in average.items())
    assert not any(name.startswith("autoencoder.") for name in checkpoint["state_dict"])


def test_a_moved_directory_of_runs_finds_its_own_stages(tiny_runs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(tiny_runs, moved)
    _, cfg = load_run(moved / "demo_lora/default/checkpoints/last.ckpt")
    assert cfg.stage.base_checkpoint == str(moved / "demo/default/checkpoints/last.ckpt")
    assert cfg.stage.autoencoder.checkpoint == str(moved / "demo_autoencoder/default/checkpoints/last.ckpt")


def test_adapters_are_saved_alone(tiny_runs):
    checkpoint = last(tiny_runs, "demo_lora")
    assert all(name.endswith((".up", ".down")) for name in checkpoint["state_dict"])
    assert (tiny_runs / "demo_lora/default/lora/adapters.safetensors").stat().st_size < 1_000_000


def test_validating_a_checkpoint_gives_the_figures_it_was_saved_with(tiny_runs, tmp_path):
    checkpoint = tiny_runs / "demo/default/checkpoints/last.ckpt"
    cfg = composed(
        "experiment=demo", "debug=tiny", *TINY_RUNS["demo"], "logger=csv", "task=validate", "run_id=again",
        f"resume={checkpoint}", first_stage(tiny_runs), root=tmp_path,
    )  # fmt: skip
    value = train(cfg)
    trained, again = metrics(tiny_runs / "demo/default"), metrics(tmp_path / "demo/again")
    assert value == pytest.approx(list(trained["val/loss"].values())[-1], rel=1e-5)
    for key in ("val/fid_randomconv", "val/retrieval_at_1"):
        assert again[key][4] == pytest.approx(trained[key][4], rel=1e-4), key


def test_an_interrupted_run_ends_bit_equal_to_an_unbroken_one(tiny_runs, tmp_path):
    """Stop at step 3 of 6, run the same command again: weights, averages, optimizer and data position are the same."""

    def run(run_id, max_steps, total):
        train(
            composed(
                *TINY_DEMO,
                first_stage(tiny_runs),
                "logger=csv",
                f"run_id={run_id}",
                f"trainer.max_steps={max_steps}",
                f"lr_scheduler.total_steps={total}",
                root=tmp_path,
            )
        )
        return last(tmp_path, run_id=run_id)

    unbroken = run("unbroken", 6, 6)
    run("broken", 3, 6)
    resumed = run("broken", 6, 6)
    assert resumed["global_step"] == unbroken["global_step"] == 6
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert equal(resumed[part], unbroken[part]), part
    assert resumed["ImageTextDataModule"] == unbroken["ImageTextDataModule"]


class Power(Exception):  # noqa: N818
    """What stops a run from outside."""


def test_a_run_stopped_in_its_closing_work_does_that_work_again(tiny_runs, tmp_path, monkeypatch):
    """Calibration comes after the last step: a run stopped there must not take itself for complete."""
    overrides = ["experiment=demo_autoencoder", "debug=tiny", "logger=csv", "callbacks.reconstructions=null",
                 "callbacks.checkpoint.every_n_steps=2", "callbacks.calibration.num_images=8"]  # fmt: skip

    def fail(*_):
        raise Power

    with monkeypatch.context() as broken:
        broken.setattr(LatentCalibration, "on_train_end", fail)
        with pytest.raises(Power):
            train(composed(*overrides, root=tmp_path))
    assert last(tmp_path, "demo_autoencoder")["global_step"] == 3
    train(composed(*overrides, root=tmp_path))
    stage, _ = load_run(tmp_path / "demo_autoencoder/default/checkpoints/last.ckpt")
    assert last(tmp_path, "demo_autoencoder")["global_step"] == 4
    assert stage.autoencoder.is_calibrated


def test_a_run_is_one_recipe(tiny_runs, tmp_path):
    shutil.copytree(tiny_runs / "demo", tmp_path / "demo")
    overrides = [*TINY_DEMO, first_stage(tiny_runs), "logger=csv", "trainer.max_steps=6"]
    with pytest.raises(ConfigError, match=r"(?s)stage.denoiser.prediction: 'v' -> 'x_0'.*`run_id=...`"):
        train(composed(*overrides, "stage.denoiser.prediction=x_0", root=tmp_path))
    train(composed(*overrides, "guidance.scale=7", "sampler.num_steps=3", root=tmp_path))
    assert last(tmp_path)["global_step"] == 6


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_with_the_same_steps_and_every_metric_in_its_record(
    tiny_runs, forked_runs, tmp_path
):
    """SIGKILL in the middle of stage 2, then the same command again."""
    overrides = [
        "experiment=demo", "debug=tiny", *TINY_RUNS["demo"], "data.batch_size=16", "trainer.max_steps=30",
        "callbacks.checkpoint.every_n_steps=4", first_stage(tiny_runs),
    ]  # fmt: skip
    checkpoint = tmp_path / "demo/default/checkpoints/last.ckpt"
    forked_runs.start(*overrides, root=tmp_path)
    while not checkpoint.exists() and forked_runs.is_running:
        time.sleep(0.01)
    forked_runs.kill()
    forked_runs.wait()
    stopped = read_checkpoint(checkpoint)["global_step"]
    assert 4 <= stopped < 30
    output = forked_runs.finish(*overrides, root=tmp_path)
    assert f"Resuming from step {stopped}" in output
    assert last(tmp_path)["global_step"] == 30
    logged = metrics(tmp_path / "demo/default")["train/loss"]
    assert max(logged) - min(logged) + 1 == len(logged) >= 29, "a step was trained and not logged"
    rows = [row for path in record_files(tmp_path / "demo/default") for row in history(path)]
    seen = {key.removesuffix("/_type") for row in rows for key in row}  # a picture is recorded by its parts
    assert {
        "train/loss", "train/learning_rate", "train/images_per_second", "train/data_wait_share", "train/grad_norm",
        "val/loss", "val/samples", "val/fid_randomconv", "val/retrieval_at_1",
    } <= seen  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_two_processes_end_with_the_weights_of_one_with_the_same_global_batch(tiny_runs, tmp_path):
    shared = [*TINY_DEMO, first_stage(tiny_runs), "logger=csv", "trainer.max_steps=5", "trainer.val_check_interval=5"]
    train(composed(*shared, "data.batch_size=8", "run_id=one", root=tmp_path))
    ddp = ["trainer=ddp", "trainer.devices=2", "data.batch_size=4", "run_id=two", "callbacks.throughput=null",
           "+callbacks.waiting._target_=tests.waiting.NoBarrier"]  # fmt: skip
    run = subprocess.run(  # as a shell starts it; Lightning starts the second process
        [sys.executable, "-m", "ldm_train", *shared, *ddp, f"paths.root={tmp_path}"],
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=240, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    one, two = last(tmp_path, run_id="one"), last(tmp_path, run_id="two")
    assert one["ImageTextDataModule"] == two["ImageTextDataModule"] | {"global_batch_size": 8}
    worst = max(float((one["state_dict"][k] - two["state_dict"][k]).abs().max()) for k in one["state_dict"])
    assert worst < 1e-5


@pytest.mark.slow
def test_a_multirun_validates_one_model_under_several_guidance_scales(tiny_runs, forked_runs, tmp_path):
    checkpoint = tiny_runs / "demo/default/checkpoints/last.ckpt"
    forked_runs.finish(
        "-m", "experiment=demo", "sweep=guidance_scale", "debug=tiny", *TINY_RUNS["demo"], "logger=csv",
        f"resume={checkpoint}", first_stage(tiny_runs), "guidance.scale=1,3", root=tmp_path,
    )  # fmt: skip
    runs = [tmp_path / "demo" / f"guidance_scale_{scale}" for scale in (1, 3)]
    figures = [metrics(run) for run in runs]
    assert figures[0]["val/loss"] == figures[1]["val/loss"], "the loss knows no guidance"
    assert figures[0]["val/fid_randomconv"] != figures[1]["val/fid_randomconv"]


def test_a_multirun_that_would_start_processes_itself_is_refused(forked_runs, tmp_path):
    ddp = ["trainer=ddp", "trainer.devices=2"]
    forked_runs.start("-m", "experiment=demo_autoencoder", "seed=0,1", *ddp, root=tmp_path)
    codes, _ = forked_runs.wait()
    output = forked_runs.said()
    assert codes != [0]
    assert "each process that Lightning starts would run the whole sweep" in output
    assert "change `trainer.devices`" in output


def test_the_checkpoint_holds_its_config_and_no_object(tiny_runs):
    config = last(tiny_runs)["config"]
    assert json.loads(json.dumps(config)) == config
    assert config["stage"]["denoiser"]["prediction"] == "v"
    assert Path(config["paths"]["run_dir"]).is_absolute()
