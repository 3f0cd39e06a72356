"""The same weights in diffusers' own classes give the same prediction; there and back again nothing has changed."""

import json

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from ldm_train.interchange import UNetArchitecture, build_unet, export_diffusers_unet, import_diffusers_unet
from ldm_train.interchange.unet_diffusers import (
    _FIXED,
    _FIXED_CONDITION,
    _FIXED_PLAIN,
    DIFFUSERS_UNET_XL,
    unet_architecture_of,
)
from ldm_train.interchange.unet_layout import unet_from_ours
from ldm_train.nn.embedding import sinusoidal_embedding

from .networks import same
from .unets import DIFFUSERS_KINDS, PLAIN_UNET, PUBLISHED_KINDS, SD1, SD2, SMALL_UNET, inputs, random_unet


def theirs(config, tensors):
    """Diffusers' U-Net with these very tensors: the large ones exist once."""
    with torch.device("meta"):
        model = getattr(diffusers, config["_class_name"]).from_config(config).eval()
    model.load_state_dict(tensors, strict=True, assign=True)
    return model


@torch.no_grad()
def predicted(model, x_t, t, conditioning):
    """What a U-Net of diffusers says."""
    x = x_t if conditioning.concat is None else torch.cat([x_t, conditioning.concat], dim=1)
    if isinstance(model, diffusers.UNet2DModel):
        return model(x, t).sample
    return model(x, t, conditioning.context, class_labels=conditioning.vector).sample


def assert_equal_predictions(node):
    unet, arguments = random_unet(node), inputs(node)
    with torch.no_grad():
        ours = unet(*arguments)
    config, tensors = export_diffusers_unet(node, unet.state_dict())
    found = predicted(theirs(json.loads(json.dumps(config)), tensors), *arguments)
    assert float((ours - found).norm() / ours.norm()) < 1e-5
    assert float(ours.std()) > 1e-3, "equal because constant"


@pytest.mark.parametrize("node", DIFFUSERS_KINDS.values(), ids=DIFFUSERS_KINDS)
def test_predictions_are_those_of_diffusers(node):
    assert_equal_predictions(node)


@pytest.mark.slow
@pytest.mark.parametrize("node", [SD1, SD2], ids=["sd1", "sd2"])
def test_predictions_of_the_published_sizes_are_those_of_diffusers(node):
    assert_equal_predictions(node)


@pytest.mark.parametrize("node", DIFFUSERS_KINDS.values(), ids=DIFFUSERS_KINDS)
def test_export_then_import_is_the_identity(node):
    state = random_unet(node).state_dict()
    config, tensors = export_diffusers_unet(node, state)
    imported, found = import_diffusers_unet(json.loads(json.dumps(config)), tensors, node["in_channels"])
    assert UNetArchitecture.of(imported) == UNetArchitecture.of(node)
    assert same(found, state)


