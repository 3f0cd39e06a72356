import pytest
import torch
from open_clip.transformer import TextTransformer
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from ldm_train.interchange.clip import POSITION_IDS, PREFIX, from_open_clip, names, text_tower, to_open_clip

from .networks import same

LAYERS, WIDTH, SHARED = 2, 16, 12
SIZES = {"context_length": 8, "vocab_size": 64, "width": WIDTH, "heads": 2, "output_dim": SHARED}


def randomised(module):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(value.shape, generator=generator) for name, value in module.state_dict().items()}


@pytest.fixture(scope="module")
def tower():
    return randomised(TextTransformer(layers=LAYERS, **SIZES))


@pytest.fixture
def bare(tower):
    """Without the projection."""
    return {name: value for name, value in tower.items() if name != "text_projection"}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


def test_the_table_is_open_clips_state_dict(bare):
    assert sorted(names(LAYERS)) == sorted(bare)


def test_the_other_side_is_transformers_state_dict(tower):
    config = CLIPTextConfig(
        vocab_size=64, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=LAYERS, num_attention_heads=2,
        max_position_embeddings=8, projection_dim=SHARED, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    theirs = CLIPTextModelWithProjection(config).state_dict()
    shapes = {name: value.shape for name, value in from_open_clip(tower, LAYERS).items()}
    assert shapes == {name: value.shape for name, value in theirs.items()}


def test_the_published_encoder_has_196_tensors():
    with torch.device("meta"):
        state = TextTransformer(layers=12, **(SIZES | {"output_dim": None})).state_dict()
    assert len(from_open_clip(state, 12)) == 196


def test_there_and_back_is_the_identity(tower, bare):
    for state in (tower, bare):
        theirs = from_open_clip(state, LAYERS)
        assert same(to_open_clip(theirs, LAYERS), state)
        assert same(from_open_clip(to_open_clip(theirs, LAYERS), LAYERS), theirs)


def test_the_prefix_and_the_position_ids_say_nothing(bare):
    theirs = from_open_clip(bare, LAYERS)
    short = {name.removeprefix(PREFIX): value for name, value in theirs.items()}
    numbered = theirs | {PREFIX + POSITION_IDS: torch.arange(8)[None]}
    assert same(to_open_clip(short, LAYERS), bare)
    assert same(to_open_clip(numbered, LAYERS), bare)


def test_parts_share_no_memory(bare):
    tensors = from_open_clip(bare, LAYERS).values()
    assert len({value.untyped_storage().data_ptr() for value in tensors}) == len(tensors)


def test_what_the_table_does_not_know_keeps_its_name(bare):
    theirs = from_open_clip(bare, LAYERS) | {"text_model.extra": torch.zeros(1)}
    del theirs["text_model.encoder.layers.1.self_attn.k_proj.bias"]
    ours = to_open_clip(theirs, LAYERS)
    left = {f"encoder.layers.1.self_attn.{part}_proj.bias" for part in "qv"} | {"extra"}
    assert ours.keys() == bare.keys() - {"transformer.resblocks.1.attn.in_proj_bias"} | left


def test_an_incomplete_tower_cannot_be_written(bare):
    del bare["ln_final.bias"]
    with pytest.raises(ValueError, match=r"1 tensors .* missing, the first is ln_final.bias; allowed is .*; change"):
        from_open_clip(bare, LAYERS)


UNET = {"model.diffusion_model.out.2.bias": torch.zeros(4), "model_ema.decay": torch.zeros(())}
OPENAI = {"visual.proj": torch.zeros(4), "logit_scale": torch.zeros(()), "context_length": torch.tensor(77)}
VISION = {"vision_model.embeddings.position_embedding.weight": torch.zeros(4), "logit_scale": torch.zeros(())}
WAYS = {
    "open_clip": lambda tower: tower | OPENAI,
    "open_clip under text": lambda tower: prefixed("text.", tower) | OPENAI,
    "transformers": lambda tower: from_open_clip(tower, LAYERS) | VISION,
    "transformers 5": lambda tower: {n.removeprefix(PREFIX): v for n, v in from_open_clip(tower, LAYERS).items()},
    "Stable Diffusion 1": lambda tower: prefixed("cond_stage_model.transformer.", from_open_clip(tower, LAYERS)) | UNET,
    "Stable Diffusion 2": lambda tower: prefixed("cond_stage_model.model.", tower) | UNET,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_the_tower_is_found_wherever_it_is(way, tower, bare):
    found = text_tower(way(tower))
    assert found.num_layers == LAYERS
    assert same(found.tensors, bare)


@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_strangers_beside_it_are_kept(way, tower, bare):
    held = way(tower)
    anchor = next(name for name in held if name.endswith("token_embedding.weight"))
    stranger = anchor.replace("token_embedding.weight", "token_embedding.bias")
    extra = text_tower(held | {stranger: torch.zeros(1)}).tensors.keys() - bare.keys()
    assert [name.rpartition(".")[2] for name in extra] == ["bias"]


def test_a_file_without_one_tower_is_refused(tower):
    both = prefixed("conditioner.embedders.0.", tower) | prefixed("conditioner.embedders.1.", tower)
    for tensors, count in ((UNET, 0), (both, 2)):
        message = rf"{count} text towers .*; allowed is a file with one: .*; change `conditioner.encoder.weights`"
        with pytest.raises(ValueError, match=message):
            text_tower(tensors)
