import pytest
import torch
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

from ldm_train.interchange import UNetArchitecture, build_unet, check_unet_target, export_diffusers_unet
from ldm_train.interchange.unet_diffusers import DIFFUSERS_UNET, DIFFUSERS_UNET_XL
from ldm_train.interchange.unet_layout import COMPVIS_UNET, OURS, unet_from_ours, unet_names, unet_to_ours

from .networks import same
from .unets import ALL_KINDS, PLAIN_UNET, SD1, SMALL_UNET, TRANSFORMER_KINDS, random_unet

LAYOUTS = {"ours": OURS, "published": COMPVIS_UNET, "diffusers": DIFFUSERS_UNET, "diffusers, XL": DIFFUSERS_UNET_XL}


def shapes(node):
    with torch.device("meta"):
        return {name: value.shape for name, value in build_unet(node).state_dict().items()}


@pytest.mark.parametrize("node", ALL_KINDS.values(), ids=ALL_KINDS)
def test_our_own_layout_is_the_state_dict(node):
    ours = unet_names(OURS, UNetArchitecture.of(node))
    assert len(set(ours)) == len(ours)
    assert set(ours) == set(shapes(node))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("node", ALL_KINDS.values(), ids=ALL_KINDS)
def test_there_and_back_is_the_identity(node, layout):
    architecture, state = UNetArchitecture.of(node), random_unet(node).state_dict()
    theirs = unet_from_ours(state, layout, architecture)
    assert sum(value.numel() for value in theirs.values()) == sum(value.numel() for value in state.values())
    assert same(unet_to_ours(theirs, layout, architecture), state)


def published_names_of_sd1():
    """Spelled out from the facts about the published file, modules without leaves."""
    residual = ("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3")
    block = [f"{attn}.{layer}" for attn in ("attn1", "attn2") for layer in ("to_q", "to_k", "to_v", "to_out.0")]
    block += ["ff.net.0.proj", "ff.net.2", "norm1", "norm2", "norm3"]
    transformer = ["norm", "proj_in", "proj_out", *(f"transformer_blocks.0.{name}" for name in block)]
    residuals = [f"input_blocks.{entry}.0" for entry in (1, 2, 4, 5, 7, 8, 10, 11)]
    residuals += ["middle_block.0", "middle_block.2", *(f"output_blocks.{entry}.0" for entry in range(12))]
    transformers = [f"input_blocks.{entry}.1" for entry in (1, 2, 4, 5, 7, 8)] + ["middle_block.1"]
    transformers += [f"output_blocks.{entry}.1" for entry in range(3, 12)]
    skips = ["input_blocks.4.0", "input_blocks.7.0", *(f"output_blocks.{entry}.0" for entry in range(12))]
    modules = ["time_embed.0", "time_embed.2", "input_blocks.0.0", "out.0", "out.2"]
    modules += [f"input_blocks.{entry}.0.op" for entry in (3, 6, 9)]
    modules += ["output_blocks.2.1.conv", "output_blocks.5.2.conv", "output_blocks.8.2.conv"]
    modules += [f"{place}.{layer}" for place in residuals for layer in residual]
    modules += [f"{place}.skip_connection" for place in skips]
    return modules + [f"{place}.{layer}" for place in transformers for layer in transformer]


def test_the_published_names_of_sd1():
    without_bias = (".to_q", ".to_k", ".to_v")
    expected = {f"{module}.weight" for module in published_names_of_sd1()}
    expected |= {f"{module}.bias" for module in published_names_of_sd1() if not module.endswith(without_bias)}
    found = unet_names(COMPVIS_UNET, UNetArchitecture.of(SD1))
    assert len(found) == len(set(found)) == 686
    assert set(found) == expected


