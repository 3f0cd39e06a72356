"""`tools/convert_model.py`: whatever the route, the same model arrives, or a refusal that says why."""

import re
from types import SimpleNamespace

import convert_model
import diffusers
import pytest
import torch
from convert_model import AUTOENCODER_FILE, PREFIX, TEXT_FILE, UNET_FILE, Source, read_model, write_model
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from ldm_train.checkpoint import load_pretrained
from ldm_train.conditioning import CLIPTextConditioner, CLIPTextEncoder
from ldm_train.interchange import build, build_unet, export_stable_diffusion
from ldm_train.interchange.latents import scaled
from ldm_train.interchange.model import PREDICTIONS
from ldm_train.stages import load_text_encoder
from tests.interchange.models import SCHEDULE, TOWERS, WIDTH, encoder_of, random_model
from tests.interchange.networks import KINDS, SMALL, random_autoencoder, same
from tests.interchange.test_stable_diffusion import MODELS, assert_same
from tests.interchange.unets import PLAIN_UNET, SMALL_UNET, random_unet

# What the small networks are as options of conf/ with overrides, as a user of a published file has to say it.
SMALL_OPTIONS = [
    f"--override=++{group}.{key}={value}".replace(" ", "")
    for group, node in (("unet", SMALL_UNET), ("autoencoder", SMALL))
    for key, value in node.items()
    if type(value) in (int, list) and key not in ("in_channels", "out_channels", "context_dim")
]
DESCRIBED = ["--unet", "sd1", "--autoencoder", "kl_f8", *SMALL_OPTIONS]


def run(*arguments: object) -> None:
    assert convert_model.main([str(argument) for argument in arguments]) == 0


def refused(capsys, *arguments: object) -> str:
    assert convert_model.main([str(argument) for argument in arguments]) == 2
    return " ".join(capsys.readouterr().err.split())


def read(path):
    return read_model(Source(path))[0]


def published(path, **kind):
    """A file of others, without our record; returns its tensors."""
    tensors, _ = export_stable_diffusion(random_model(**kind))
    save_file(tensors, path)
    return tensors


@pytest.mark.parametrize(
    ("kind", "target"),
    [*((kind, "sd.safetensors") for kind in MODELS), *((next(iter(MODELS)), name) for name in ("sd.ckpt", "copy"))],
)
def test_there_and_back_is_the_identity(kind, target, tmp_path):
    options = ["--to", "ldm_train"] if target == "copy" else []
    model = random_model(**MODELS[kind])
    write_model(tmp_path / "ours", "ldm_train", model)
    assert_same(read(tmp_path / "ours"), model)
    run(tmp_path / "ours", tmp_path / target, *options)
    run(tmp_path / target, tmp_path / "back", "--to", "ldm_train")
    assert_same(read(tmp_path / "back"), model)


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_a_file_of_others_comes_out_as_it_went_in(suffix, tmp_path):
    tensors = published(tmp_path / "sd.safetensors")
    run(tmp_path / "sd.safetensors", tmp_path / "ours", *DESCRIBED)
    run(tmp_path / "ours", tmp_path / f"back{suffix}")
    back = tmp_path / f"back{suffix}"
    found = load_file(back) if suffix == ".safetensors" else torch.load(back)["state_dict"]
    assert same(found, tensors)


def test_diffusers_loads_the_average_or_the_raw_weights(tmp_path):
    model = random_model()
    write_model(tmp_path / "ours", "ldm_train", model)
    run(tmp_path / "ours", tmp_path / "averaged")
    run(tmp_path / "ours", tmp_path / "raw", "--raw")
    for name, state in (("averaged", model.average.state), ("raw", model.unet.state)):
        unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / name / "unet", local_files_only=True)
        assert torch.equal(unet.conv_in.weight, state["conv_in.weight"])
        assert same(read(tmp_path / name).unet.state, state)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "raw", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a cat", num_inference_steps=1, height=32, width=32, output_type="np").images.shape == (1, 32, 32, 3)


