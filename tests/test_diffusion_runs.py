"""Stage 2 as its users meet it: every kind of condition, on small shards of its own, on one process and on two."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from ldm_train.config import load_run
from ldm_train.train import train

from .conftest import composed
from .test_config import names
from .test_end_to_end import last, metrics

NUM_IMAGES = 24
QUICK = ["debug=tiny", "logger=csv", "callbacks.samples=null", "data.val_fraction=0.2", "data.flip=false"]
SAMPLED = [entry for entry in QUICK if entry != "callbacks.samples=null"]
SAMPLED += ["callbacks.samples.num_images=4", "callbacks.samples.num_pairs=2", "callbacks.samples.num_real=4"]
SAMPLED += ["sampler.num_steps=2"]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Images of two halves of different colours, with a caption, a class and a map that says which half is which."""
    path = tmp_path_factory.mktemp("shards") / "00000.tar"
    generator = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(NUM_IMAGES):
            regions = np.zeros((72, 64), np.uint8)
            regions[generator.integers(20, 50) :] = 1
            colours = generator.integers(0, 256, (2, 3), dtype=np.uint8)
            members = {
                "png": _png(colours[regions]),
                "seg.png": _png(regions),
                "txt": f"colours number {number}".encode(),
                "json": json.dumps({"class": number % 3}).encode(),
            }
            for extension, data in members.items():
                entry = tarfile.TarInfo(f"{number:05d}.{extension}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
    return path


def _png(pixels):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


OF_STAGE_2 = sorted(set(names("shapes/tiny")) - {"dreambooth"})  # stage 3 needs a base: see test_dreambooth


@pytest.mark.parametrize(
    "experiment",
    ["ldm_512", *(pytest.param(name, marks=pytest.mark.thorough) for name in OF_STAGE_2 if name != "ldm_512")],
)
def test_every_experiment_runs_for_a_few_steps_and_resumes(experiment, shards, tmp_path):
    overrides = [f"experiment={experiment}", *SAMPLED, f"data.shards={shards}", "++unet.dropout=0.2"]
    train(composed(*overrides, "trainer.max_steps=2", root=tmp_path))
    assert len(list((tmp_path / experiment / "default" / "samples").glob("*.png"))) == 2  # before and after
    train(composed(*overrides, "trainer.max_steps=4", root=tmp_path))
    resumed = last(tmp_path, experiment)
    assert resumed["global_step"] == 4
    assert not any(".encoder." in name or name.startswith("autoencoder.") for name in resumed["state_dict"])
    losses = metrics(tmp_path / experiment / "default")["train/loss"]
    assert all(0.1 < loss < 4.0 for loss in losses.values())  # of noise of variance one, hardly predicted yet
    straight = [*overrides, "run_id=straight", "trainer.max_steps=4", "callbacks.samples=null"]
    train(composed(*straight, root=tmp_path))
    unbroken = last(tmp_path, experiment, "straight")
    for name, value in unbroken["state_dict"].items():
        assert torch.equal(value, resumed["state_dict"][name]), name


def test_a_class_conditional_run_samples_its_classes_and_rebuilds_from_its_checkpoint(shards, tmp_path):
    train(composed("experiment=ldm_class_256", *SAMPLED, f"data.shards={shards}", root=tmp_path))
    run_dir = tmp_path / "ldm_class_256" / "default"
    assert len(list((run_dir / "samples").glob("*.png"))) == 2
    stage, _ = load_run(run_dir / "checkpoints" / "last.ckpt")
    assert stage.conditioner.num_classes == 1000
    saved = last(tmp_path, "ldm_class_256")["ema"]["average"]
    assert torch.equal(stage.conditioner.embedding.weight, saved["conditioner.embedding.weight"])


def test_losses_are_logged_by_quarter_of_the_times(shards, tmp_path):
    overrides = ["experiment=ldm_superres", *QUICK, f"data.shards={shards}", "data.batch_size=16"]
    train(composed(*overrides, "objective=low_discrepancy", root=tmp_path))
    found = metrics(tmp_path / "ldm_superres" / "default")
    quarters = [f"{split}/loss_q{number}" for split in ("train", "val") for number in (1, 2, 3, 4)]
    assert set(quarters[:4]) <= found.keys()  # spread evenly, times reach all of them in every step of 16
    assert any(key in found for key in quarters[4:])
    for step, loss in found["train/loss"].items():
        mean = sum(found[key][step] for key in quarters[:4]) / 4
        assert mean == pytest.approx(loss, rel=0.05)  # four of sixteen each; their errors are all near one


@pytest.mark.distributed
@pytest.mark.parametrize("experiment", ["ldm_class_256", pytest.param("ldm_inpaint", marks=pytest.mark.slow)])
@pytest.mark.thorough
def test_two_processes_lose_what_one_loses_step_by_step(experiment, shards, forked_runs, tmp_path):
    overrides = [f"experiment={experiment}", *QUICK, f"data.shards={shards}", "+optimizer.eps=1e-6", "resume=never"]
    overrides += ["objective=bound_loss_aware", "objective.times.history=1", "schedule.num_steps=8"]
    one = [*overrides, "data.batch_size=8", "run_id=one"]
    two = [*overrides, "data.batch_size=4", "run_id=two", "trainer=ddp", "trainer.devices=2"]
    two += ["trainer.accelerator=cpu"]
    train(composed(*one, root=tmp_path))
    forked_runs.finish(*two, root=tmp_path, ranks=2)
    losses = [metrics(tmp_path / experiment / run_id) for run_id in ("one", "two")]
    assert {"train/loss", "val/loss"} <= losses[0].keys()
    compared = [key for key in losses[0] if "/loss" in key]
    assert compared == [key for key in losses[1] if "/loss" in key]
    for key in compared:
        assert losses[0][key] == pytest.approx(losses[1][key], rel=1e-6, abs=1e-6), key
    ends = [last(tmp_path, experiment, run_id) for run_id in ("one", "two")]
    for one, two in zip(*((end["state_dict"], end["ema"]["average"]) for end in ends), strict=True):
        assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-6