@pytest.mark.parametrize("node", [SMALL_UNET, PLAIN_UNET], ids=["transformers", "plain"])
def test_a_folder_that_diffusers_wrote_is_read(node, tmp_path):
    state = random_unet(node).state_dict()
    theirs(*export_diffusers_unet(node, state)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    _, found = import_diffusers_unet(config, load_file(tmp_path / "diffusion_pytorch_model.safetensors"), 4)
    assert same(found, state)


def test_the_published_config_of_stable_diffusion_1_means_our_sd1():
    """The keys that the published unet/config.json has; `attention_head_dim` is the number of heads there."""
    published = {
        "_class_name": "UNet2DConditionModel",
        "_diffusers_version": "0.6.0",
        "act_fn": "silu",
        "attention_head_dim": 8,
        "block_out_channels": [320, 640, 1280, 1280],
        "center_input_sample": False,
        "cross_attention_dim": 768,
        "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        "sample_size": 64,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    }
    assert unet_architecture_of(published, 4) == UNetArchitecture.of(SD1)
    inpainting = unet_architecture_of(published | {"in_channels": 9}, 4)
    assert inpainting == UNetArchitecture.of(SD1 | {"concat_channels": 5})
    second = {"attention_head_dim": [5, 10, 20, 20], "cross_attention_dim": 1024, "use_linear_projection": True}
    assert unet_architecture_of(published | second, 4) == UNetArchitecture.of(SD2)


def test_the_vector_of_stable_diffusion_xl_has_names_of_its_own():
    node = SMALL_UNET | {"vector_dim": 20 + 6 * 8}
    unet, arguments = random_unet(node), inputs(node)
    config, _ = export_diffusers_unet(node, unet.state_dict())
    tensors = unet_from_ours(unet.state_dict(), DIFFUSERS_UNET_XL, UNetArchitecture.of(node))
    config |= {"class_embed_type": None, "addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    model = theirs(config, tensors)
    imported, state = import_diffusers_unet(config, tensors, 4)
    assert same(state, unet.state_dict())
    assert UNetArchitecture.of(imported) == UNetArchitecture.of(node)
    pooled, sizes = torch.randn(2, 20), torch.randint(1, 1000, (2, 6))
    x_t, t, conditioning = arguments
    with torch.no_grad():
        more = {"text_embeds": pooled, "time_ids": sizes}
        found = model(x_t, t, conditioning.context, added_cond_kwargs=more).sample
        vector = torch.cat([pooled, sinusoidal_embedding(sizes.flatten(), 8).view(2, -1)], dim=1)
        torch.testing.assert_close(unet(x_t, t, conditioning._replace(vector=vector)), found, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("node", [SMALL_UNET, PLAIN_UNET], ids=["transformers", "plain"])
def test_settings_that_change_the_prediction_are_refused(node):
    """Each is changed in turn; none may be read as if it were not there."""
    config, _ = export_diffusers_unet(node, random_unet(node).state_dict())
    fixed = _FIXED | (_FIXED_PLAIN if node is PLAIN_UNET else _FIXED_CONDITION)
    for key in fixed:
        with pytest.raises(
            ValueError, match=rf"`{key}` of config.json is other; allowed here: .*; name another SOURCE"
        ):
            unet_architecture_of(config | {key: "other"}, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_class_name": "UNet3DConditionModel"}, "`_class_name` of config.json is UNet3DConditionModel"),
        ({"block_out_channels": [32, 48, 64]}, r"`block_out_channels` of config.json is \[32, 48, 64\]"),
        ({"block_out_channels": []}, r"`block_out_channels` of config.json is \[\]"),
        ({"block_out_channels": None}, "`block_out_channels` of config.json is None"),
        ({"down_block_types": ["DownBlock2D"]}, "`down_block_types` of config.json is"),
        ({"down_block_types": ["AttnDownBlock2D"] * 3}, "`down_block_types` of config.json is AttnDownBlock2D"),
        ({"down_block_types": None}, "`down_block_types` of config.json is None"),
        ({"up_block_types": ["UpBlock2D"] * 3}, "`up_block_types` of config.json is"),
        ({"attention_head_dim": [4, 4]}, r"`attention_head_dim` of config.json is \[4, 4\]"),
        ({"attention_head_dim": "4"}, "`attention_head_dim` of config.json is '4'"),
        ({"cross_attention_dim": [24, 24, 24]}, r"`cross_attention_dim` of config.json is \[24, 24, 24\]"),
        ({"transformer_layers_per_block": [1, [1, 2], 1]}, "`transformer_layers_per_block` of config.json is"),
        ({"time_embedding_dim": 32}, "`time_embedding_dim` of config.json is 32"),
        ({"resnet_time_scale_shift": "spatial"}, "`resnet_time_scale_shift` of config.json is spatial"),
        ({"in_channels": 3}, "`in_channels` of config.json is 3"),
        ({"class_embed_type": "projection"}, "`projection_class_embeddings_input_dim` of config.json is 0"),
        ({"attention_head_dim": [1, 2, 8]}, r"have \[1, 2, 8\] attention heads"),
    ],
)
def test_what_a_u_net_cannot_be_is_refused(change, message):
    config, tensors = export_diffusers_unet(SMALL_UNET, random_unet(SMALL_UNET).state_dict())
    with pytest.raises(ValueError, match=rf"{message}.*allowed .*; name another SOURCE"):
        import_diffusers_unet(config | change, tensors, 4)


def test_a_file_that_is_no_config_is_refused():
    with pytest.raises(ValueError, match=r"config.json holds list; allowed is .*; name another SOURCE"):
        unet_architecture_of([], 4)


@pytest.mark.parametrize(
    ("node", "key"),
    [
        (SMALL_UNET | {"channel_multipliers": [2, 2]}, "channel_multipliers"),
        (SMALL_UNET | {"context_dim": None}, "context_dim"),
        (PUBLISHED_KINDS["transformers, residual resampling"], "resample"),
        (PUBLISHED_KINDS["plain, a number of heads"], "head_channels"),
        (PUBLISHED_KINDS["plain, vector"], "vector_dim"),
    ],
)
def test_what_diffusers_cannot_describe_is_refused(node, key):
    with pytest.raises(ValueError, match=rf"; diffusers knows only .*; change `unet.{key}`"):
        export_diffusers_unet(node, build_unet(node).state_dict())
