"""`tools/calibrate_latents.py`: the latents of the measured images have mean 0 and variance 1 afterwards."""

from pathlib import Path

import calibrate_latents
import pytest
import torch
from safetensors.torch import save_file

import ldm_train
from ldm_train.checkpoint import load_pretrained, read_checkpoint
from ldm_train.data import ImageTextDataModule, ShardReadError
from ldm_train.interchange import build, export_compvis
from tests.interchange.networks import KINDS, SMALL, random_autoencoder

SHARDS = str(Path(ldm_train.__file__).parent / "assets/noto_emoji/*.tar")
SIZE, NUMBER = 16, 24


@pytest.fixture
def source(tmp_path):
    """A checkpoint of an autoencoder that was never calibrated."""

    def write(node):
        state = {f"autoencoder.{name}": value for name, value in random_autoencoder(node).state_dict().items()}
        torch.save({"state_dict": state, "config": {"autoencoder": node}}, tmp_path / "source.ckpt")
        return tmp_path / "source.ckpt"

    return write


def run(checkpoint, output, *options, shards=SHARDS):
    fixed = ["--data", shards, "--image-size", SIZE, "--num-images", NUMBER, "--device", "cpu"]
    arguments = ["--checkpoint", checkpoint, "--output", output, *fixed, *options]
    return calibrate_latents.main([str(argument) for argument in arguments])


@torch.no_grad()
def normalised(path, node):
    """Mean and variance of the posteriors of the measured images, in the units of stage 2."""
    autoencoder = load_pretrained(build(node), str(path), "autoencoder.", "stage.autoencoder.checkpoint").eval()
    data = ImageTextDataModule(SHARDS, SIZE, NUMBER, seed=0)
    moments = autoencoder.moments(next(iter(data.reference_batches(NUMBER, NUMBER)))["image"])
    variance = autoencoder.regularizer.variance(moments) / autoencoder.latent_std**2
    return autoencoder, autoencoder.normalise(autoencoder.regularizer.mode(moments)), variance


@pytest.mark.parametrize("kind", ["plain", "vq"])
def test_each_channel_has_mean_0_and_variance_1(kind, source, tmp_path):
    node = KINDS[kind]
    assert run(source(node), tmp_path / "out.ckpt") == 0
    _, mean, variance = normalised(tmp_path / "out.ckpt", node)
    torch.testing.assert_close(mean.mean((0, 2, 3)), torch.zeros(4), rtol=0, atol=1e-5)
    total = mean.var((0, 2, 3), correction=0) + variance.mean((0, 2, 3))
    torch.testing.assert_close(total, torch.ones(4), rtol=1e-4, atol=0)


def test_one_number_for_all_channels_as_published(source, tmp_path):
    assert run(source(SMALL), tmp_path / "out.ckpt", "--scalar") == 0
    autoencoder, mean, variance = normalised(tmp_path / "out.ckpt", SMALL)
    assert not autoencoder.latent_mean.any()
    assert len(autoencoder.latent_std.unique()) == 1
    torch.testing.assert_close(mean.var(correction=0) + variance.mean(), torch.tensor(1.0), rtol=1e-4, atol=0)


def test_a_shard_that_cannot_be_read_is_an_error_without_a_traceback(source, tmp_path, capsys, monkeypatch):
    class Failing(ImageTextDataModule):
        def reference_batches(self, *_):
            raise ShardReadError("0.tar could not be read")

    monkeypatch.setattr(calibrate_latents, "ImageTextDataModule", Failing)
    assert run(source(SMALL), tmp_path / "out.ckpt") == 2
    assert "error: 0.tar could not be read" in capsys.readouterr().err


def test_the_batch_size_does_not_matter(source, tmp_path):
    checkpoint = source(SMALL)
    for size in (24, 7):
        assert run(checkpoint, tmp_path / f"{size}.ckpt", "--batch", size) == 0
    states = [read_checkpoint(tmp_path / f"{size}.ckpt")["state_dict"] for size in (24, 7)]
    for name in ("autoencoder.latent_mean", "autoencoder.latent_std"):
        torch.testing.assert_close(states[0][name], states[1][name], rtol=1e-5, atol=1e-6)


def test_files_of_others_are_measured_as_they_are(tmp_path):
    node = KINDS["vq"]
    tensors, record = export_compvis(node, random_autoencoder(node).state_dict())
    torch.save({"state_dict": tensors, "ldm_train": record}, tmp_path / "published.ckpt")
    assert run(tmp_path / "published.ckpt", tmp_path / "out.ckpt") == 0
    assert normalised(tmp_path / "out.ckpt", node)[0].is_calibrated


def test_all_images_are_taken_where_there_are_fewer(source, tmp_path, capsys):
    one_shard = SHARDS.replace("*", "00003")
    assert run(source(SMALL), tmp_path / "out.ckpt", "--num-images", 10**6, shards=one_shard) == 0
    assert "images, which are all taken" in capsys.readouterr().err


def test_what_cannot_be_used_is_named(source, tmp_path, capsys):
    checkpoint = source(SMALL)
    save_file({"x": torch.zeros(1)}, tmp_path / "silent.safetensors")
    cases = (
        ((checkpoint, checkpoint), "is there already; allowed is a new name; change --output"),
        ((tmp_path / "none.ckpt", tmp_path / "out.ckpt"), "nothing at"),
        ((tmp_path / "silent.safetensors", tmp_path / "out.ckpt"), "choose one with --autoencoder"),
        (
            (checkpoint, tmp_path / "out.ckpt", "--image-size", 18),
            "allowed are multiples of 4, by which this autoencoder",
        ),
        ((checkpoint, tmp_path / "out.safetensors"), "allowed are names in .ckpt; change --output"),
        (
            (checkpoint, checkpoint / "out.ckpt"),
            "is no folder; allowed is a folder that you may write to; change --output",
        ),
        (
            (checkpoint, tmp_path / "out.ckpt", "--data", tmp_path),
            f"{tmp_path} is a folder; allowed are shards, such as",
        ),
        ((checkpoint, tmp_path / "out.ckpt", "--data", tmp_path / "no.tar"), "`--data` is"),
        ((checkpoint, tmp_path / "out.ckpt", "--override", "autoencoder.channels=8"), "add --autoencoder"),
    )
    for arguments, message in cases:
        assert run(*arguments) == 2, message
        assert message in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "out.ckpt").exists()


def test_the_image_size_is_judged_before_anything_is_measured(source, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(calibrate_latents, "ImageTextDataModule", None)
    assert run(source(SMALL), tmp_path / "out.ckpt", "--image-size", 18) == 2
    assert "change --image-size" in " ".join(capsys.readouterr().err.split())
