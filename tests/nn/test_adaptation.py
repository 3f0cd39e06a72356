"""Which layers get adapters, how many parameters these are, and what scale they have."""

import math
from itertools import pairwise

import pytest
import torch
from safetensors.torch import save

from ldm_train.conditioning import CLIPTextEncoder
from ldm_train.nn import PRESETS, Adaptation, UNet, adapted_layers, adapters_of, inject_adapters

from .test_unet import SMALL

UNETS = {
    "sd1": {"context_dim": 768, "num_heads": 8},
    "sd2": {"context_dim": 1024, "head_channels": 64, "linear_projection": True},
}
TOWERS = {"sd1": (768, 12, 12), "sd2": (1024, 24, 16)}


def unet_of(version):
    with torch.device("meta"):
        return UNet(4, 4, **UNETS[version])


def trainable(module):
    return sum(p.numel() for p in module.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("version", "preset", "layers", "parameters"),
    [
        ("sd1", "attention", 128, 797_184),
        ("sd1", "attention_and_feed_forward", 160, 1_496_064),
        ("sd1", "transformers", 192, 1_695_744),
        ("sd1", "transformers_and_residual_blocks", 278, 4_203_264),
        ("sd2", "attention", 128, 829_952),
        ("sd2", "attention_and_feed_forward", 160, 1_528_832),
        ("sd2", "transformers", 192, 1_728_512),
        ("sd2", "transformers_and_residual_blocks", 278, 4_236_032),
    ],
)
def test_the_presets_of_stable_diffusion_at_rank_4(version, preset, layers, parameters):
    unet = unet_of(version)
    assert len(inject_adapters(unet, Adaptation(preset, rank=4))) == layers
    assert trainable(unet) == parameters


def test_attention_costs_199296_parameters_a_rank():
    for rank in (1, 8, 64):
        unet = unet_of("sd1")
        inject_adapters(unet, Adaptation("attention", rank))
        assert trainable(unet) == 199_296 * rank


@pytest.mark.parametrize(
    ("version", "preset", "layers", "parameters"),
    [
        ("sd1", "attention", 48, 294_912),
        ("sd1", "transformers", 72, 663_552),
        ("sd2", "attention", 96, 786_432),
        ("sd2", "attention_and_feed_forward", 144, 1_769_472),
    ],
)
def test_the_presets_of_their_text_encoders_at_rank_4(version, preset, layers, parameters):
    with torch.device("meta"):
        tower = CLIPTextEncoder(*TOWERS[version]).tower
    assert len(inject_adapters(tower, Adaptation(preset, rank=4))) == layers
    assert trainable(tower) == parameters


def test_the_file_of_rank_4_on_attention_has_the_published_sizes():
    unet = unet_of("sd1")
    inject_adapters(unet, Adaptation("attention", rank=4))
    for dtype, size in ((torch.float32, 3.2e6), (torch.float16, 1.6e6)):
        change = {name: own.to(dtype) for name, own in adapters_of(unet, "default").items()}
        tensors = {f"unet.{name}.{part}": torch.zeros_like(getattr(own, part), device="cpu")
                   for name, own in change.items() for part in ("down", "up")}  # fmt: skip
        assert len(save(tensors)) == pytest.approx(size, rel=0.03)


def test_each_preset_holds_the_one_before_and_none_the_outermost_layers():
    chosen = []
    for preset in PRESETS:
        unet = UNet(**SMALL)
        chosen.append(set(inject_adapters(unet, Adaptation(preset, 1))))
    assert all(smaller < larger for smaller, larger in pairwise(chosen))
    left = {name for name, m in UNet(**SMALL).named_modules() if hasattr(m, "weight") and "norm" not in name}
    assert {name.partition(".")[0] for name in left - chosen[-1]} == {
        "conv_in", "conv_out", "time_embedding", "vector_embedding"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("mode", "scale"), [("direct", 2.0), ("alpha_over_rank", 2.0 / 8), ("rank_stabilised", 2.0 / math.sqrt(8))]
)
def test_the_scale_of_each_mode(mode, scale):
    unet = UNet(**SMALL)
    inject_adapters(unet, Adaptation("attention", rank=8, alpha=2.0, scale_mode=mode))
    assert {change.alpha for change in adapters_of(unet, "default").values()} == {scale}


def test_patterns_choose_layers_ranks_and_scales():
    unet = UNet(**SMALL)
    names = inject_adapters(
        unet,
        Adaptation(
            [r"down\..*to_[qk]", r"conv_out"],
            rank=4,
            alpha=8.0,
            scale_mode="alpha_over_rank",
            rank_pattern={r".*self.*": 2, r".*to_.*": 3},
            alpha_pattern={r".*to_q": 1.0},
        ),
    )
    assert all(name == "conv_out" or name[-4:] in ("to_q", "to_k") for name in names)
    for name, change in adapters_of(unet, "default").items():
        rank = 4 if name == "conv_out" else 2 if "self" in name else 3
        assert change.rank == rank
        assert change.alpha == (1.0 if name.endswith("to_q") else 8.0) / rank


def test_a_starts_random_with_rows_of_unit_expected_length_and_b_at_zero():
    unet = UNet(**SMALL)
    inject_adapters(unet, Adaptation(["middle_in.residual.conv_in"], rank=32))
    (change,) = adapters_of(unet, "default").values()
    assert not change.up.any()
    assert change.down.flatten(1).norm(dim=1).mean() == pytest.approx(1.0, rel=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"targets": "all"}, r"'all' is no preset; allowed are attention, .* change `stage.targets`"),
        (
            {"targets": ["nothing"]},
            r"match none of \d+ .*'time_embedding.layers.0'\); .* change `stage.targets`",
        ),
        ({"targets": [".*to_q", "nothing"]}, r"targets has 'nothing', which matches none of the .* `stage.targets`"),
        ({"targets": ["("]}, r"'\(', which is no regular expression .* change `stage.targets`"),
        ({"rank": 99}, r"rank is 99 for the layer .* of 32 x 32; allowed are 1 to 32; change `stage.rank`"),
        ({"rank": 0}, r"rank is 0 for the layer .* change `stage.rank` or `stage.rank_pattern`"),
        ({"rank_pattern": {"conv_in": 2}}, r"rank_pattern has 'conv_in', which matches none .* `stage.rank_pattern`"),
        ({"alpha_pattern": {"x": 2.0}}, r"alpha_pattern has 'x', which matches none .* `stage.alpha_pattern`"),
        ({"scale_mode": "rslora"}, r"scale_mode is 'rslora'; allowed are direct, .* change `stage.scale_mode`"),
        ({"alpha": math.nan}, r"alpha is nan; allowed is a finite number; change `stage.alpha`"),
        ({"alpha_pattern": {".*": math.inf}}, r"alpha_pattern is inf; allowed .* change `stage.alpha_pattern`"),
        ({"dropout": math.nan}, r"dropout is nan; allowed is 0 <= dropout < 1; change `stage.dropout`"),
        ({"dropout": 1.0}, r"dropout is 1.0; allowed is 0 <= dropout < 1; change `stage.dropout`"),
    ],
)
def test_what_cannot_be_is_refused_and_changes_nothing(options, message):
    unet = UNet(**SMALL)
    with pytest.raises(ValueError, match=message):
        inject_adapters(unet, Adaptation(**options))
    assert adapted_layers(unet) == {}
    assert all(p.requires_grad for p in unet.parameters())