def test_a_published_file_holds_both_weights_or_the_one_that_is_asked_for(tmp_path, capsys):
    """Other programs look at `model.diffusion_model.` alone, where the raw weights are if there are both."""
    model = random_model()
    write_model(tmp_path / "ours", "ldm_train", model)
    for name, options in (("both", []), ("raw", ["--raw"]), ("averaged", ["--averaged"])):
        run(tmp_path / "ours", tmp_path / f"{name}.safetensors", *options)
    both, raw, averaged = (read(tmp_path / f"{name}.safetensors") for name in ("both", "raw", "averaged"))
    assert_same(both, model)
    assert raw.average is averaged.average is None
    assert same(raw.unet.state, model.unet.state)
    assert same(averaged.unet.state, model.average.state)
    message = refused(capsys, tmp_path / "raw.safetensors", tmp_path / "none", "--averaged")
    assert "holds no averaged weights" in message


def test_stage_2_takes_the_parts_of_our_folder(tmp_path):
    model = random_model()
    write_model(tmp_path / "ours", "ldm_train", model)
    unet = load_pretrained(build_unet(SMALL_UNET), str(tmp_path / "ours" / UNET_FILE), PREFIX, "key")
    assert same(unet.state_dict(), model.average.state)
    first_stage = load_pretrained(build(SMALL), str(tmp_path / "ours" / AUTOENCODER_FILE), "autoencoder.", "key")
    assert same(first_stage.state_dict(), model.autoencoder.state)
    encoder = load_text_encoder(CLIPTextEncoder(WIDTH, **TOWERS["openai"]), str(tmp_path / "ours" / TEXT_FILE))
    assert same(encoder.tower.state_dict(), model.text_encoder.tensors)


class TestPublishedFiles:
    def test_stable_diffusion_is_recognised(self, tmp_path, monkeypatch):
        """By its widths, and scaled as all of them are; here with small networks under the same names."""
        monkeypatch.setattr(convert_model, "RECOGNISED", {(32, 24): "sd1"})
        tensors = published(tmp_path / "sd.safetensors")
        del tensors["scale_factor"]
        save_file(tensors, tmp_path / "sd.safetensors")
        run(tmp_path / "sd.safetensors", tmp_path / "ours", *SMALL_OPTIONS)
        state = read(tmp_path / "ours").autoencoder.state
        assert same({name: state[name] for name in ("latent_mean", "latent_std")}, scaled(0.18215, 4))

    def test_the_published_widths_are_those_of_the_options(self):
        for (channels, context), option in convert_model.RECOGNISED.items():
            fixed = ["autoencoder=kl_f8", f"++unet.context_dim={context}"]
            node = convert_model.UNET.compose(option, fixed)
            assert (node["channels"], node["context_dim"], node["in_channels"]) == (channels, context, 4)

    def test_channels_that_are_concatenated_are_seen(self, tmp_path):
        published(tmp_path / "sd.safetensors", unet=SMALL_UNET | {"concat_channels": 5, "out_channels": 8})
        run(tmp_path / "sd.safetensors", tmp_path / "ours", *DESCRIBED)
        node = read(tmp_path / "ours").unet.node
        assert (node["in_channels"], node["concat_channels"], node["out_channels"]) == (4, 5, 8)

    def test_what_they_do_not_say_is_asked_for(self, tmp_path, capsys):
        published(tmp_path / "sd.safetensors")
        arguments = (tmp_path / "sd.safetensors", tmp_path / "ours")
        assert "does not say which architecture it has; allowed: kl_f16" in refused(capsys, *arguments)
        message = refused(capsys, *arguments, "--autoencoder", "kl_f8", *SMALL_OPTIONS)
        assert "choose one with --unet" in message

    def test_prediction_scale_and_schedule_can_be_said(self, tmp_path):
        tensors = published(tmp_path / "sd.safetensors")
        save_file(tensors | {"betas": tensors["betas"] ** 1.1}, tmp_path / "sd.safetensors")
        options = ["--prediction", "v", "--scale-factor", 0.5, "--schedule", "ldm"]
        run(tmp_path / "sd.safetensors", tmp_path / "ours", *DESCRIBED, *options)
        model = read(tmp_path / "ours")
        assert model.prediction == "v"
        assert model.schedule["beta_end"] == 0.0195
        assert model.autoencoder.state["latent_std"].unique().tolist() == [2.0]

    def test_what_is_left_out_and_unknown_is_said(self, tmp_path, capsys):
        tensors = published(tmp_path / "sd.safetensors", text=None)
        del tensors["scale_factor"]
        more = {"betas": tensors["betas"] ** 1.1, "cond_stage_model.embedding.weight": torch.zeros(1)}
        save_file(tensors | more, tmp_path / "sd.safetensors")
        run(tmp_path / "sd.safetensors", tmp_path / "ours", *DESCRIBED)
        said = " ".join(capsys.readouterr().err.split())
        assert "left out, having no place in it: cond_stage_model (1 tensors)" in said
        assert "warning: its betas are those of no schedule in conf/schedule" in said
        assert "warning: its latents have no mean and standard deviation; give --scale-factor" in said
        message = refused(capsys, tmp_path / "ours", tmp_path / "back.ckpt")
        assert "the noise schedule of the model is unknown" in message

    def test_another_architecture_is_refused_with_the_difference(self, tmp_path, capsys):
        published(tmp_path / "sd.safetensors", averaged=False)
        wrong = ["--override", "unet.num_res_blocks=2"]
        message = refused(capsys, tmp_path / "sd.safetensors", tmp_path / "ours", *DESCRIBED, *wrong)
        assert re.search(r"missing: \d+ .*down.0.blocks.1.residual.norm_in.weight", message)
        assert "allowed are exactly the model's own names" in message
        assert not (tmp_path / "ours").exists()


