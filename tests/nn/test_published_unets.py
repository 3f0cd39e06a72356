"""The published U-Nets (Rombach et al. 2022, tables 10 to 15; Podell et al. 2023), as `conf/unet` has them."""

from typing import NamedTuple

import hydra
import pytest
import torch

from ldm_train.config import conf_dir
from ldm_train.nn.attention import PlainAttention, SpatialTransformer
from ldm_train.nn.resnet import ResidualBlock
from tests.conftest import composed


class Published(NamedTuple):
    """A network of the literature: what it is used with, and its size."""

    autoencoder: str
    parameters: int
    context: int | None = None
    vector: int | None = None
    concat: int = 0


PUBLISHED = {
    "sd1": Published("kl_f8", 859_520_964, context=768),
    "sd1 for inpainting": Published("kl_f8", 859_535_364, context=768, concat=5),
    "sd2": Published("kl_f8", 865_910_724, context=1024),
    "sdxl": Published("kl_f8", 2_567_463_684, context=2048, vector=2816),
    "ldm_imagenet": Published("vq_f4", 400_920_579, context=512),
    "ldm_imagenet_f8": Published("vq_f8", 394_984_196, context=512),
    "ldm_faces": Published("vq_f4", 274_056_163),
    "ldm_churches": Published("kl_f8", 294_966_916),
    "ldm_text": Published("vq_f4", 403_623_939, context=640),
    "ldm_text_1p4b": Published("kl_f8", 872_300_484, context=1280),
    "ldm_layout": Published("vq_f4", 246_277_379, context=512),
    "ldm_inpainting": Published("vq_f4_noattn", 387_245_827, concat=4),
    "ldm_semantic": Published("vq_f4", 215_229_315, concat=3),
    "ldm_superres": Published("vq_f4", 113_622_563, concat=3),
    "rdm": Published("kl_f16", 1_335_480_400, context=768),
    "sgm_imagenet": Published("kl_f8", 407_307_012, context=1024, vector=1024),
}
HEADS = {
    # option: attention heads, outermost level first, as far as there is attention
    "sd1": {320: 8, 640: 8, 1280: 8},
    "sd2": {320: 5, 640: 10, 1280: 20},
    "sdxl": {640: 10, 1280: 20},
    "ldm_imagenet": {384: 1, 576: 1, 960: 1},
    "ldm_faces": {448: 14, 672: 21, 896: 28},
    "ldm_churches": {192: 8, 384: 8, 768: 8},
    "ldm_superres": {640: 20},
}


def built(name):
    """The U-Net of a config, without memory for its weights."""
    option, published = name.split()[0], PUBLISHED[name]
    conditioner = {"context_dim": published.context, "vector_dim": published.vector}
    widths = [f"+conditioner.{key}={value}" for key, value in conditioner.items() if value is not None]
    widths += [f"+conditioner.concat_channels={published.concat}"]
    cfg = composed(
        "stage=latent_diffusion", f"unet={option}", f"autoencoder={published.autoencoder}", "conditioner={}", *widths
    )
    with torch.device("meta"):
        return hydra.utils.instantiate(cfg.unet, _convert_="all")


@pytest.mark.parametrize("name", PUBLISHED)
def test_unets_have_the_published_size(name):
    assert sum(parameter.numel() for parameter in built(name).parameters()) == PUBLISHED[name].parameters


@pytest.mark.parametrize("option", HEADS)
def test_attention_has_the_published_heads(option):
    heads = {}
    for name, module in built(option).named_modules():
        if isinstance(module, PlainAttention) or name.endswith("self_attention"):
            heads[module.to_q.in_features] = module.num_heads
    assert heads == HEADS[option]


def test_stable_diffusion_1_and_2_have_686_weights_and_no_buffer():
    for option in ("sd1", "sd2"):
        model = built(option)
        assert len(list(model.parameters())) == len(model.state_dict()) == 686


def test_sdxl_has_transformers_of_its_published_depths():
    transformers = [module for module in built("sdxl").modules() if isinstance(module, SpatialTransformer)]
    contracting, middle, expanding = [2, 2, 10, 10], [10], [10, 10, 10, 2, 2, 2]
    # In the order of the names: the way down, the way up, the middle.
    assert [len(module.blocks) for module in transformers] == contracting + expanding + middle


def test_semantic_synthesis_attends_in_the_middle_alone():
    names = [name for name, module in built("ldm_semantic").named_modules() if isinstance(module, PlainAttention)]
    assert names == ["middle_in.attention"]


@pytest.mark.parametrize(("option", "resampled", "scales"), [("ldm_churches", 8, True), ("ldm_inpainting", 6, False)])
def test_resolution_is_changed_by_residual_blocks_where_published(option, resampled, scales):
    blocks = [module for module in built(option).modules() if isinstance(module, ResidualBlock)]
    assert sum(block.resample is not None for block in blocks) == resampled
    assert {block.scales for block in blocks} == {scales}


def test_every_option_but_the_demo_s_is_published():
    options = {path.stem for path in (conf_dir() / "unet").glob("*.yaml")}
    assert options - {"tiny"} == {name.split()[0] for name in PUBLISHED}
