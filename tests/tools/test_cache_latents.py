"""`tools/cache_latents.py`: training on what it writes is training on the images."""

import filecmp
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import cache_latents
import lightning as L
import pytest
import torch

from ldm_train.data import ImageTextDataModule, LatentCache, ShardReadError, latent_encoding
from ldm_train.stages import CachedMoments
from tests.data.conftest import sample, write_tar
from tests.data.faulty_server import serving
from tests.interchange.networks import SMALL, random_autoencoder
from tests.stages.toy import latent_diffusion

SIZE = 16


def autoencoder(is_other=False, scale=1.0):
    torch.manual_seed(0)
    model = random_autoencoder(SMALL)
    with torch.no_grad():
        if is_other:
            model.encoder.conv_in.weight.copy_(model.encoder.conv_in.weight.flip(0))
        model.to_moments.weight *= scale
    model.calibrate(torch.zeros(4), torch.ones(4))
    return model


def checkpoint(path, **changes):
    state = {f"autoencoder.{name}": value for name, value in autoencoder(**changes).state_dict().items()}
    torch.save({"state_dict": state, "config": {"autoencoder": SMALL}}, path)
    return path


@pytest.fixture
def source(tmp_path):
    """Four shards of images, one of which is damaged."""
    number = 0
    for shard, count in enumerate((4, 5, 3, 4)):
        members = [sample(number + i) for i in range(count)]
        if shard == 1:
            members[2][0] = (members[2][0][0], b"no image")
        write_tar(tmp_path / f"shards/{shard:05d}.tar", [member for group in members for member in group])
        number += count
    return tmp_path / "shards" / "*.tar"


def arguments(source, output, *options, model=None):
    model = model or checkpoint(output.parent / "autoencoder.ckpt")
    fixed = ["--data", source, "--image-size", SIZE, "--device", "cpu", "--workers", 0, "--batch-size", 2]
    return [str(part) for part in ("--checkpoint", model, "--output", output, *fixed, *options)]


def run(*given, **named):
    return cache_latents.main(arguments(*given, **named))


class Losses(L.Callback):
    def __init__(self, folder=None):
        self.found, self.folder = [], folder

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.found.append((tuple(batch["sample_id"].tolist()), float(outputs["loss"])))
        if self.folder is not None:
            trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def losses(
    shards, steps=9, resume=None, folder=None, latents=None, size=SIZE, precision="32-true", parts=None, **options
):
    data = ImageTextDataModule(str(shards), size, 3, seed=5, max_bad_fraction=1.0, latents=latents, **options)
    moments = {} if latents is None else {"moments": CachedMoments()}
    stage = latent_diffusion(autoencoder=autoencoder(), **moments, **({} if parts is None else parts()))
    stage.check_data(data.latent_facts)
    watch = Losses(folder)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    options["precision"] = precision
    trainer = L.Trainer(max_steps=steps, limit_val_batches=0, enable_model_summary=False, callbacks=[watch], **options)
    trainer.fit(stage, datamodule=data, ckpt_path=resume, weights_only=True)
    return watch.found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float16", 1e-3)])
def test_training_from_the_cache_is_training_from_the_images(source, tmp_path, dtype, tolerance):
    """The same samples, noise and substitutes, over two epochs, mirrored images and a damaged one included."""
    assert run(source, tmp_path / "latents", "--dtype", dtype, "--flip") == 0
    images = losses(source, flip=True)
    latents = losses(tmp_path / "latents" / "*.tar", flip=True, latents=LatentCache())
    assert difference(images, latents) < tolerance


def difference(images, latents):
    """The largest relative difference of a step's loss of two runs that see the same samples."""
    assert [ids for ids, _ in images] == [ids for ids, _ in latents]
    worst = max(abs(a - b) / abs(a) for (_, a), (_, b) in zip(images, latents, strict=True))
    print(f"largest relative difference of a step's loss: {worst:.2e}")
    return worst


