"""`tools/convert.py`: whatever the route, the same autoencoder arrives, or a refusal that says why."""

import json
import os
import pickle
import re
import sys
from types import ModuleType
from unittest.mock import Mock

import convert
import diffusers
import hydra
import pytest
import torch
from safetensors.torch import load_file, save_file
from sources import AUTOENCODER

from ldm_train.checkpoint import load_pretrained
from ldm_train.interchange import build, export_compvis
from tests.conftest import composed
from tests.interchange.networks import KINDS, SMALL, images, learned, random_autoencoder, same

# The small network as an option of conf/autoencoder with overrides, as a user of a published file has to say it.
SMALL_OPTION = ["--autoencoder", "kl_f8"] + [
    f"--override=autoencoder.{key}={value}".replace(" ", "")
    for key, value in SMALL.items()
    if type(value) in (int, list)
]


def run(*arguments: object) -> None:
    assert convert.main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    assert convert.main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def calibrated(node):
    autoencoder = random_autoencoder(node)
    channels = torch.arange(autoencoder.latent_channels)
    autoencoder.calibrate(0.1 * channels - 0.2, 0.7 + 0.3 * channels)
    return autoencoder


def stage_1(path, node=SMALL, **more):
    """A checkpoint as stage 1 writes it; returns its autoencoder."""
    autoencoder = calibrated(node)
    state = {f"autoencoder.{name}": value for name, value in autoencoder.state_dict().items()}
    state["loss.adversarial.weight"] = torch.zeros(1)
    torch.save({"state_dict": state, "config": {"autoencoder": node}, "global_step": 3, **more}, path)
    return autoencoder


def loaded(path, node=SMALL):
    """The autoencoder that stage 2 would take from a checkpoint."""
    return load_pretrained(build(node), str(path), "autoencoder.", "stage.autoencoder.checkpoint")


@pytest.mark.parametrize("target", ["vae", "kl.safetensors", "kl.ckpt --to compvis"])
@pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
def test_there_and_back_is_the_identity(node, target, tmp_path):
    name, *options = target.split()
    autoencoder = stage_1(tmp_path / "last.ckpt", node)
    run(tmp_path / "last.ckpt", tmp_path / name, *options)
    run(tmp_path / name, tmp_path / "back.ckpt")
    assert same(learned(loaded(tmp_path / "back.ckpt", node)), learned(autoencoder))


@pytest.mark.parametrize("kind", ["attention in levels", "vq"])
def test_diffusers_reads_the_folder(kind, tmp_path):
    node = KINDS[kind]
    autoencoder = stage_1(tmp_path / "last.ckpt", node)
    run(tmp_path / "last.ckpt", tmp_path / "model" / "vae")
    kinds = {"attention in levels": diffusers.AutoencoderKL, "vq": diffusers.VQModel}
    theirs = kinds[kind].from_pretrained(tmp_path / "model" / "vae", local_files_only=True).eval()
    with torch.no_grad():
        z = autoencoder.regularizer.mode(autoencoder.moments(images(node)))
        ours = autoencoder.decode(autoencoder.normalise(z))
        torch.testing.assert_close(theirs.decode(z).sample, ours, rtol=1e-5, atol=1e-5)
    run(tmp_path / "model", tmp_path / "back.ckpt")  # the folder around vae/ will do


def test_stage_2_takes_what_was_converted(tmp_path):
    cfg = composed("experiment=demo", "autoencoder=tiny", f"stage.autoencoder.checkpoint={tmp_path / 'converted.ckpt'}")
    node = AUTOENCODER.compose("tiny", ())
    autoencoder = calibrated(node)
    tensors, _ = export_compvis(node, autoencoder.state_dict())
    save_file(tensors, tmp_path / "published.safetensors")
    options = ("--autoencoder", "tiny", "--scale-factor", 0.5)
    run(tmp_path / "published.safetensors", tmp_path / "converted.ckpt", *options)
    first_stage = hydra.utils.instantiate(cfg.stage.autoencoder, _convert_="all")
    x = images(node)
    with torch.no_grad():
        z = autoencoder.regularizer.mode(autoencoder.moments(x))
        torch.testing.assert_close(first_stage.encode(x), 0.5 * z, rtol=1e-4, atol=1e-5)


