"""Stage 1 as its users meet it: two processes against one, interruptions with a discriminator, the decoder alone."""

import shutil

import pytest
import torch

from ldm_train.checkpoint import digest, load_pretrained, read_checkpoint
from ldm_train.config import ConfigError, load_run
from ldm_train.train import train

from .conftest import composed
from .test_end_to_end import equal, last, metrics

STAGE = "demo_autoencoder"
TINY = [f"experiment={STAGE}", "debug=tiny", "logger=csv", "callbacks.calibration.num_images=24",
        "callbacks.reconstructions.num_images=4"]  # fmt: skip
ADVERSARY = ["adversarial=patch_small", "adversarial.discriminator.channels=16", "adversarial.start=1",
             "adversarial.warmup=1", "adversarial.r1_weight=1", "adversarial.r1_every=2",
             "adversarial.lecam_weight=0.1"]  # fmt: skip
CODEBOOK = [
    "autoencoder=vq_tiny",
    "autoencoder.regularizer.codebook_size=64",
    "autoencoder.regularizer.restart_after=2",
]
KINDS = {"kl": ADVERSARY, "vq": [*CODEBOOK, *ADVERSARY]}


def run(root, run_id, *overrides):
    train(composed(*TINY, f"run_id={run_id}", *overrides, root=root))
    return last(root, STAGE, run_id)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_train_what_one_trains_on_the_joined_batch(kind, forked_runs, tmp_path):
    """Weights and figures after 5 steps, with what looks at a whole batch: batch norm, adaptive weight, codebook."""
    # Emoji have many equal latents: codes drawn from them coincide, and rounding decides which of them is the nearest.
    uniform = ["autoencoder.regularizer.initialisation=uniform", "autoencoder.regularizer.restart_after=null"]
    # Adam divides by the size of a gradient; its epsilon keeps those that are nothing but rounding from growing.
    shared = [*KINDS[kind], *(uniform if kind == "vq" else []), "trainer.max_steps=5", "trainer.val_check_interval=5",
              "optimizer.lr=1e-4", "+optimizer.eps=1e-6", "callbacks.throughput=null"]  # fmt: skip
    one = run(tmp_path, "one", *shared, "data.batch_size=8")["state_dict"]
    ddp = ["trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "data.batch_size=4", "run_id=two"]
    ddp.append("+callbacks.waiting._target_=tests.waiting.NoBarrier")
    forked_runs.finish(*TINY, *shared, *ddp, root=tmp_path, ranks=2)
    figures = [metrics(tmp_path / STAGE / run_id) for run_id in ("one", "two")]
    for key in ("train/loss", "train/loss_pixel", "train/loss_generator"):
        assert figures[0][key] == pytest.approx(figures[1][key], rel=1e-5), key
    two = last(tmp_path, STAGE, "two")["state_dict"]
    assert one.keys() == two.keys()
    worst = {name: float((one[name].double() - two[name].double()).abs().max()) for name in one}
    assert max(worst.values()) < 1e-6, sorted(worst.items(), key=lambda item: -item[1])[:5]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_an_interrupted_run_ends_bit_equal_to_an_unbroken_one(kind, tmp_path):
    """Stopped before the discriminator's start, and gone on with: both players, their moments, codebook, clock."""
    shared = [*KINDS[kind], "adversarial.start=12", "adversarial.unit=images", "adversarial.warmup=4",
              "lr_scheduler.total_steps=6", "callbacks.ema.decay=0.5"]  # fmt: skip
    unbroken = run(tmp_path, "unbroken", *shared, "trainer.max_steps=6")
    run(tmp_path, "broken", *shared, "trainer.max_steps=2")
    resumed = run(tmp_path, "broken", *shared, "trainer.max_steps=6")
    assert resumed["images_seen"] == unbroken["images_seen"] == 24
    for part in ("state_dict", "ema", "optimizer_states", "lr_schedulers"):
        assert equal(resumed[part], unbroken[part]), part
    steps = {int(state["step"]) for state in unbroken["optimizer_states"][0]["state"].values()}
    assert steps == {6, 3}, "the discriminator is stepped from its start on, 12 images into 24"


def test_validation_logs_quality_and_what_the_latents_look_like(tmp_path):
    run(tmp_path, "kl")
    logged = metrics(tmp_path / STAGE / "kl")
    channels = [f"{channel:02d}" for channel in range(6)]
    assert {"val/psnr", "val/ssim", "val/loss", "val/rfid_randomconv"} <= logged.keys()
    assert {f"val/latent_{name}/{c}" for name in ("mean", "std", "divergence") for c in channels} <= logged.keys()
    run(tmp_path, "vq", *CODEBOOK)
    logged = metrics(tmp_path / STAGE / "vq")
    assert {"val/codebook_usage", "val/codebook_perplexity", "train/codebook_usage"} <= logged.keys()
    assert not any("divergence" in key for key in logged)
    assert 1 <= list(logged["val/codebook_perplexity"].values())[-1] <= 64


def test_the_perceptual_backbone_is_named_in_the_checkpoint_and_not_in_it(tmp_path, vgg16_weights):
    backbone = tmp_path / "vgg16.pth"
    shutil.copy(vgg16_weights, backbone)
    overrides = ["perceptual=lpips", f"perceptual.backbone={backbone}", "data.batch_size=2", "trainer.max_steps=2"]
    checkpoint = run(tmp_path, "default", *overrides)
    assert "val/lpips" in metrics(tmp_path / STAGE / "default")
    assert not any(name.startswith("loss.perceptual") for name in checkpoint["state_dict"])
    stage, _ = load_run(tmp_path / STAGE / "default/checkpoints/last.ckpt")
    assert checkpoint["frozen"] == {"perceptual": digest(stage.loss.perceptual)}

    torch.save({name: value * 2 for name, value in torch.load(vgg16_weights).items()}, backbone)
    with pytest.raises(ValueError, match=r"another perceptual backbone .* change `perceptual.backbone`"):
        run(tmp_path, "default", *overrides, "trainer.max_steps=4")


def test_absent_perceptual_weights_are_refused_and_weight_zero_needs_none(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "empty"))
    with pytest.raises(ConfigError, match=r"(?s)vgg16-397923af.pth.*fetch_weights.py vgg16.*`perceptual.backbone`"):
        run(tmp_path, "default", "perceptual=lpips")
    run(tmp_path, "default", "perceptual=lpips", "perceptual.weight=0")
    assert "val/lpips" not in metrics(tmp_path / STAGE / "default")