def test_training_in_bfloat16_is_that_from_the_images_if_the_encoder_ran_in_bfloat16(source, tmp_path, monkeypatch):
    """Else the cache holds better moments than the run on images, whose encoder rounds to 8 bits."""
    right, found = cache_latents.settings_of, {}
    images = losses(source, precision="bf16-mixed")
    for precision in ("float32", "bfloat16"):  # the tool asks a GPU for the second
        monkeypatch.setattr(cache_latents, "settings_of", lambda *a, p=precision: replace(right(*a), precision=p))
        assert run(source, tmp_path / precision) == 0
        latents = losses(tmp_path / precision / "*.tar", latents=LatentCache(), precision="bf16-mixed")
        found[precision] = difference(images, latents)
    assert 0 < found["float32"] < 1e-2
    assert found["bfloat16"] < found["float32"] / 4


def test_a_run_on_a_cache_goes_on_where_it_stopped(source, tmp_path):
    assert run(source, tmp_path / "latents") == 0
    shards = tmp_path / "latents" / "*.tar"
    straight = losses(shards, folder=tmp_path, latents=LatentCache())
    for step in (1, 3, 6):
        assert losses(shards, resume=tmp_path / f"{step}.ckpt", latents=LatentCache()) == straight[step:]


def same_files(first, second):
    names = sorted(path.name for path in first.iterdir())
    assert names == sorted(path.name for path in second.iterdir())
    return filecmp.cmpfiles(first, second, names, shallow=False)[0] == names


def test_three_tasks_make_what_one_makes_and_the_last_writes_the_manifest(source, tmp_path):
    assert run(source, tmp_path / "one") == 0
    for index in (2, 0, 1):
        assert not (tmp_path / "three" / "manifest.json").exists()
        assert run(source, tmp_path / "three", "--task-index", index, "--num-tasks", 3) == 0
    assert same_files(tmp_path / "one", tmp_path / "three")
    (tmp_path / "three" / "manifest.json").unlink()
    assert run(source, tmp_path / "three", "--merge") == 0
    assert same_files(tmp_path / "one", tmp_path / "three")


def test_merge_says_what_is_missing(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--task-index", 1, "--num-tasks", 2) == 0
    assert run(source, tmp_path / "out", "--merge") == 1
    assert "not there yet: 00000.tar, 00002.tar" in capsys.readouterr().err
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_damaged_images_are_named(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    assert "could not be decoded: 00001.tar: 000006: UnidentifiedImageError" in capsys.readouterr().err
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert (manifest["samples"], manifest["damaged"]) == (16, 1)


def test_what_is_there_is_not_made_again_and_other_settings_are_refused(source, tmp_path, capsys, monkeypatch):
    assert run(source, tmp_path / "out") == 0
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.tar")}
    with monkeypatch.context() as broken:
        broken.setattr(cache_latents, "encode_shards", None)
        assert run(source, tmp_path / "out") == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert run(source, tmp_path / "out", "--dtype", "float32") == 2
    assert "dtype: float16 -> float32" in " ".join(capsys.readouterr().err.split())
    assert run(source, tmp_path / "out", "--dtype", "float32", "--overwrite") == 0


@pytest.mark.slow
def test_a_killed_task_leaves_whole_shards_alone_and_the_same_command_completes_them(source, tmp_path):
    assert run(source, tmp_path / "whole") == 0
    command = [sys.executable, "tools/cache_latents.py", *arguments(source, tmp_path / "out", "--batch-size", 1)]
    root = Path(__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.DEVNULL)
    first, deadline = tmp_path / "out" / "00000_latents.json", time.monotonic() + 120
    while not first.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    for record in (tmp_path / "out").glob("*_latents.json"):
        tar = tmp_path / "out" / (record.name.removesuffix("_latents.json") + ".tar")
        assert tar.stat().st_size == json.loads(record.read_text())["size"]
    assert run(source, tmp_path / "out") == 0
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert not list((tmp_path / "out").glob(".*.tmp"))


def test_verify_passes_what_is_right_and_says_the_psnr(source, tmp_path, capsys):
    assert run(source, tmp_path / "out", "--verify", 6) == 0
    assert "dB from the cache" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: (x + 1) * 127.5, r"images in [0, 255] instead of [-1, 1]"),
        (lambda x: (x + 1) / 2, r"images in [0, 1] instead of [-1, 1]"),
        (lambda x: x.flip(1), "red and blue swapped"),
    ],
)
def test_verify_names_what_was_wrong_with_the_images(source, tmp_path, capsys, monkeypatch, change, message):
    right = latent_encoding.to_signed_unit
    with monkeypatch.context() as broken:
        broken.setattr(latent_encoding, "to_signed_unit", lambda images: change(right(images)))
        assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "out", "--verify", 6) == 1
    assert message in " ".join(capsys.readouterr().err.split())


