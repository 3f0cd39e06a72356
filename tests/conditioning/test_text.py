import pytest
import torch

from ldm_train.conditioning import TransformerTextConditioner

from .toy import CAPTIONS, batch

SMALL = {"context_dim": 32, "context_length": 12, "num_layers": 1, "num_heads": 2}
DEVICE = torch.device("cpu")


@pytest.fixture
def conditioner():
    torch.manual_seed(0)
    return TransformerTextConditioner(**SMALL).eval()


def test_tokens_are_those_of_the_tokenizer_by_itself(conditioner):
    tokens = conditioner.tokens(batch(), None, DEVICE)
    assert torch.equal(tokens.number, conditioner.tokenizer(CAPTIONS))
    counts = [min(conditioner.token_count(caption), 12) for caption in CAPTIONS]
    assert tokens.is_own.sum(1).tolist() == counts
    ends = tokens.number[torch.arange(4), torch.tensor(counts) - 1]
    assert (ends == conditioner.tokenizer.eot_token_id).all()  # a caption that is cut keeps its end


def test_a_caption_that_spells_the_end_mark_hides_nothing(conditioner):
    tokens = conditioner.tokens(batch(["red <end_of_text> apple"]), None, DEVICE)
    assert tokens.is_own.sum() == 5


def test_a_dropped_caption_is_the_empty_one(conditioner):
    dropped = conditioner.tokens(batch(["red apple"]), torch.tensor([True]), DEVICE)
    empty = conditioner.tokens(batch([""]), None, DEVICE)
    assert all(torch.equal(a, b) for a, b in zip(dropped, empty, strict=True))
    assert empty.is_own.sum() == conditioner.token_count("") == 2


def test_padding_is_hidden_from_the_caption(conditioner):
    is_own = conditioner.tokens(batch(), None, DEVICE).is_own
    before = conditioner(batch(), None)
    conditioner.padding = 1234
    after = conditioner(batch(), None)
    torch.testing.assert_close(after.vector, before.vector)
    torch.testing.assert_close(after.context[is_own], before.context[is_own])
    assert not torch.allclose(after.context[~is_own], before.context[~is_own])


def test_the_vector_is_the_mean_of_the_captions_own_tokens(conditioner):
    context, vector, _ = conditioner(batch(), None)
    for row, mean, caption in zip(context, vector, CAPTIONS, strict=True):
        torch.testing.assert_close(row[: conditioner.token_count(caption)].mean(0), mean)


def test_different_captions_give_different_contexts(conditioner):
    context = conditioner(batch(["red apple", "green apple", "apple red"]), None).context
    assert torch.pdist(context.flatten(1)).min() > 0.1


def test_token_count_tells_which_captions_are_cut(conditioner):
    counts = [conditioner.token_count(caption) for caption in CAPTIONS]
    assert [count <= conditioner.context_length for count in counts] == [True, True, False, True]
    for caption in CAPTIONS:
        one, longer = (conditioner.tokens(batch([text]), None, DEVICE).number for text in (caption, f"{caption} end"))
        assert torch.equal(one, longer) is (conditioner.token_count(caption) >= conditioner.context_length)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": 5}, "32 cannot be split into 5 heads; allowed are divisors .* change `conditioner.num_heads`"),
        ({"context_length": 1}, "context_length is 1; allowed are numbers from 2, .* `conditioner.context_length`"),
    ],
)
def test_impossible_arguments_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TransformerTextConditioner(**(SMALL | change))