def test_a_folder_in_half_precision_alone_is_read_as_float32(tmp_path):
    autoencoder = stage_1(tmp_path / "last.ckpt")
    run(tmp_path / "last.ckpt", tmp_path / "vae")
    whole = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    halves = {name: value.half() for name, value in load_file(whole).items()}
    save_file(halves, tmp_path / "vae/diffusion_pytorch_model.fp16.safetensors")
    run(tmp_path / "vae", tmp_path / "exact.ckpt")  # the whole file is the first choice
    whole.unlink()
    run(tmp_path / "vae", tmp_path / "rounded.ckpt")
    weight = autoencoder.to_moments.weight
    assert torch.equal(loaded(tmp_path / "exact.ckpt").to_moments.weight, weight)
    assert torch.equal(loaded(tmp_path / "rounded.ckpt").to_moments.weight, weight.half().float())
    assert not torch.equal(weight, weight.half().float())


class TestPublishedFiles:
    @pytest.fixture
    def tensors(self):
        return export_compvis(SMALL, random_autoencoder(SMALL).state_dict())[0]

    def test_one_that_mentions_lightning_s_classes_is_read(self, tensors, tmp_path, monkeypatch):
        name = "pytorch_lightning.callbacks.model_checkpoint"
        # A module of that name for the time of writing: the real one would take over the logging of the whole process.
        module, callback = ModuleType(name), type("ModelCheckpoint", (), {"__module__": name})
        module.ModelCheckpoint = callback
        with monkeypatch.context() as writing:
            for part in ("pytorch_lightning", name):
                writing.setitem(sys.modules, part, module)
            content = {"state_dict": tensors, "callbacks": {callback: {"best_model_path": "x"}}, "epoch": 1}
            torch.save(content, tmp_path / "model.ckpt")
        assert name.encode() in (tmp_path / "model.ckpt").read_bytes()
        run(tmp_path / "model.ckpt", tmp_path / "ours.ckpt", *SMALL_OPTION)

    def test_the_scale_factor_calibrates(self, tensors, tmp_path, capsys):
        save_file(tensors, tmp_path / "model.safetensors")
        run(tmp_path / "model.safetensors", tmp_path / "without.ckpt", *SMALL_OPTION)
        assert "give --scale-factor (0.18215 for Stable Diffusion" in " ".join(capsys.readouterr().err.split())
        assert not loaded(tmp_path / "without.ckpt").is_calibrated
        run(tmp_path / "model.safetensors", tmp_path / "with.ckpt", *SMALL_OPTION, "--scale-factor", 0.18215)
        assert "warning" not in capsys.readouterr().err
        state = loaded(tmp_path / "with.ckpt").state_dict()
        assert not state["latent_mean"].any()
        torch.testing.assert_close(state["latent_std"], torch.full((1, 4, 1, 1), 1 / 0.18215))

    def test_what_is_left_out_is_said(self, tensors, tmp_path, capsys):
        torch.save({"state_dict": tensors | {"loss.logvar": torch.zeros(1)}}, tmp_path / "model.ckpt")
        run(tmp_path / "model.ckpt", tmp_path / "ours.ckpt", *SMALL_OPTION)
        assert "left out, being no part of an autoencoder: loss (1 tensors)" in capsys.readouterr().err

    def test_half_precision_is_read(self, tensors, tmp_path):
        save_file({name: value.half() for name, value in tensors.items()}, tmp_path / "model.safetensors")
        run(tmp_path / "model.safetensors", tmp_path / "ours.ckpt", *SMALL_OPTION)
        state = loaded(tmp_path / "ours.ckpt").state_dict()
        assert torch.equal(state["to_moments.weight"], tensors["quant_conv.weight"].half().float())

    @pytest.mark.parametrize("nested", [False, True], ids=["flat", "state_dict"])
    @pytest.mark.parametrize("zipped", [False, True], ids=["before torch 1.6", "zip"])
    def test_every_container_of_torch_is_read(self, tensors, nested, zipped, tmp_path):
        content = {"state_dict": tensors} if nested else tensors
        torch.save(content, tmp_path / "model.ckpt", _use_new_zipfile_serialization=zipped)
        run(tmp_path / "model.ckpt", tmp_path / "ours.ckpt", *SMALL_OPTION)
        assert torch.equal(loaded(tmp_path / "ours.ckpt").to_moments.weight, tensors["quant_conv.weight"])

    def test_another_architecture_is_refused_with_the_difference(self, tensors, tmp_path, capsys):
        save_file(tensors, tmp_path / "model.safetensors")
        options = [*SMALL_OPTION, "--override", "autoencoder.middle_attention=false"]
        message = refused(capsys, tmp_path / "model.safetensors", tmp_path / "ours.ckpt", *options)
        assert "unexpected: 20" in message
        assert "decoder.mid.attn_1.k.weight" in message
        assert "allowed are exactly the model's own names" in message
        assert not (tmp_path / "ours.ckpt").exists()