def fake_run(path, monkeypatch, conditioner, autoencoder, **stage):
    """A checkpoint as stage 2 writes it, and the stage that `load_run` would rebuild from it."""
    unet, averaged = random_unet(SMALL_UNET).state_dict(), random_unet(SMALL_UNET, seed=1).state_dict()
    config = {
        "unet": SMALL_UNET,
        "autoencoder": SMALL,
        "schedule": SCHEDULE,
        "stage": {"denoiser": {"prediction": "v"}},
        "callbacks": {"ema": {"decay": None}},
    }
    state = {f"{PREFIX}{name}": value for name, value in unet.items()} | {"conditioner.x": torch.zeros(1)}
    average = {f"{PREFIX}{name}": value for name, value in averaged.items()} | {"conditioner.x": torch.zeros(1)}
    ema = {"num_updates": torch.tensor(5), "average": average}
    torch.save({"state_dict": state, "ema": ema, "config": config, "global_step": 9} | stage, path)
    rebuilt = SimpleNamespace(conditioner=conditioner, autoencoder=autoencoder)
    monkeypatch.setattr(convert_model, "load_run", lambda path: (rebuilt, OmegaConf.create(config)))
    return unet, averaged


@pytest.mark.parametrize("kind", TOWERS)
def test_the_checkpoint_of_a_run_is_a_whole_model(kind, tmp_path, monkeypatch):
    text_encoder = random_model(text=kind).text_encoder
    conditioner, first_stage = CLIPTextConditioner(encoder_of(text_encoder), WIDTH), random_autoencoder(SMALL)
    first_stage.calibrate(torch.zeros(4), torch.full((4,), 5.0))
    unet, averaged = fake_run(tmp_path / "last.ckpt", monkeypatch, conditioner, first_stage)
    run(tmp_path / "last.ckpt", tmp_path / "sd.safetensors")
    model = read(tmp_path / "sd.safetensors")
    assert same(model.unet.state, unet)
    assert same(model.average.state, averaged)
    assert model.average[1:] == (5, 0.9999)
    assert same(model.autoencoder.state, first_stage.state_dict())
    assert same(model.text_encoder.tensors, conditioner.encoder.tower.state_dict())
    assert model.text_encoder.settings() == text_encoder.settings()
    assert (model.schedule, model.prediction) == (SCHEDULE, "v")


def test_a_real_run_of_stage_2_can_be_given_away(tiny_runs, tmp_path, capsys):
    run(tiny_runs / "demo/default/checkpoints/last.ckpt", tmp_path / "sd.safetensors")
    assert "left out, having no place in it: conditioner (" in " ".join(capsys.readouterr().err.split())
    run(tmp_path / "sd.safetensors", tmp_path / "ours")
    checkpoint = torch.load(tiny_runs / "demo/default/checkpoints/last.ckpt")
    average = checkpoint["ema"]["average"]
    for name, value in read(tmp_path / "ours").average.state.items():
        assert torch.equal(value, average[f"{PREFIX}{name}"])


