"""The same weights in diffusers' own classes give the same numbers; there and back again nothing has changed."""

import json

import diffusers
import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from ldm_train.interchange import Architecture, export_diffusers, import_diffusers
from ldm_train.interchange.diffusers import DIFFUSERS_OLD, architecture_of
from ldm_train.interchange.layout import from_ours

from ..conftest import composed
from .networks import KINDS, SMALL, images, learned, random_autoencoder, same


def calibrated(node):
    autoencoder = random_autoencoder(node)
    channels = torch.arange(autoencoder.latent_channels)
    autoencoder.calibrate(0.1 * channels - 0.2, 0.7 + 0.3 * channels)
    return autoencoder


def theirs(node, autoencoder):
    config, tensors = export_diffusers(node, autoencoder.state_dict())
    model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    model.load_state_dict(tensors, strict=True)
    return model


@torch.no_grad()
def moments_and_image(model, x, z):
    """What diffusers' encoder says of images, and what its decoder makes of latents."""
    if isinstance(model, diffusers.VQModel):
        return model.encode(x).latents, model.decode(z).sample
    return model.encode(x).latent_dist.parameters, model.decode(z).sample


def assert_equal_outputs(node, size):
    autoencoder = calibrated(node)
    x = images(node, size)
    with torch.no_grad():
        moments = autoencoder.moments(x)
        z = autoencoder.regularizer.mode(moments)
        image = autoencoder.decode(autoencoder.normalise(z))
        if node["latent_channels"] * 2 == moments.shape[1]:  # as diffusers clamps what it calls parameters
            moments = torch.cat([z, moments[:, node["latent_channels"] :].clamp(-30, 20)], dim=1)
    found = moments_and_image(theirs(node, autoencoder), x, z)
    for ours, other in zip((moments, image), found, strict=True):
        assert float((ours - other).norm() / ours.norm()) < 1e-5
        assert float(ours.std()) > 1e-3, "equal because constant"


@pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
def test_outputs_are_those_of_diffusers(node):
    assert_equal_outputs(node, size=16)


@pytest.mark.parametrize("option", ["kl_f8", "vq_f4"])
def test_outputs_of_the_published_sizes_are_those_of_diffusers(option):
    assert_equal_outputs(OmegaConf.to_container(composed(f"autoencoder={option}").autoencoder, resolve=True), size=32)


@pytest.mark.parametrize("is_calibrated", [True, False], ids=["calibrated", "uncalibrated"])
@pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
def test_export_then_import_is_the_identity(node, is_calibrated):
    autoencoder = (calibrated if is_calibrated else random_autoencoder)(node)
    config, tensors = export_diffusers(node, autoencoder.state_dict())
    imported = import_diffusers(json.loads(json.dumps(config)), tensors)
    assert Architecture.of(imported.node) == Architecture.of(node)
    assert same(imported.state, learned(autoencoder))


def test_a_folder_that_diffusers_wrote_is_read(tmp_path):
    autoencoder = calibrated(SMALL)
    theirs(SMALL, autoencoder).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    imported = import_diffusers(config, load_file(tmp_path / "diffusion_pytorch_model.safetensors"))
    assert same(imported.state, learned(autoencoder))


def test_older_names_of_attention_are_read():
    node = KINDS["attention in levels"]
    autoencoder = calibrated(node)
    config, _ = export_diffusers(node, autoencoder.state_dict())
    tensors = from_ours(autoencoder.state_dict(), DIFFUSERS_OLD, Architecture.of(node))
    assert "encoder.mid_block.attentions.0.query.weight" in tensors
    assert same(import_diffusers(config, tensors).state, learned(autoencoder))


def test_attention_weights_may_have_the_shape_of_convolutions():
    autoencoder = calibrated(SMALL)
    config, tensors = export_diffusers(SMALL, autoencoder.state_dict())
    name = "encoder.mid_block.attentions.0.to_q.weight"
    convolutions = tensors | {name: tensors[name][:, :, None, None]}
    assert same(import_diffusers(config, convolutions).state, learned(autoencoder))