def test_verify_names_another_autoencoder(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    other = checkpoint(tmp_path / "other.ckpt", is_other=True)
    assert run(source, tmp_path / "out", "--verify", 6, model=other) == 1
    said = " ".join(capsys.readouterr().err.split())
    assert "the cache differs: setting encoder" in said
    assert "of another autoencoder" in said


def test_moments_too_large_for_their_type_are_refused(source, tmp_path, capsys):
    model = checkpoint(tmp_path / "large.ckpt", scale=1e7)
    assert run(source, tmp_path / "out", model=model) == 2
    assert "change --dtype to bfloat16 or float32" in " ".join(capsys.readouterr().err.split())
    assert not list((tmp_path / "out").glob("*.tar"))
    assert run(source, tmp_path / "out", "--dtype", "float32", model=model) == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--image-size", 18), "allowed are multiples of 4"),
        (("--task-index", 3, "--num-tasks", 3), "--task-index is 3; allowed are 0 to 2"),
        (("--precision", "bfloat16"), "allowed there is float32"),
        (("--storage-options", "[1]"), "change --storage-options"),
        (("--storage-options", "{"), "change --storage-options"),
        (("--storage-options", '{"s3": 1}'), "change --storage-options"),
        (("--segmentation", ".png"), "allowed are two-part names of PNG files"),
    ],
)
def test_what_cannot_be_used_is_refused(source, tmp_path, capsys, options, message):
    assert run(source, tmp_path / "out", *options) == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("output", "found"),
    [("file", "file is a file; allowed is a folder"), ("/proc/x", "No such file or directory; allowed are")],
)
def test_an_output_that_cannot_be_written_is_said_in_three_parts(source, tmp_path, capsys, output, found):
    (tmp_path / "file").write_text("mine")
    assert run(source, tmp_path / output, model=checkpoint(tmp_path / "a.ckpt")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert found in said
    assert "change --output" in said


def test_a_number_of_workers_is_not_negative(source, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(source, tmp_path / "out", "--workers", -1)
    assert "-1 is given; allowed: 0 or more; change --workers" in capsys.readouterr().err


@pytest.mark.parametrize("workers", [0, 1])
def test_a_shard_that_a_worker_cannot_read_is_named_without_a_traceback(source, tmp_path, capsys, monkeypatch, workers):
    def read(self, row):
        raise ShardReadError("0.tar could not be read")

    monkeypatch.setattr(latent_encoding.SourceImages, "picture", read)
    assert run(source, tmp_path / "out", "--workers", workers) == 2
    said = capsys.readouterr().err
    assert "error: 0.tar could not be read" in said
    assert "Traceback" not in said
    assert "DataLoader" not in said


def test_the_source_folder_is_no_output(source, tmp_path, capsys):
    assert run(source, tmp_path / "shards", model=checkpoint(tmp_path / "a.ckpt")) == 2
    assert "change --output" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("workers", [0, 1])
def test_shards_behind_urls_give_the_cache_of_the_same_shards_here(source, tmp_path, capsys, workers):
    pytest.importorskip("aiohttp")
    assert run(source, tmp_path / "local") == 0
    options = ("--cache-dir", tmp_path / "copies", "--workers", workers, "--verify", 6)
    with serving(tmp_path / "shards") as server:
        assert run(server.url + "/{00000..00003}.tar?signature=S", tmp_path / "out", *options) == 0
        fetched = sum(server.requests["GET", f"{shard:05d}.tar"] for shard in range(4))
        assert run(server.url + "/{00000..00003}.tar?signature=T", tmp_path / "out", *options[:4]) == 0
    assert fetched == 4
    for path in (tmp_path / "local").glob("*.tar"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert "signature=" not in (tmp_path / "out" / "manifest.json").read_text()
    assert all("signature=" not in path.read_text() for path in (tmp_path / "out").glob("*_latents.json"))