class TestRefusals:
    def test_a_run_in_pixels(self, tmp_path, capsys, monkeypatch):
        fake_run(tmp_path / "last.ckpt", monkeypatch, torch.nn.Module(), torch.nn.Module())
        message = refused(capsys, tmp_path / "last.ckpt", tmp_path / "out")
        assert "is a model of pixels; allowed are models with an autoencoder; change SOURCE" in message

    def test_a_run_of_another_stage(self, tmp_path, capsys):
        torch.save({"state_dict": {"autoencoder.x": torch.zeros(1)}, "config": {}}, tmp_path / "last.ckpt")
        message = refused(capsys, tmp_path / "last.ckpt", tmp_path / "out")
        assert f"holds no tensor under '{PREFIX}'; allowed is a checkpoint of stage 2" in message

    def test_files_of_other_things(self, tmp_path, capsys):
        save_file({"x": torch.zeros(1)}, tmp_path / "x.safetensors")
        message = refused(capsys, tmp_path / "x.safetensors", tmp_path / "out")
        assert "holds no whole model; allowed are published ones" in message
        assert "nothing at" in refused(capsys, tmp_path / "none", tmp_path / "out")
        (tmp_path / "empty").mkdir()
        assert "has no unet/ and no vae/; allowed" in refused(capsys, tmp_path / "empty", tmp_path / "out")

    def test_damaged_files(self, tmp_path, capsys):
        write_model(tmp_path / "ours", "ldm_train", random_model())
        whole = (tmp_path / "ours" / UNET_FILE).read_bytes()
        (tmp_path / "ours" / UNET_FILE).write_bytes(whole[: len(whole) // 2])
        message = refused(capsys, tmp_path / "ours", tmp_path / "out")
        assert "cannot be read" in message
        assert "SOURCE" in message
        assert not (tmp_path / "out").exists()

    def test_nodes_with_code(self, tmp_path, capsys):
        write_model(tmp_path / "ours", "ldm_train", random_model())
        content = torch.load(tmp_path / "ours" / UNET_FILE)
        evil = {"_target_": "os.mkdir", "path": str(tmp_path / "ran")}
        for change in ({"unet": evil}, {"schedule": evil}, {"unet": SMALL_UNET | {"dropout": evil}}):
            torch.save(content | change, tmp_path / "ours" / UNET_FILE)
            assert "; allowed " in refused(capsys, tmp_path / "ours", tmp_path / "out.ckpt")
        assert not (tmp_path / "ran").exists()

    @pytest.mark.parametrize(
        ("target", "options", "said"),
        [
            ("out.pt", "", "ends in '.pt'; allowed are names in .ckpt and .safetensors for compvis"),
            ("out.ckpt", "--to diffusers", "ends in '.ckpt'; allowed"),
            ("out", "--to compvis", "change TARGET or --to"),
            (".", "", "ends in ''"),
            ("out", "--override seed=3", "seed=3 is no part of the model; allowed are KEY=VALUE with a KEY in unet."),
        ],
    )
    def test_targets_and_options_are_judged_before_any_work(self, target, options, said, tmp_path, capsys):
        if target == ".":
            said = "is there already; allowed is a new name"
        assert said in refused(capsys, tmp_path / "no source.ckpt", tmp_path / target, *options.split())

    def test_what_a_format_cannot_hold(self, tmp_path, capsys):
        write_model(tmp_path / "ours", "ldm_train", random_model(PLAIN_UNET | {"vector_dim": 3}, KINDS["vq"], None))
        message = refused(capsys, tmp_path / "ours", tmp_path / "out")
        assert "diffusers knows only none there; change `unet.vector_dim`, or choose another format" in message
        assert not (tmp_path / "out").exists()

    def test_an_unknown_prediction(self, tmp_path, capsys):
        write_model(tmp_path / "ours", "ldm_train", random_model())
        content = torch.load(tmp_path / "ours" / UNET_FILE)
        torch.save(content | {"prediction": "score"}, tmp_path / "ours" / UNET_FILE)
        message = refused(capsys, tmp_path / "ours", tmp_path / "out")
        assert f"the prediction is 'score'; allowed are {', '.join(PREDICTIONS)}; change --prediction" in message
