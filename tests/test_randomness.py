import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_train.randomness import Stream, normal, philox, random_words, uniform, visit_id

FULL = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((FULL,) * 4, (FULL, FULL), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_gives_the_published_vectors(counter, key, expected):
    words = philox(tuple(torch.tensor([word]) for word in counter), key)
    assert tuple(int(word) for word in words) == expected


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**63), epoch=st.integers(0, 2**31), ids=st.lists(st.integers(0, 2**62), min_size=1))
def test_a_draw_depends_on_its_own_sample_alone(seed, epoch, ids):
    together = normal(seed, epoch, torch.tensor(ids), Stream.NOISE, (2, 3))
    alone = torch.cat([normal(seed, epoch, torch.tensor([i]), Stream.NOISE, (2, 3)) for i in ids])
    assert torch.equal(together, alone)


def test_different_samples_epochs_seeds_and_streams_draw_differently():
    base = (0, 0, 0, Stream.NOISE)
    others = [(1, 0, 0, Stream.NOISE), (0, 1, 0, Stream.NOISE), (0, 0, 1, Stream.NOISE), (0, 0, 0, Stream.TIMESTEP)]
    draws = [random_words(s, e, torch.tensor([i]), stream, 64) for s, e, i, stream in (base, *others)]
    shared = [(a == b).sum().item() for n, a in enumerate(draws) for b in draws[n + 1 :]]
    assert max(shared) == 0


def test_visits_of_a_sample_draw_differently_and_the_first_as_ever():
    ids = torch.tensor([0, 7, 2**40 - 1])
    assert torch.equal(visit_id(ids, torch.zeros(3, dtype=torch.int64)), ids)
    keys = torch.cat([visit_id(ids, torch.full((3,), visit)) for visit in (0, 1, 2, 2**23 - 1)])
    words = random_words(0, 0, keys, Stream.NOISE, 8)
    assert keys.min() >= 0
    assert len(keys.unique()) == len(words.unique(dim=0)) == 12


def test_the_first_words_do_not_depend_on_how_many_are_drawn():
    ids = torch.arange(5)
    assert torch.equal(random_words(3, 1, ids, Stream.NOISE, 7), random_words(3, 1, ids, Stream.NOISE, 100)[:, :7])


def test_moments_of_normal_and_uniform():
    x = normal(0, 0, torch.arange(4000), Stream.NOISE, (100,)).double().flatten()
    error = len(x) ** -0.5
    assert abs(x.mean()) < 4 * error
    assert abs(x.var() - 1) < 4 * 2**0.5 * error
    assert abs((x**4).mean() - 3) < 4 * 96**0.5 * error
    u = uniform(0, 0, torch.arange(400_000), Stream.TIMESTEP).double()
    assert 0 <= u.min() <= u.max() < 1
    assert torch.histc(u, 10, 0, 1).sub(40_000).abs().max() < 4 * 36_000**0.5


def test_samples_are_uncorrelated():
    x = normal(0, 0, torch.arange(64), Stream.NOISE, (10_000,)).double()
    correlation = torch.corrcoef(x) - torch.eye(64)
    assert correlation.abs().max() < 5 / 100