@pytest.mark.parametrize("node", TRANSFORMER_KINDS.values(), ids=TRANSFORMER_KINDS)
def test_diffusers_own_converter_agrees(node):
    """Two routes to diffusers: its converter of the published layout, and our export."""
    state, architecture = random_unet(node).state_dict(), UNetArchitecture.of(node)
    config, direct = export_diffusers_unet(node, state)
    published = unet_from_ours(state, COMPVIS_UNET, architecture)
    config |= {"addition_embed_type": None, "class_embed_type": config.get("class_embed_type")}
    prefixed = {f"model.diffusion_model.{name}": value for name, value in published.items()}
    assert same(convert_ldm_unet_checkpoint(prefixed, config), direct)


def test_fused_attention_is_published_head_by_head():
    """(3 C, C, 1), where the rows of each head's queries are followed by those of its keys and values."""
    node = PLAIN_UNET | {"head_channels": None, "num_heads": 4}
    architecture, state = UNetArchitecture.of(node), random_unet(node).state_dict()
    theirs = unet_from_ours(state, COMPVIS_UNET, architecture)
    fused, bias = (theirs[f"middle_block.1.qkv.{leaf}"] for leaf in ("weight", "bias"))
    channels, width = 128, 32
    assert fused.shape == (3 * channels, channels, 1)
    assert theirs["middle_block.1.proj_out.weight"].shape == (channels, channels, 1)
    for head in range(4):
        for part, name in enumerate(("to_q", "to_k", "to_v")):
            rows = slice((3 * head + part) * width, (3 * head + part + 1) * width)
            own = slice(head * width, (head + 1) * width)
            assert torch.equal(fused[rows, :, 0], state[f"middle_in.attention.{name}.weight"][own])
            assert torch.equal(bias[rows], state[f"middle_in.attention.{name}.bias"][own])


def test_an_impossible_fused_tensor_is_left_for_the_comparison():
    architecture = UNetArchitecture.of(PLAIN_UNET)
    theirs = unet_from_ours(random_unet(PLAIN_UNET).state_dict(), COMPVIS_UNET, architecture)
    theirs["middle_block.1.qkv.bias"] = torch.zeros(7)
    assert unet_to_ours(theirs, COMPVIS_UNET, architecture)["middle_in.attention.to_q.bias"].shape == (7,)


def test_strangers_are_kept_and_never_mistaken_for_ours():
    architecture, state = UNetArchitecture.of(SMALL_UNET), random_unet(SMALL_UNET).state_dict()
    theirs = unet_from_ours(state, COMPVIS_UNET, architecture)
    del theirs["out.2.bias"]
    strange = dict.fromkeys(["conv_out.bias", "input_blocks.99.0.weight"], torch.zeros(1))
    ours = unet_to_ours(theirs | strange, COMPVIS_UNET, architecture)
    assert set(state) - set(ours) == {"conv_out.bias"}
    assert set(ours) - set(state) == {"conv_out.bias (of the file)", "input_blocks.99.0.weight"}


class TestArchitecture:
    @pytest.mark.parametrize("node", ALL_KINDS.values(), ids=ALL_KINDS)
    def test_its_node_builds_the_same_network(self, node):
        architecture = UNetArchitecture.of(node)
        assert UNetArchitecture.of(architecture.node()) == architecture
        assert shapes(node) == shapes(architecture.node())

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"_target_": "os.system"}, r"`unet._target_` is 'os.system'; allowed .* change `unet`"),
            ({"attention_factors": [{"_target_": "os.system"}]}, r"`unet.attention_factors` is .*; allowed are plain"),
            (
                {"channel_multipliers": [1, "a"]},
                r"`unet.channel_multipliers` is .*; allowed is a list of whole numbers",
            ),
            ({"transformer_depth": [1, None]}, r"`unet.transformer_depth` is .*; allowed is a list of whole numbers"),
            ({"colour": 1}, r"`unet` cannot be built: .*colour.*; its keys are in_channels, .*; change"),
        ],
    )
    def test_only_our_own_class_is_built(self, change, message):
        for function in (build_unet, UNetArchitecture.of):
            with pytest.raises(ValueError, match=message):
                function(SMALL_UNET | change)

    def test_a_node_that_is_none(self):
        with pytest.raises(ValueError, match=r"`unet._target_` is 3; allowed here: ldm_train.nn.UNet; change `unet`"):
            check_unet_target(3)