def test_averaged_weights_are_taken_unless_raw_ones_are_wanted(tmp_path):
    average = {"autoencoder.to_moments.bias": torch.full((8,), 7.0), "loss.adversarial.weight": torch.ones(1)}
    raw = stage_1(tmp_path / "last.ckpt", ema={"num_updates": torch.tensor(5), "average": average})
    run(tmp_path / "last.ckpt", tmp_path / "averaged.safetensors")
    run(tmp_path / "last.ckpt", tmp_path / "raw.safetensors", "--raw")
    assert torch.equal(load_file(tmp_path / "averaged.safetensors")["quant_conv.bias"], torch.full((8,), 7.0))
    assert torch.equal(load_file(tmp_path / "raw.safetensors")["quant_conv.bias"], raw.to_moments.bias)


def test_a_codebook_s_counters_survive_between_checkpoints_of_ours(tmp_path):
    node = KINDS["vq"] | {"regularizer": KINDS["vq"]["regularizer"] | {"update": "ema"}}
    autoencoder = calibrated(node)
    autoencoder.regularizer.idle.copy_(torch.arange(32))
    state = {f"autoencoder.{name}": value for name, value in autoencoder.state_dict().items()}
    torch.save({"state_dict": state, "config": {"autoencoder": node}}, tmp_path / "last.ckpt")
    run(tmp_path / "last.ckpt", tmp_path / "copy.ckpt")
    assert same(loaded(tmp_path / "copy.ckpt", node).state_dict(), autoencoder.state_dict())


def test_a_published_codebook_counts_as_initialised(tmp_path):
    node = KINDS["vq"] | {"regularizer": KINDS["vq"]["regularizer"] | {"initialisation": "k_means"}}
    autoencoder = stage_1(tmp_path / "last.ckpt", node)
    run(tmp_path / "last.ckpt", tmp_path / "vq.safetensors")
    run(tmp_path / "vq.safetensors", tmp_path / "back.ckpt")
    regularizer = loaded(tmp_path / "back.ckpt", node).regularizer
    assert bool(regularizer.initialised)
    assert torch.equal(regularizer.ema_sum, autoencoder.regularizer.codebook)


