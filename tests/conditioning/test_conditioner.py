"""The contract all conditioners keep."""

import pytest
import torch

from ldm_train.conditioning import NoConditioner, TransformerTextConditioner

CAPTIONS = ["red apple, a fruit emoji", "blue car", "a very " + "very " * 40 + "long caption", ""]


def batch(captions=CAPTIONS):
    return {
        "image": torch.zeros(len(captions), 3, 8, 8),
        "caption": list(captions),
        "sample_id": torch.arange(len(captions)),
        "epoch": 0,
        "key": [str(i) for i in range(len(captions))],
    }


@pytest.fixture(params=["text", "text_factorised", "none"])
def conditioner(request):
    torch.manual_seed(0)
    if request.param == "none":
        return NoConditioner()
    token_dim = 16 if request.param == "text_factorised" else None
    return TransformerTextConditioner(32, 12, num_layers=1, num_heads=2, token_dim=token_dim).eval()


def entries(conditioning):
    return [entry for entry in conditioning if entry is not None]


def test_null_equals_full_drop_and_is_the_same_for_every_example(conditioner):
    null = conditioner.null(batch())
    dropped = conditioner(batch(), torch.ones(4, dtype=torch.bool))
    for a, b in zip(entries(null), entries(dropped), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, a[:1].expand_as(a))


def test_drop_replaces_marked_examples_alone(conditioner):
    drop = torch.tensor([True, False, True, False])
    mixed, given, null = conditioner(batch(), drop), conditioner(batch()), conditioner.null(batch())
    for m, g, n in zip(entries(mixed), entries(given), entries(null), strict=True):
        torch.testing.assert_close(m[drop], n[drop])
        torch.testing.assert_close(m[~drop], g[~drop])


def test_examples_do_not_mix(conditioner):
    whole = entries(conditioner(batch()))
    for i, caption in enumerate(CAPTIONS):
        for a, b in zip(whole, entries(conditioner(batch([caption]))), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-5)


def test_the_drop_rate_is_met_per_example():
    conditioner = TransformerTextConditioner(8, 4, num_layers=1, num_heads=1, token_dim=2, drop_rate=0.1)
    drops = conditioner.draw_drop(0, 0, torch.arange(100_000))
    assert float(drops.float().mean()) == pytest.approx(0.1, abs=4 * 0.3 / 100_000**0.5)
    other_epoch = conditioner.draw_drop(0, 1, torch.arange(100_000))
    assert float((drops & other_epoch).float().mean()) == pytest.approx(0.01, abs=0.002)


def test_different_captions_give_different_contexts():
    torch.manual_seed(0)
    conditioner = TransformerTextConditioner(32, 12, num_layers=1, num_heads=2).eval()
    context = conditioner(batch(["red apple", "green apple", "apple red"])).context
    assert torch.pdist(context.flatten(1)).min() > 0.1


def test_token_count_tells_which_captions_are_cut():
    conditioner = TransformerTextConditioner(8, 12, num_layers=1, num_heads=1, token_dim=2)
    assert [conditioner.token_count(caption) <= 12 for caption in CAPTIONS] == [True, True, False, True]


@pytest.mark.parametrize(("change", "key"), [({"drop_rate": 1.5}, "drop_rate"), ({"num_heads": 5}, "num_heads")])
def test_impossible_arguments_are_refused(change, key):
    with pytest.raises(ValueError, match=f"change `conditioner.{key}`"):
        TransformerTextConditioner(**({"context_dim": 32} | change))