def test_absent_1x1_convolutions_are_identities():
    """Stable Diffusion 3 and Flux have none."""
    autoencoder = calibrated(SMALL)
    config, tensors = export_diffusers(SMALL, autoencoder.state_dict())
    without = {n: v for n, v in tensors.items() if not n.startswith(("quant_conv", "post_quant_conv"))}
    config |= {"use_quant_conv": False, "use_post_quant_conv": False}
    model = diffusers.AutoencoderKL.from_config(config).eval()
    model.load_state_dict(without, strict=True)
    imported = import_diffusers(config, without)
    ours = random_autoencoder(imported.node)
    ours.load_state_dict(imported.state)
    x = images(SMALL)
    with torch.no_grad():
        z = ours.regularizer.mode(ours.moments(x))
        found = moments_and_image(model, x, z)
        torch.testing.assert_close(found[0][:, :4], z, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(found[1], ours.decode(ours.normalise(z)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "factor"), [("plain", 0.18215), ("vq", 1.0)])
def test_a_config_without_factor_means_the_published_one(kind, factor):
    config, tensors = export_diffusers(KINDS[kind], random_autoencoder(KINDS[kind]).state_dict())
    del config["scaling_factor"]
    std = import_diffusers(config, tensors).state["latent_std"]
    torch.testing.assert_close(std, torch.full_like(std, 1 / factor))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_class_name": "AutoencoderTiny"},
            "`_class_name` of config.json is AutoencoderTiny",
        ),
        ({"down_block_types": ["KDownBlock2D"] * 3}, "`down_block_types` of config.json is KDownBlock2D"),
        ({"up_block_types": ["AttnUpDecoderBlock2D"] * 3}, "`up_block_types` of config.json is"),
        ({"block_out_channels": [32, 48, 64]}, r"`block_out_channels` of config.json is \[32, 48, 64\]"),
        ({"block_out_channels": []}, r"`block_out_channels` of config.json is \[\]"),
        ({"block_out_channels": 32}, "`block_out_channels` of config.json is 32"),
        ({"down_block_types": None}, "`down_block_types` of config.json is None"),
        ({"act_fn": "gelu"}, "`act_fn` of config.json is gelu"),
        ({"norm_type": "spatial"}, "`norm_type` of config.json is spatial"),
        ({"out_channels": 6}, "`out_channels` of config.json is 6"),
        ({"_class_name": "VQModel", "vq_embed_dim": 8}, "`vq_embed_dim` of config.json is 8"),
    ],
)
def test_what_an_autoencoder_cannot_be_is_refused(change, message):
    config, _ = export_diffusers(SMALL, random_autoencoder(SMALL).state_dict())
    with pytest.raises(ValueError, match=rf"{message}.*; name another SOURCE"):
        architecture_of(config | change)


def test_a_file_that_is_no_config_is_refused():
    with pytest.raises(ValueError, match=r"config.json holds list; allowed is .*; name another SOURCE"):
        architecture_of([])


def test_a_config_that_says_too_little_is_refused():
    with pytest.raises(ValueError, match=r"config.json lacks block_out_channels, .*, up_block_types; .* name another"):
        architecture_of({"_class_name": "AutoencoderKL"})


def test_what_diffusers_cannot_describe_is_refused():
    node = SMALL | {"channel_multipliers": [2, 2]}
    with pytest.raises(ValueError, match=r"first channel multiplier is 2; .* change `autoencoder.channel_multipliers`"):
        export_diffusers(node, random_autoencoder(node).state_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers_per_block", "2"),
        ("latent_channels", "x"),
        ("latent_channels", None),
        ("norm_num_groups", 0),
        ("in_channels", True),
        ("num_vq_embeddings", 1.5),
        ("mid_block_add_attention", "yes"),
        ("use_quant_conv", [1]),
        ("block_out_channels", ["16", "32", "32"]),
        ("down_block_types", [["a"]] * 3),
        ("_class_name", []),
    ],
)
def test_values_of_another_type_are_refused(key, value):
    node = KINDS["vq"]
    config, tensors = export_diffusers(node, random_autoencoder(node).state_dict())
    with pytest.raises(ValueError, match=rf"`{key}` of config.json is .*; allowed .*; name another SOURCE"):
        import_diffusers(config | {key: value, "out_channels": value if key == "in_channels" else 3}, tensors)
