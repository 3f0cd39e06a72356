import pytest
import torch

from ldm_train.interchange import Architecture, build
from ldm_train.interchange.compvis import COMPVIS
from ldm_train.interchange.diffusers import DIFFUSERS, DIFFUSERS_OLD
from ldm_train.interchange.layout import OURS, from_ours, names, to_ours

from .networks import KINDS, SMALL, learned, random_autoencoder, same

LAYOUTS = {"ours": OURS, "compvis": COMPVIS, "diffusers": DIFFUSERS, "older diffusers": DIFFUSERS_OLD}
LATENTS = {"latent_mean", "latent_std"}


@pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
def test_our_own_layout_is_the_state_dict(node):
    ours = names(OURS, Architecture.of(node))
    assert len(set(ours)) == len(ours)
    assert set(ours) | LATENTS == set(learned(build(node)))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
def test_there_and_back_is_the_identity(node, layout):
    architecture = Architecture.of(node)
    state = {name: value for name, value in learned(random_autoencoder(node)).items() if name not in LATENTS}
    theirs = from_ours(state, layout, architecture)
    assert len(theirs) == len(state)
    assert same(to_ours(theirs, layout, architecture), state)


def test_the_published_names_of_kl_f8():
    """Spelled out from the facts about the published file: 248 tensors."""
    shapes = {"channels": 128, "channel_multipliers": [1, 2, 4, 4], "num_res_blocks": 2, "norm_groups": 32}
    expected = ["quant_conv", "post_quant_conv"]
    for side, levels, blocks, widened in (("encoder", "down", 2, (1, 2)), ("decoder", "up", 3, (1, 0))):
        expected += [f"{side}.{name}" for name in ("conv_in", "norm_out", "conv_out")]
        expected += [f"{side}.mid.attn_1.{name}" for name in ("norm", "q", "k", "v", "proj_out")]
        places = [f"{side}.{levels}.{level}.block.{block}" for level in range(4) for block in range(blocks)]
        places += [f"{side}.mid.block_1", f"{side}.mid.block_2"]
        expected += [f"{place}.{name}" for place in places for name in ("norm1", "conv1", "norm2", "conv2")]
        expected += [f"{side}.{levels}.{level}.block.0.nin_shortcut" for level in widened]
    expected += [f"encoder.down.{level}.downsample.conv" for level in (0, 1, 2)]
    expected += [f"decoder.up.{level}.upsample.conv" for level in (1, 2, 3)]
    found = names(COMPVIS, Architecture.of(SMALL | shapes))
    assert len(found) == 248
    assert set(found) == {f"{name}.{tensor}" for name in expected for tensor in ("weight", "bias")}


def test_strangers_are_kept_and_never_mistaken_for_ours():
    architecture = Architecture.of(SMALL)
    theirs = from_ours(random_autoencoder(SMALL).state_dict(), COMPVIS, architecture)
    del theirs["quant_conv.bias"]
    strange = dict.fromkeys(["to_moments.weight", "to_moments.bias", "encoder.extra"], torch.zeros(1))
    ours = to_ours(theirs | strange, COMPVIS, architecture)
    known = to_ours(theirs, COMPVIS, architecture)
    assert known.keys() == set(names(OURS, architecture)) - {"to_moments.bias"}
    assert same({name: ours[name] for name in known}, known)
    renamed = {"to_moments.weight (of the file)", "to_moments.bias (of the file)", "encoder.extra"}
    assert ours.keys() - known.keys() == renamed


class TestArchitecture:
    @pytest.mark.parametrize("node", KINDS.values(), ids=KINDS)
    def test_its_node_builds_the_same_network(self, node):
        architecture = Architecture.of(node)
        assert Architecture.of(architecture.node()) == architecture
        shapes = [{n: v.shape for n, v in build(one).state_dict().items()} for one in (node, architecture.node())]
        assert shapes[0] == shapes[1]

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"_target_": "os.system"}, r"`autoencoder._target_` is 'os.system'; allowed .* change `autoencoder`"),
            ({"regularizer": {"_target_": "os.system"}}, r"`autoencoder.regularizer._target_` is 'os.system'"),
            ({"regularizer": None}, r"`autoencoder.regularizer._target_` is None"),
            ({"colour": 1}, r"`autoencoder` cannot be built: .*colour.*; its keys are regularizer, .*; change"),
            (
                {"regularizer": {"_target_": "ldm_train.nn.VectorQuantizer"}},
                r"`autoencoder.regularizer` cannot be built: .*codebook_size.*; change `autoencoder.regularizer`",
            ),
        ],
    )
    def test_only_our_own_classes_are_built(self, change, message):
        for function in (build, Architecture.of):
            with pytest.raises(ValueError, match=message):
                function(SMALL | change)

    def test_a_cosine_codebook_has_no_place_in_other_formats(self):
        node = KINDS["vq"] | {"regularizer": KINDS["vq"]["regularizer"] | {"distance": "cosine"}}
        build(node)
        with pytest.raises(ValueError, match=r"distance is cosine; .* change `autoencoder.regularizer.distance`"):
            Architecture.of(node)
