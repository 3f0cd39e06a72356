"""Remembered states are those of the caption alone, bit for bit, and of the weights as they are now."""

import pytest
import torch

from ldm_train.conditioning import CLIPTextConditioner, TransformerTextConditioner

from .toy import CAPTIONS, batch, clip_encoder

SMALL = {"context_dim": 32, "context_length": 12, "num_layers": 1, "num_heads": 2}


def trained_along(remember):
    torch.manual_seed(0)
    return TransformerTextConditioner(**SMALL, remember=remember).requires_grad_(False)


def frozen(remember):
    return CLIPTextConditioner(clip_encoder(), 32, vector_dim=32, remember=remember)


@pytest.fixture(params=[frozen, trained_along])
def make(request):
    return request.param


def equal(a, b):
    return all(x is y or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def counted(conditioner, monkeypatch):
    """The numbers of captions that the encoder is given, call by call."""
    calls, encode = [], type(conditioner).encode
    monkeypatch.setattr(
        type(conditioner), "encode", lambda own, tokens: calls.append(len(tokens.number)) or encode(own, tokens)
    )
    return calls


def test_states_do_not_depend_on_company(make):
    conditioner = make(9)
    together = conditioner(batch(), None)
    for i, caption in enumerate(CAPTIONS):
        alone = make(None).eval()(batch([caption]), None)
        assert equal([entry if entry is None else entry[i : i + 1] for entry in together], alone)
    torch.testing.assert_close(together.context, make(None)(batch(), None).context, rtol=1e-4, atol=1e-5)


def test_each_caption_is_encoded_once_and_alone(make, monkeypatch):
    conditioner = make(9)
    calls = counted(conditioner, monkeypatch)
    for captions in (CAPTIONS, CAPTIONS[::-1], ["blue car"] * 3):
        conditioner(batch(captions), None, torch.zeros(len(captions), dtype=torch.bool))
    assert calls == [1] * len(CAPTIONS)  # of which one is empty


def test_a_dropped_caption_is_the_empty_one(make):
    conditioner, drop = make(9), torch.tensor([True, False, True, False])
    mixed, given, empty = conditioner(batch(), None, drop), conditioner(batch(), None), make(9)(batch([""] * 4), None)
    for ours, own, null in zip(mixed, given, empty, strict=True):
        if ours is not None:
            assert torch.equal(ours[~drop], own[~drop])
            assert torch.equal(ours[drop], null[drop])


def test_an_encoder_that_learns_is_asked_each_time(monkeypatch):
    conditioner = trained_along(9).requires_grad_(True)
    calls = counted(conditioner, monkeypatch)
    for _ in range(2):
        conditioner(batch(), None).context.sum().backward()
    assert calls == [4, 4]
    assert conditioner.position.grad is not None


def test_what_old_weights_said_is_forgotten(make):
    conditioner = make(9)
    before = conditioner(batch(), None)
    conditioner.load_state_dict({name: value + 0.1 for name, value in conditioner.state_dict().items()})
    after, plain = conditioner(batch(), None), make(9)
    plain.load_state_dict(conditioner.state_dict())
    assert not equal(before, after)
    assert equal(after, plain(batch(), None))


def test_what_validation_remembered_can_be_trained_on(make):
    conditioner = make(9)
    with torch.inference_mode():
        conditioner(batch(), None)
    head = torch.nn.Linear(32, 1)
    head(conditioner(batch(), None, torch.zeros(4, dtype=torch.bool)).context).sum().backward()
    assert head.weight.grad.abs().max() > 0


def test_autocast_does_not_change_what_is_remembered(make):
    inside, outside = make(9), make(9)
    with torch.autocast("cpu", torch.bfloat16):
        states = inside(batch(), None)
    assert equal(states, outside(batch(), None))


def test_it_does_not_matter_whether_training_or_evaluation_asks_first(make):
    training, evaluating = make(9).train(), make(9).eval()
    assert equal(training(batch(), None), evaluating(batch(), None))
    assert training.training
    assert not evaluating.training


def test_too_many_captions_name_the_key(make):
    assert make(3)(batch(), None).context.shape[0] == 4  # the empty caption is not counted
    with pytest.raises(ValueError, match=r"more than 2 different captions .* raise `conditioner.remember`"):
        make(2)(batch(), None)
    with pytest.raises(ValueError, match=r"remember is 0; .* change `conditioner.remember`"):
        make(0)
