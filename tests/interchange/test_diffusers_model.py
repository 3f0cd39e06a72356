"""A folder of ours is a pipeline of diffusers: it loads, and computes what ours computes."""

import json
from dataclasses import replace

import diffusers
import open_clip
import pytest
import torch
from safetensors.torch import load_file, save_file

from ldm_train.interchange import export_diffusers_model, import_diffusers_model
from ldm_train.interchange.diffusers_model import Folder

from .models import SMALL_UNET, encoder_of, random_model
from .networks import KINDS, same
from .unets import PLAIN_UNET

MODELS = {
    "stable diffusion 1": {},
    "stable diffusion 2": {
        "unet": SMALL_UNET | {"num_heads": None, "head_channels": 8, "linear_projection": True},
        "text": "openclip",
        "prediction": "v",
    },
    "inpainting": {"unet": SMALL_UNET | {"concat_channels": 5}, "averaged": False},
    "unconditional": {"unet": PLAIN_UNET, "autoencoder": KINDS["vq"], "text": None},
}
CAPTIONS = ["A cat's 123 photos — höhle?", "", "an   astronaut riding a Horse, $1,000.50 (sold)", "猫 🐱 naïve"]


def written(folder, path):
    for part, tensors in folder.tensors.items():
        (path / part).mkdir(parents=True)
        name = "model.safetensors" if part == "text_encoder" else "diffusion_pytorch_model.safetensors"
        save_file(tensors, path / part / name, metadata={"format": "pt"})
    for name, text in folder.documents().items():
        (path / name).parent.mkdir(exist_ok=True)
        (path / name).write_text(text)
    return path


def read(path):
    """A folder as diffusers left it."""
    configs = {file.parent.name: json.loads(file.read_text()) for file in path.glob("*/*config.json")}
    tensors = {file.parent.name: load_file(file) for file in path.glob("*/*.safetensors")}
    return Folder(configs, tensors, {})


def used(text_encoder):
    """The tensors of the layers that are used."""
    kept = encoder_of(text_encoder).tower.state_dict()
    return {name: value for name, value in text_encoder.tensors.items() if name in kept}


@pytest.mark.parametrize("kind", MODELS.values(), ids=MODELS)
def test_export_then_import_is_the_identity(kind):
    model = random_model(**kind)
    found = import_diffusers_model(export_diffusers_model(model))
    weights = model.average or model.unet
    assert same(found.unet.state, weights.state)
    assert found.autoencoder.state.keys() <= model.autoencoder.state.keys()
    assert all(torch.equal(value, model.autoencoder.state[name]) for name, value in found.autoencoder.state.items())
    assert (found.schedule, found.prediction, found.average) == (model.schedule, model.prediction, None)
    if model.text_encoder is None:
        assert found.text_encoder is None
    else:
        assert same(found.text_encoder.tensors, used(model.text_encoder))
        assert found.text_encoder.settings() == model.text_encoder.settings()


@pytest.mark.parametrize("kind", list(MODELS.values())[:3], ids=list(MODELS)[:3])
def test_diffusers_loads_and_saves_the_same_model(kind, tmp_path):
    model = random_model(**kind)
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        written(export_diffusers_model(model), tmp_path / "ours"), local_files_only=True
    )
    assert type(pipe).__name__ == (
        "StableDiffusionInpaintPipeline" if "concat_channels" in model.unet.node else "StableDiffusionPipeline"
    )
    pipe.save_pretrained(tmp_path / "theirs")
    found = import_diffusers_model(read(tmp_path / "theirs"))
    assert same(found.unet.state, (model.average or model.unet).state)
    assert same(found.text_encoder.tensors, used(model.text_encoder))
    assert found.text_encoder.settings() == model.text_encoder.settings()
    assert same(found.autoencoder.state, model.autoencoder.state)
    assert (found.schedule, found.prediction) == (model.schedule, model.prediction)


@pytest.mark.parametrize("kind", list(MODELS.values())[:2], ids=list(MODELS)[:2])
def test_the_pipeline_reads_captions_as_ours_does(kind, tmp_path):
    model = random_model(**kind)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        written(export_diffusers_model(model), tmp_path / "ours"), local_files_only=True
    )
    theirs = pipe.tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
    ours = open_clip.tokenizer.SimpleTokenizer(context_length=77)(CAPTIONS)
    length = (ours == ours.max()).int().argmax(1) + 1
    for row, count in enumerate(length.tolist()):
        assert theirs.input_ids[row, :count].tolist() == ours[row, :count].tolist()
        padding = 49407 if model.text_encoder.activation == "quick_gelu" else 0
        assert set(theirs.input_ids[row, count:].tolist()) == {padding}
    with torch.no_grad():
        found = pipe.text_encoder(theirs.input_ids).last_hidden_state
        torch.testing.assert_close(encoder_of(model.text_encoder)(theirs.input_ids), found, rtol=1e-4, atol=1e-5)


def test_the_pipeline_draws_a_picture(tmp_path):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(
        written(export_diffusers_model(random_model(), sample_size=8), tmp_path / "ours"), local_files_only=True
    )
    pipe.set_progress_bar_config(disable=True)
    images = pipe("a cat", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 8 * 2**2, 8 * 2**2, 3)  # three levels of the autoencoder
    assert images.std() > 0.01


def test_the_unused_last_layer_of_openclip_is_left_out():
    model = random_model(text="openclip")
    folder = export_diffusers_model(model)
    assert folder.configs["text_encoder"]["num_hidden_layers"] == 2
    assert not any("layers.2." in name for name in folder.tensors["text_encoder"])


def test_missing_parts_are_refused():
    folder = export_diffusers_model(random_model())
    without = {part: config for part, config in folder.configs.items() if part not in ("unet", "vae")}
    with pytest.raises(ValueError, match=r"the folder has no unet/ and no vae/; allowed is .*; name another SOURCE"):
        import_diffusers_model(folder._replace(configs=without))


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match=r"schedule of the model is unknown; allowed .*; name it with --schedule"):
        export_diffusers_model(replace(random_model(), schedule=None))


def test_an_unknown_text_encoder_is_refused():
    folder = export_diffusers_model(random_model())
    for change, message in (
        ({"architectures": ["T5EncoderModel"]}, "`architectures` of config.json is T5EncoderModel"),
        ({"hidden_act": "relu"}, "`hidden_act` of config.json is relu"),
        ({"num_hidden_layers": 3}, "12 tensors of the text encoder are missing or unknown"),
    ):
        configs = folder.configs | {"text_encoder": folder.configs["text_encoder"] | change}
        with pytest.raises(ValueError, match=rf"{message}.*; name another SOURCE"):
            import_diffusers_model(folder._replace(configs=configs))