def test_the_decoder_alone_goes_on_from_a_checkpoint(tiny_runs, tmp_path):
    path = tiny_runs / STAGE / "default/checkpoints/last.ckpt"
    before = read_checkpoint(path)["state_dict"]
    after = run(tmp_path, "decoder", f"stage.autoencoder.checkpoint={path}", "stage.trains=decoder")["state_dict"]
    changed = {name.split(".")[1] for name in before if not torch.equal(before[name], after[name])}
    assert changed == {"decoder", "from_latents"}, "calibration included: the latents are what they were"


def test_lpips_judges_a_model_that_was_trained_without_it(tiny_runs, tmp_path, torch_cache):
    path = tiny_runs / STAGE / "default/checkpoints/last.ckpt"
    train(composed(*TINY, "task=validate", f"resume={path}", "perceptual=lpips", root=tmp_path))
    assert "val/lpips" in metrics(tmp_path / STAGE / "default")


def test_a_converted_autoencoder_is_validated_and_begun_from_but_not_gone_on_with(tiny_runs, tmp_path):
    content = read_checkpoint(tiny_runs / STAGE / "default/checkpoints/last.ckpt")
    own = {name: value for name, value in content["state_dict"].items() if name.startswith("autoencoder.")}
    converted = tmp_path / "converted.ckpt"
    torch.save({"state_dict": own, "autoencoder": {}, "global_step": 0}, converted)
    train(composed(*TINY, "task=validate", f"resume={converted}", root=tmp_path))
    run(tmp_path, "begun", f"stage.autoencoder.checkpoint={converted}")
    with pytest.raises(ConfigError, match=r"holds no config, as a converted .* by `stage.autoencoder.checkpoint`"):
        run(tmp_path, "resumed", f"resume={converted}")
    with pytest.raises(ConfigError, match=r"holds no config, as a converted"):
        load_run(converted)


def test_later_stages_get_the_averaged_weights(tmp_path):
    checkpoint = run(tmp_path, "default", "callbacks.ema.decay=0.9", *ADVERSARY)
    stage, _ = load_run(tmp_path / STAGE / "default/checkpoints/last.ckpt")
    fresh = load_pretrained(
        stage.autoencoder, str(tmp_path / STAGE / "default/checkpoints/last.ckpt"), "autoencoder.", "key"
    )
    assert all(name.startswith("autoencoder.") for name in checkpoint["ema"]["average"]), "no discriminator"
    for name, value in checkpoint["ema"]["average"].items():
        assert torch.equal(dict(fresh.named_parameters())[name.removeprefix("autoencoder.")], value)


def test_images_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"images are 30 x 30; allowed are multiples of 4.*change `image_size`"):
        run(tmp_path, "default", "image_size=30")


def test_a_checkpoint_of_another_architecture_is_refused(tiny_runs, tmp_path):
    path = tiny_runs / STAGE / "default/checkpoints/last.ckpt"
    with pytest.raises(ConfigError, match=r"(?s)does not fit this model.*other shape: .*groups `autoencoder`"):
        run(tmp_path, "default", f"stage.autoencoder.checkpoint={path}", "autoencoder.channels=16")


def test_a_truncated_checkpoint_is_refused(tiny_runs, tmp_path):
    content = (tiny_runs / STAGE / "default/checkpoints/last.ckpt").read_bytes()
    cut = tmp_path / "cut.ckpt"
    cut.write_bytes(content[: len(content) // 2])
    with pytest.raises(ConfigError, match=r"(?s)cannot be read as a checkpoint.*allowed are complete.*change `stage"):
        run(tmp_path, "default", f"stage.autoencoder.checkpoint={cut}")


def test_stage_two_learns_the_latents_before_quantisation_and_decodes_their_nearest_codes(tmp_path):
    run(tmp_path, "vq", *CODEBOOK)
    checkpoint = tmp_path / STAGE / "vq/checkpoints/last.ckpt"
    overrides = ["experiment=demo", "debug=tiny", "logger=csv", "callbacks.samples=null", "sampler.num_steps=2"]
    train(composed(*overrides, *CODEBOOK, f"stage.autoencoder.checkpoint={checkpoint}", root=tmp_path))
    stage, _ = load_run(tmp_path / "demo/default/checkpoints/last.ckpt")
    autoencoder = stage.autoencoder.eval()
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        latents = autoencoder.encode(image)
        assert torch.equal(autoencoder.encode(image, torch.randn_like(latents)), latents), "nothing is drawn"
        codes = autoencoder.regularizer.project(latents * autoencoder.latent_std + autoencoder.latent_mean)
        assert not torch.allclose(autoencoder.normalise(codes), latents, atol=1e-3)
        assert torch.equal(autoencoder.decode(latents), autoencoder.decode_raw(codes))
        torch.testing.assert_close(autoencoder.decode(autoencoder.normalise(codes)), autoencoder.decode_raw(codes))
