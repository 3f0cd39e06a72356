"""Models of every layout and adapters of every file draw what they should, side by side with other routes to it."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from convert_model import Source, read_model, write_model
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from ldm_train.interchange import AdapterBase, AdapterMetadata, TextShape, read_adapters, write_adapters
from ldm_train.interchange.adapter_names import layers_of
from ldm_train.nn import LowRank
from ldm_train.randomness import Stream, normal
from tests.interchange.models import WIDTH, random_model
from tests.interchange.unets import PLAIN_UNET, SMALL_UNET
from tests.tools.drawn import PROMPTS, adapters, checkpoint, fields, pixels, run

SIZE = 32
BASE = AdapterBase(SMALL_UNET, TextShape(2, WIDTH))
TEXT_LAYER = "text_encoder.transformer.resblocks.0.mlp.c_fc"
UNET_LAYER = next(layer for layer in layers_of(BASE) if layer.key.endswith("to_k"))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """One model in all layouts."""
    root, model = tmp_path_factory.mktemp("models"), random_model()
    write_model(root / "sd.safetensors", "compvis", model)
    write_model(root / "sd.ckpt", "compvis", model)
    write_model(root / "folder", "diffusers", model)
    write_model(root / "ours", "ldm_train", model)
    return root


def drawn(model, folder, *options, steps=4, prompt="a red apple"):
    given = ["--checkpoint", model, "--prompt", prompt, "--steps", steps, "--image-size", SIZE]
    assert run(*given, "--device", "cpu", "--output", folder, *options) == 0
    return pixels(folder)


def test_every_layout_of_a_model_draws_the_same(models, tmp_path):
    first, *others = (drawn(models / n, tmp_path / n) for n in ("sd.safetensors", "sd.ckpt", "folder", "ours"))
    assert first.shape == (1, SIZE, SIZE, 3)
    assert first.std() > 10
    assert all((first == other).all() for other in others)


@pytest.mark.parametrize("width", [SIZE, 2 * SIZE])
def test_a_published_model_draws_what_diffusers_draws(models, tmp_path, width):
    given = ["--seed", 5, "--negative", "a face", "--width", width]
    ours = drawn(models / "sd.safetensors", tmp_path / "ours", *given, steps=10)
    pipe = StableDiffusionPipeline.from_pretrained(models / "folder", local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    shape = (4, SIZE // pipe.vae_scale_factor, width // pipe.vae_scale_factor)
    noise = normal(0, 0, torch.tensor([5]), Stream.SAMPLING, shape)
    options = {"num_inference_steps": 10, "guidance_scale": 7.5, "output_type": "np", "negative_prompt": "a face"}
    theirs = pipe("a red apple", latents=noise, height=SIZE, width=width, **options).images * 255
    assert ours.shape == theirs.shape
    assert np.abs(ours - theirs).max() < 2  # a byte is rounded, and sums are taken in another order


def test_raw_weights_are_drawn_from_where_they_are_asked_for(models, tmp_path):
    raw, averaged = drawn(models / "ours", tmp_path / "raw", "--raw"), drawn(models / "ours", tmp_path / "averaged")
    write_model(tmp_path / "alone", "ldm_train", replace(read_model(Source(models / "ours"))[0], average=None))
    assert (raw == drawn(tmp_path / "alone", tmp_path / "no_average")).all()
    assert (raw != averaged).any()


@pytest.mark.parametrize("concat", [5, 0])
def test_inpainting_models_are_told_the_hole(concat, tmp_path):
    write_model(tmp_path / "model", "ldm_train", random_model(unet=SMALL_UNET | {"concat_channels": concat}))
    rng = np.random.default_rng(0)
    picture, mask = rng.integers(0, 256, (SIZE, SIZE, 3), np.uint8), np.zeros((SIZE, SIZE), np.uint8)
    mask[:, 16:] = 255
    Image.fromarray(picture).save(tmp_path / "picture.png")
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = ["--image", tmp_path / "picture.png", "--mask", tmp_path / "mask.png"]
    filled = drawn(tmp_path / "model", tmp_path / "filled", *given)[0]
    assert (filled[:, :16] == picture[:, :16]).all()
    assert (filled[:, 16:] != picture[:, 16:]).any()


def test_models_of_nothing_need_no_text_encoder_and_draw_the_same_whatever_they_are_told(models, tmp_path):
    write_model(tmp_path / "model", "ldm_train", random_model(unet=PLAIN_UNET, text=None))
    for model, is_alike in ((tmp_path / "model", True), (models / "ours", False)):
        apple, flag = (drawn(model, tmp_path / f"{is_alike}{said}", prompt=said) for said in ("a red apple", "a flag"))
        assert apple.std() > 10
        assert (apple == flag).all() == is_alike


def test_a_condition_that_the_file_does_not_hold_is_named(tmp_path, capsys):
    write_model(tmp_path / "model", "ldm_train", random_model(text=None))
    assert run("--checkpoint", tmp_path / "model", "--prompt", "a", "--output", tmp_path / "out") == 2
    assert f"takes a context of width {WIDTH}" in capsys.readouterr().err


def low_rank(weight_shape, seed, alpha=1.0):
    generator = torch.Generator().manual_seed(seed)
    out_features, in_features = weight_shape
    down = torch.randn(2, in_features, generator=generator) * in_features**-0.5
    return LowRank(down, torch.randn(out_features, 2, generator=generator), alpha)


def change(seed, alpha=1.0):
    """Adapters of a layer of each network."""
    shapes = {TEXT_LAYER: (4 * WIDTH, WIDTH), UNET_LAYER.key: UNET_LAYER.weight_shape}
    return {name: low_rank(shape, seed + 100 * i, alpha) for i, (name, shape) in enumerate(shapes.items())}


def written(path, layers, layout="kohya", **metadata):
    write_adapters(path, layers, AdapterMetadata(BASE, **metadata), layout)
    return path


@pytest.mark.parametrize("layout", ["ours", "kohya", "diffusers"])
def test_adapters_of_every_layout_change_the_picture_alike(layout, models, tmp_path):
    base = drawn(models / "ours", tmp_path / "base")
    one = drawn(models / "ours", tmp_path / "one", "--lora", written(tmp_path / "a.safetensors", change(0), layout))
    ours = drawn(models / "ours", tmp_path / "two", "--lora", written(tmp_path / "b.safetensors", change(0), "ours"))
    assert (one == ours).all()
    assert np.abs(one - base).mean() > 1


def test_weight_0_is_the_base_model_and_negative_weights_are_other_pictures(models, tmp_path):
    file = written(tmp_path / "a.safetensors", change(0))
    base = drawn(models / "ours", tmp_path / "base")
    assert (drawn(models / "ours", tmp_path / "0", "--lora", f"{file}=0") == base).all()
    up, down = (drawn(models / "ours", tmp_path / weight, "--lora", f"{file}={weight}") for weight in ("1", "-1"))
    assert (up != down).any()


def test_two_adapters_are_the_sum_of_their_changes(models, tmp_path):
    one, two = change(1), change(2, alpha=0.7)
    both = {
        name: LowRank(
            torch.cat([one[name].down, two[name].down]),
            torch.cat([0.5 * one[name].up, -1.5 * 0.7 * two[name].up], dim=1),
            1.0,
        )
        for name in one
    }
    first, second = (written(tmp_path / f"{i}.safetensors", layers) for i, layers in enumerate((one, two)))
    apart = drawn(models / "ours", tmp_path / "apart", "--lora", f"{first}=0.5", "--lora", f"{second}=-1.5")
    together = drawn(models / "ours", tmp_path / "together", "--lora", written(tmp_path / "s.safetensors", both))
    alone = drawn(models / "ours", tmp_path / "alone", "--lora", f"{first}=0.5")
    assert np.abs(apart - together).max() <= 1
    assert np.abs(apart - alone).mean() > 1


def test_trigger_words_are_said_and_the_file_is_in_the_picture(models, tmp_path, capsys):
    file = written(tmp_path / "a.safetensors", change(0), trigger_words=("sks", "emoji style"))
    drawn(models / "ours", tmp_path / "out", "--lora", f"{file}=0.25")
    assert "trigger words of a.safetensors: sks, emoji style" in " ".join(capsys.readouterr().err.split())
    found = fields(tmp_path / "out" / "00000.png")
    assert found["lora"] == f"{file}=0.25"
    assert 'Lora hashes: "a: ' in found["parameters"]


def test_adapters_of_other_shapes_are_refused(models, tmp_path, capsys):
    other = AdapterBase(SMALL_UNET, TextShape(2, WIDTH + 3))
    wide = {TEXT_LAYER: low_rank((4 * (WIDTH + 3), WIDTH + 3), 0)}
    write_adapters(tmp_path / "wide.safetensors", wide, AdapterMetadata(other))
    given = ["--checkpoint", models / "ours", "--prompt", "a", "--output", tmp_path / "out"]
    assert run(*given, "--lora", tmp_path / "wide.safetensors") == 2
    message = capsys.readouterr().err
    assert "does not fit the model of --checkpoint" in message
    assert "other shapes than the base model" in message
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def strong(tiny_runs, tmp_path_factory):
    """The adapters of the LoRA run with a thousand times the effect: a few steps of training change no byte."""
    with safe_open(adapters(tiny_runs), framework="pt") as file:
        metadata, state = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    path = tmp_path_factory.mktemp("lora") / "strong.safetensors"
    save_file({k: v * 1000 if k.endswith(".alpha") else v for k, v in state.items()}, path, metadata=metadata)
    return path


def test_the_adapters_of_a_run_change_its_pictures_by_their_weight(draw, strong):
    base = pixels(draw("base"))
    assert (base == pixels(draw("none", "--lora", f"{strong}=0"))).all()
    assert (base != pixels(draw("all", "--lora", strong))).any()


def test_the_checkpoint_of_a_lora_run_is_its_base_with_its_adapters(draw, tiny_runs, capsys):
    with_file = pixels(draw("with_file", "--lora", adapters(tiny_runs)))
    assert "trained on" not in capsys.readouterr().err
    assert (with_file == pixels(draw("run", name="demo_lora"))).all()


def test_adapters_of_another_base_are_named(draw, strong, tmp_path, capsys):
    file = read_adapters(strong)
    other = replace(file.metadata, base_digest="0123456789abcdef")
    write_adapters(tmp_path / "other.safetensors", file.adapters, other)
    draw("other", "--lora", tmp_path / "other.safetensors", prompts=PROMPTS[:1])
    assert "was trained on the U-Net 0123456789ab" in capsys.readouterr().err
    draw("own", "--lora", strong, prompts=PROMPTS[:1])
    assert "was trained on" not in capsys.readouterr().err


def test_adapters_that_name_no_base_are_warned_of_only_for_what_was_guessed(draw, strong, tmp_path, capsys):
    file, path = read_adapters(strong), tmp_path / "downloaded.safetensors"
    write_adapters(path, file.adapters, replace(file.metadata, base_digest=None), "kohya")
    draw("whole", "--lora", path, prompts=PROMPTS[:1])
    assert "warning" not in capsys.readouterr().err
    save_file({name: value for name, value in load_file(path).items() if not name.endswith(".alpha")}, path)
    draw("without", "--lora", path, prompts=PROMPTS[:1])
    guessed = f"{path}: {len(file.adapters)} adapters say no alpha; it is taken for their rank, a scale of 1"
    assert guessed in capsys.readouterr().err


def test_adapters_of_other_layers_are_refused(tiny_runs, tmp_path, capsys):
    with safe_open(adapters(tiny_runs), framework="pt") as file:
        state = {f"other.{name}": file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, tmp_path / "other.safetensors")
    given = ["--checkpoint", checkpoint(tiny_runs), "--prompt", "a", "--output", tmp_path]
    assert run(*given, "--lora", tmp_path / "other.safetensors") == 2
    assert "does not fit the model of --checkpoint" in capsys.readouterr().err
