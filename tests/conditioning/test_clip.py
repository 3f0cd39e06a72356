"""CLIP's text encoder is that of transformers, from the caption to the last digit."""

import json

import hydra
import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
from transformers.utils import logging

from ldm_train.conditioning import CLIPTextConditioner, CLIPTextEncoder
from ldm_train.interchange.clip import to_open_clip

from ..conftest import composed
from .toy import batch, clip, clip_encoder

CAPTIONS = ["Red apple, a fruit emoji", "it's 2 cars", "a very " + "very " * 90 + "long caption", ""]
PAD = {"end": "<|endoftext|>", "zero": "!"}
SHAPES = {
    "small": {"width": 32, "num_layers": 3, "num_heads": 2},
    "vit_l14": {"width": 768, "num_layers": 12, "num_heads": 12},
}


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    """CLIP's vocabulary in the files of transformers, written from open_clip's."""
    tokenizer, folder = clip().tokenizer, tmp_path_factory.mktemp("tokenizer")
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    (folder / "vocab.json").write_text(json.dumps({names.get(k, k): i for k, i in tokenizer.encoder.items()}))
    merges = "\n".join(" ".join(pair) for pair in tokenizer.bpe_ranks)
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    return [str(folder / "vocab.json"), str(folder / "merges.txt")]


def reference_ids(vocabulary, padding):
    tokenizer = CLIPTokenizer(*vocabulary, pad_token=PAD[padding])
    ids = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True)["input_ids"]
    return torch.tensor(ids)


def reference(shape, activation):
    """A text model of transformers with weights that tell any two tensors apart."""
    logging.set_verbosity_error()
    config = CLIPTextConfig(
        hidden_size=shape["width"],
        intermediate_size=4 * shape["width"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_heads"],
        hidden_act=activation,
    )
    torch.manual_seed(0)
    model = CLIPTextModel(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter += 0.02 * torch.randn_like(parameter)
    return model


def hidden_states(model, ids, layer):
    output = model(ids, output_hidden_states=True)
    if layer == "last":
        return output.last_hidden_state
    norm = next(module for name, module in model.named_modules() if name.endswith("final_layer_norm"))
    return norm(output.hidden_states[-2])


def check_equal(shape, activation, layer, padding, vocabulary):
    theirs = reference(shape, activation)
    encoder = CLIPTextEncoder(**shape, activation=activation, layer=layer)
    state = to_open_clip(theirs.state_dict(), shape["num_layers"])
    encoder.tower.load_state_dict({name: state[name] for name in encoder.tower.state_dict()})
    conditioner = CLIPTextConditioner(encoder, shape["width"], padding)
    expected = hidden_states(theirs, reference_ids(vocabulary, padding), layer)
    context = conditioner(batch(CAPTIONS), None).context
    assert expected.std() > 0.5
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("padding", PAD)
@pytest.mark.parametrize("layer", ["last", "penultimate"])
@pytest.mark.parametrize("activation", ["gelu", "quick_gelu"])
def test_hidden_states_equal_those_of_transformers(activation, layer, padding, vocabulary):
    check_equal(SHAPES["small"], activation, layer, padding, vocabulary)


@pytest.mark.slow
def test_hidden_states_of_the_published_shape_equal_those_of_transformers(vocabulary):
    check_equal(SHAPES["vit_l14"], "quick_gelu", "last", "end", vocabulary)


def test_what_the_caption_is_padded_with_matters():
    context = {padding: clip(padding)(batch(["red apple"]), None).context[0] for padding in PAD}
    assert torch.equal(context["end"][:4], context["zero"][:4])  # causal: the caption does not see what follows
    assert (context["end"][4:] - context["zero"][4:]).abs().max() > 0.1


@pytest.mark.parametrize("padding", PAD)
def test_the_vector_is_the_context_at_the_end_mark(padding):
    conditioner = clip(padding, vector_dim=32)
    context, vector, _ = conditioner(batch(), None)
    for row, end, caption in zip(context, vector, batch()["caption"], strict=True):
        assert torch.equal(row[min(conditioner.token_count(caption), conditioner.context_length) - 1], end)


@pytest.mark.parametrize(
    ("option", "size", "tensors"), [("clip_l14", 123_060_480, 12 * 12 + 4), ("openclip_h14", 340_387_840, 23 * 12 + 4)]
)
def test_published_encoders_have_their_published_sizes(option, size, tensors):
    cfg = composed(f"conditioner={option}", "conditioner.encoder.weights=untrained")
    with torch.device("meta"):
        conditioner = hydra.utils.instantiate(cfg.conditioner, _convert_="all")
    parameters = list(conditioner.parameters())
    assert (sum(parameter.numel() for parameter in parameters), len(parameters)) == (size, tensors)
    assert (conditioner.context_length, conditioner.context_dim) == (77, cfg.conditioner.context_dim)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_halves_the_memory_and_keeps_the_context(precision):
    whole, half = clip(), clip(precision=precision)
    half.load_state_dict(whole.state_dict())
    sizes = [sum(parameter.nbytes for parameter in conditioner.parameters()) for conditioner in (whole, half)]
    assert sizes[0] == 2 * sizes[1]
    expected, context = whole(batch(), None).context, half(batch(), None).context
    assert context.dtype == torch.float32
    assert (context - expected).abs().max() > 0
    torch.testing.assert_close(context, expected, rtol=0.0, atol=0.1)


def test_no_gradient_is_kept():
    assert not clip().train()(batch(), None).context.requires_grad


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "into 5 heads; allowed are divisors of it; change `conditioner.encoder.encoder.num_heads`"),
        ({"num_layers": 1, "layer": "penultimate"}, "leaves 0; .* change `conditioner.encoder.encoder.num_layers`"),
        ({"layer": "first"}, "allowed are last, penultimate; change `conditioner.encoder.encoder.layer`"),
        ({"activation": "relu"}, "allowed are gelu, quick_gelu; change `conditioner.encoder.encoder.activation`"),
        ({"precision": "int8"}, "allowed are float32, .*; change `conditioner.encoder.encoder.precision`"),
    ],
)
def test_encoders_that_cannot_be_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        clip_encoder(**change)


def test_another_width_and_an_unknown_padding_are_refused():
    encoder = clip_encoder()
    with pytest.raises(ValueError, match=r"context_dim is 64, the encoder's width 32; .*`conditioner.context_dim` or"):
        CLIPTextConditioner(encoder, 64)
    with pytest.raises(ValueError, match=r"vector_dim is 64, the encoder's width 32; .*`conditioner.vector_dim` or"):
        CLIPTextConditioner(encoder, 32, vector_dim=64)
    with pytest.raises(ValueError, match=r"padding is 'start'; allowed are end, zero; change `conditioner.padding`"):
        CLIPTextConditioner(encoder, 32, "start")