class TestRefusals:
    @pytest.mark.parametrize("name", ["last.ckpt", "kl.safetensors"])
    def test_truncated_files(self, name, tmp_path, capsys):
        stage_1(tmp_path / "last.ckpt")
        run(tmp_path / "last.ckpt", tmp_path / "kl.safetensors")
        whole = (tmp_path / name).read_bytes()
        for cut in (0, 10, len(whole) // 2, len(whole) - 1):
            (tmp_path / name).write_bytes(whole[:cut])
            message = refused(capsys, tmp_path / name, tmp_path / "out.ckpt")
            assert "cannot be read" in message
            assert "allowed" in message
            assert "SOURCE" in message
            assert "previous.ckpt" not in message
        assert not (tmp_path / "out.ckpt").exists()

    def test_pickles_with_code(self, tmp_path, capsys):
        class Dangerous:
            def __reduce__(self):
                return os.mkdir, (str(tmp_path / "ran"),)

        torch.save({"state_dict": {}, "callbacks": Dangerous()}, tmp_path / "a.ckpt")
        (tmp_path / "b.ckpt").write_bytes(pickle.dumps({"state_dict": Dangerous()}))
        for name, found in (("a.ckpt", "unsupported GLOBAL posix.mkdir"), ("b.ckpt", "Unsupported operand")):
            message = refused(capsys, tmp_path / name, tmp_path / "out.ckpt")
            assert f"cannot be read as a checkpoint ({found}" in message
            assert "weights_only" not in message  # torch's advice begins with how to run the code
        assert not (tmp_path / "ran").exists()

    def test_nodes_with_code(self, tmp_path, capsys):
        node = SMALL | {"regularizer": {"_target_": "os.mkdir", "path": str(tmp_path / "ran")}}
        stage_1(tmp_path / "last.ckpt")
        content = torch.load(tmp_path / "last.ckpt") | {"config": {"autoencoder": node}}
        torch.save(content, tmp_path / "bad.ckpt")
        assert "`autoencoder.regularizer._target_` is 'os.mkdir'" in refused(capsys, tmp_path / "bad.ckpt", "out.ckpt")
        assert not (tmp_path / "ran").exists()

    def test_what_does_not_say_its_architecture(self, tmp_path, capsys):
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        arguments = (tmp_path / "model.safetensors", tmp_path / "out.ckpt")
        assert "does not say which architecture it has; allowed: kl_f16, kl_f32" in refused(capsys, *arguments)
        assert "allowed options: kl_f16" in refused(capsys, *arguments, "--autoencoder", "kl_f7")
        wrong = ("--autoencoder", "kl_f8", "--override", "autoencoder.colour=1")
        assert "cannot be composed" in refused(capsys, *arguments, *wrong)

    def test_damaged_and_incomplete_folders(self, tmp_path, capsys):
        stage_1(tmp_path / "last.ckpt")
        run(tmp_path / "last.ckpt", tmp_path / "vae")
        config = (tmp_path / "vae/config.json").read_text()
        (tmp_path / "vae/config.json").write_text(config[:50])
        assert "config.json cannot be read" in refused(capsys, tmp_path / "vae", tmp_path / "out.ckpt")
        (tmp_path / "vae/config.json").write_text(json.dumps(json.loads(config) | {"block_out_channels": [32, 64, 64]}))
        assert "other shape" in refused(capsys, tmp_path / "vae", tmp_path / "out.ckpt")
        (tmp_path / "vae/diffusion_pytorch_model.safetensors").unlink()
        (tmp_path / "vae/diffusion_pytorch_model.bin").touch()
        message = refused(capsys, tmp_path / "vae", tmp_path / "out.ckpt")
        assert "holds config.json, diffusion_pytorch_model.bin, so its tensors cannot be read; allowed: " in message
        assert "diffusion_pytorch_model.fp16.safetensors; fetch one of them" in message

    def test_files_that_are_there_and_files_that_are_not(self, tmp_path, capsys):
        stage_1(tmp_path / "last.ckpt")
        assert "is there already" in refused(capsys, tmp_path / "last.ckpt", tmp_path / "last.ckpt")
        assert "nothing at" in refused(capsys, tmp_path / "none.ckpt", tmp_path / "out.ckpt")

    def test_a_checkpoint_without_an_autoencoder(self, tmp_path, capsys):
        torch.save({"state_dict": {"denoiser.x": torch.zeros(1)}}, tmp_path / "last.ckpt")
        message = refused(capsys, tmp_path / "last.ckpt", tmp_path / "out.ckpt", "--from", "ldm_train")
        assert "holds no tensor under 'autoencoder.'; allowed is a checkpoint of stage 1" in message

    def test_a_scale_factor_that_is_none(self, tmp_path, capsys):
        stage_1(tmp_path / "last.ckpt")
        message = refused(capsys, tmp_path / "last.ckpt", tmp_path / "out.ckpt", "--scale-factor", 0)
        assert "the scale factor is 0.0; allowed are positive numbers" in message

    @pytest.mark.parametrize("factor", [1e-300, 1e300, "nan"])
    def test_a_scale_factor_whose_inverse_is_no_float32(self, factor, tmp_path, capsys):
        stage_1(tmp_path / "last.ckpt")
        message = refused(capsys, tmp_path / "last.ckpt", tmp_path / "out.ckpt", "--scale-factor", factor)
        assert "allowed are positive numbers, 1e-37 to 1e+37" in message

    @pytest.mark.parametrize(
        ("options", "said"),
        [
            ("--override autoencoder.channels=64", "none is named; allowed: kl_f16, .*; add --autoencoder"),
            (
                "--autoencoder tiny --override seed=3",
                "is no part of the autoencoder; allowed are autoencoder.KEY=VALUE",
            ),
            ("--autoencoder tiny --override autoencoder.channels=abc", "`autoencoder.channels` is 'abc', .* takes int"),
            (
                "--autoencoder tiny --override autoencoder.channel_multipliers=3",
                "`autoencoder.channel_multipliers` is 3",
            ),
            (
                "--autoencoder tiny --override autoencoder.channel_multipliers=[1,a]",
                "allowed is a list of whole numbers",
            ),
            (
                "--autoencoder tiny --override autoencoder.latent_channels=???",
                "`autoencoder.latent_channels` has no value",
            ),
            ("--autoencoder tiny --override autoencoder.channels=${nothing}", "cannot be composed .*nothing"),
            ("--autoencoder tiny --override autoencoder.norm_groups=0", "norm_groups is 0; allowed"),
            ("--autoencoder null", "there is no autoencoder null; allowed options: kl_f16"),
        ],
    )
    def test_options_that_describe_no_autoencoder(self, options, said, tmp_path, capsys):
        save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
        message = refused(capsys, tmp_path / "model.safetensors", tmp_path / "out.ckpt", *options.split())
        assert re.search(said, message), message
        assert "change" in message or "--" in message

    @pytest.mark.parametrize(
        ("content", "said"),
        [
            ({1: torch.zeros(1)}, "the entry 1 is no named tensor; allowed is a dictionary of names"),
            ({"state_dict": {1: torch.zeros(1)}}, "the entry 1 is no named tensor"),
            ({"state_dict": {"autoencoder.x": 3}}, "the entry 'autoencoder.x' is no named tensor"),
            ({"state_dict": 3}, "the entry 'state_dict' is no named tensor"),
            ([1, 2], "allowed is a dictionary of tensors; change `SOURCE`"),
            ({"state_dict": {"autoencoder.x": torch.zeros(1)}, "config": None}, "choose one with --autoencoder"),
            ({"state_dict": {"autoencoder.x": torch.zeros(1)}, "config": 3}, "choose one with --autoencoder"),
            ({"state_dict": {}, "ldm_train": 3}, "the entry 'ldm_train' is int; allowed is a dictionary, or none"),
            ({"state_dict": {}, "ldm_train": {"autoencoder": 3}}, "`autoencoder._target_` is 3; allowed here"),
            (
                {"state_dict": {}, "ldm_train": {"autoencoder": SMALL | {"channels": "a"}}},
                "`autoencoder.channels` is 'a'",
            ),
            (
                {"state_dict": {}, "ldm_train": {"autoencoder": SMALL, "latent_mean": 3, "latent_std": 4}},
                "list of numbers",
            ),
        ],
    )
    def test_checkpoints_of_other_things(self, content, said, tmp_path, capsys):
        torch.save(content, tmp_path / "last.ckpt")
        message = refused(capsys, tmp_path / "last.ckpt", tmp_path / "out.ckpt")
        assert said in message
        assert "previous.ckpt" not in message

    def test_no_class_is_imported_that_a_node_names(self, tmp_path, capsys, monkeypatch):
        (tmp_path / "stranger.py").write_text("raise SystemExit('it ran')")
        monkeypatch.syspath_prepend(tmp_path)
        node = SMALL | {"attention_factors": [{"_target_": "stranger.Class"}]}
        torch.save({"state_dict": {}, "ldm_train": {"autoencoder": node}}, tmp_path / "bad.ckpt")
        message = refused(capsys, tmp_path / "bad.ckpt", tmp_path / "out.ckpt")
        assert "`autoencoder` names the class stranger.Class; allowed here: ldm_train" in message

    @pytest.mark.parametrize(
        ("name", "options", "said"),
        [
            ("out.pt", "", "ends in '.pt'; allowed is a name in .ckpt, one in .safetensors, or that of a folder"),
            (
                "out.safetensors",
                "--to ldm_train",
                "ends in '.safetensors'; allowed is for ldm_train: .ckpt; change TARGET",
            ),
            ("out", "--to compvis", "allowed is for compvis: .safetensors or .ckpt"),
            ("out.ckpt", "--to diffusers", "allowed is for diffusers: no suffix"),
            ("file/out.ckpt", "", "file is no folder; allowed is a folder that you may write to; change TARGET"),
            ("file/deeper/vae", "", "file is no folder"),
        ],
    )
    def test_targets_are_judged_before_any_work(self, name, options, said, tmp_path, capsys):
        (tmp_path / "file").touch()
        assert said in refused(capsys, tmp_path / "no source.ckpt", tmp_path / name, *options.split())

    def test_a_folder_that_cannot_be_written_to(self, tmp_path, capsys, monkeypatch):
        # The owner of everything, who runs tests in containers, may write everywhere.
        monkeypatch.setattr(os, "access", lambda path, mode: False)
        message = refused(capsys, tmp_path / "no source.ckpt", tmp_path / "new" / "out.ckpt")
        assert f"{tmp_path} cannot be written to; allowed is a folder" in message

    def test_a_disk_that_refuses(self, tmp_path, capsys, monkeypatch):
        stage_1(tmp_path / "last.ckpt")
        monkeypatch.setattr(torch, "save", Mock(side_effect=OSError(28, "No space left on device")))
        assert "No space left" in refused(capsys, tmp_path / "last.ckpt", tmp_path / "out.ckpt")
        assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
