import hashlib
import json
import math
from itertools import islice

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_train.data import BucketedOrder, MixedOrder, Position, ShuffledOrder, TrainingSampler
from ldm_train.data.bucketed_order import BucketRows
from ldm_train.data.mixed_order import apportion

BLOCK = 4096


def starts_of(counts):
    return np.concatenate(([0], np.cumsum(counts))).astype(np.int64)


def digest(rows):
    return hashlib.sha256(np.asarray(rows).astype("<i8").tobytes()).hexdigest()


layouts = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, "897d0e047d971f6459b7b27264a5ea04d9406229dbb8d51bebe61eca1c26e247"),
        ({"groups": 8, "window": 512}, "fb27aad469d51aabf9619ea488e753656dde4875ba5cfd226b8da621ba36f94d"),
    ],
)
def test_shuffle_is_frozen(arguments, expected):
    """A change of these digits changes the data that every saved position stands for."""
    order = ShuffledOrder(starts_of([700, 1300, 0, 41, 9000, 2500, 60, 4000, 3333]), 20261125, **arguments)
    assert digest(np.concatenate([order.rows(epoch, np.arange(10_000)) for epoch in (0, 1)])) == expected


def test_a_short_request_changes_nothing_that_follows():
    starts = starts_of([3000, 2000])
    whole = ShuffledOrder(starts, 1, 4, 100).rows(0, np.arange(5000))
    order = ShuffledOrder(starts, 1, 4, 100)
    for begin in (8, 12, 4000, 8, 4004, 16, 16, 2000):
        assert order.rows(0, np.arange(begin, begin + 4)).tolist() == whole[begin : begin + 4].tolist()


# Buckets


@given(st.lists(st.integers(0, 4), min_size=1, max_size=300), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_rank_and_select_are_inverse(numbers, repeats):
    buckets = np.tile(np.array(numbers, dtype=np.uint8), repeats)
    rows = BucketRows(buckets)
    assert rows.rank(len(buckets)).tolist() == rows.sizes.tolist()
    for bucket in np.unique(buckets).tolist():
        expected = np.flatnonzero(buckets == bucket)
        assert rows.select(bucket, np.arange(len(expected))).tolist() == expected.tolist()
        assert [rows.rank(int(row))[bucket] for row in expected[::97]] == list(range(len(expected)))[::97]


@st.composite
def bucketed(draw):
    counts = draw(layouts)
    buckets = np.array(draw(st.lists(st.integers(0, 3), min_size=sum(counts), max_size=sum(counts))), dtype=np.uint8)
    unit = draw(st.integers(1, max(1, int(np.bincount(buckets).max()))))
    return starts_of(counts), buckets, unit, draw(st.integers(0, 9)), draw(st.integers(1, 3)), draw(st.integers(1, 50))


@given(bucketed(), st.integers(0, 3))
@settings(max_examples=100, deadline=None)
def test_units_have_one_bucket_and_all_but_the_waiting_come_once(arguments, epoch):
    _, buckets, unit = arguments[:3]
    order = BucketedOrder(*arguments)
    rows = order.rows(epoch, np.arange(len(order)))
    assert len(set(rows.tolist())) == len(rows) == len(buckets) - order.waiting
    assert np.ptp(buckets[rows].reshape(-1, unit), axis=1).max() == 0
    sizes = np.bincount(buckets)
    assert np.bincount(buckets[rows], minlength=len(sizes)).tolist() == (sizes // unit * unit).tolist()
    assert order.starved == {bucket: size for bucket, size in enumerate(sizes) if 0 < size < unit}


def test_images_that_wait_differ_by_epoch_and_units_of_a_bucket_follow_its_own_order():
    rng = np.random.default_rng(0)
    starts, buckets = starts_of([300, 200, 400]), rng.integers(0, 3, 900)
    order = BucketedOrder(starts, buckets, 32, seed=5)
    epochs = [order.rows(epoch, np.arange(len(order))) for epoch in (0, 1)]
    waiting = [set(range(900)) - set(rows.tolist()) for rows in epochs]
    assert [len(some) for some in waiting] == [order.waiting] * 2
    assert order.waiting
    assert waiting[0] != waiting[1]
    for bucket in range(3):
        own = np.flatnonzero(buckets == bucket)
        alone = ShuffledOrder(np.searchsorted(own, starts), 5, window=math.ceil(len(own) * 8192 / 900))
        used = own[alone.rows(1, np.arange(len(own) // 32 * 32))]
        assert epochs[1][buckets[epochs[1]] == bucket].tolist() == used.tolist()


def test_blocks_of_units_are_mixed_evenly_and_any_position_is_reached_at_once():
    rng = np.random.default_rng(0)
    counts = np.full(50, 1000)
    buckets = rng.choice(3, 50_000, p=[0.7, 0.29, 0.01]).astype(np.uint8)
    order = BucketedOrder(starts_of(counts), buckets, 2, seed=5, window=256)
    rows = order.rows(0, np.arange(len(order)))
    shares = np.bincount(buckets) / 50_000
    for part in np.array_split(buckets[rows], math.ceil(25_000 / BLOCK)):
        assert np.abs(np.bincount(part, minlength=3) / len(part) - shares).max() < 0.001
    some = rng.permutation(len(order))[:200]
    fresh = BucketedOrder(starts_of(counts), buckets, 2, seed=5, window=256)
    assert fresh.rows(0, some).tolist() == rows[some].tolist()
    # Neighbours of the shuffle are read together: a tenth of an epoch touches little more than a tenth of the shards.
    windows = BucketedOrder(starts_of(counts), buckets, 2, seed=5, groups=4, window=256)
    assert len(np.unique(windows.rows(0, np.arange(5000)) // 1000)) <= 16


def test_bucketed_order_is_frozen():
    buckets = np.arange(30_000) * 7919 % 101 % 5
    order = BucketedOrder(starts_of([12_000, 18_000]), buckets, 2, seed=7, groups=4, window=512)
    rows = np.concatenate([order.rows(epoch, np.arange(len(order))) for epoch in (0, 1)])
    assert digest(rows) == "cbf017f1a82ad42b3f47051785e7fd0451b59ff028af19203f8c9c571bd67710"


def test_buckets_that_cannot_be_trained_are_refused():
    with pytest.raises(ValueError, match=r"3 rows have a bucket.*there are 4 rows.*change the buckets"):
        BucketedOrder(starts_of([4]), np.zeros(3, dtype=int), 1, 0)
    with pytest.raises(ValueError, match="the lowest being -1"):
        BucketedOrder(starts_of([2]), np.array([0, -1]), 1, 0)
    with pytest.raises(ValueError, match=r"holds 2 images.*unit of 3.*lower `data.bucket_unit`"):
        BucketedOrder(starts_of([4]), np.array([0, 0, 1, 1]), 3, 0)
    order = BucketedOrder(starts_of([64]), np.repeat([0, 1], 32), 16, 0)
    with pytest.raises(ValueError, match=r"global batch of 12 images \(6 per device on 2\).*`data.bucket_unit`"):
        TrainingSampler(order, 6, 0, 2)


def consumed(order, sizes, steps):
    """What all ranks consume of an order while (batch, ranks) change every `steps` steps, batch by batch."""
    position, taken = Position(), []
    for size, ranks in sizes:
        samplers = [TrainingSampler(order, size, rank, ranks) for rank in range(ranks)]
        for sampler in samplers:
            sampler.position = position
        for requests in islice(zip(*samplers, strict=True), steps):
            taken.append(np.stack([request.rows for request in requests], axis=1).ravel())
            samplers[0].advance()
        position = samplers[0].position
    return taken, position


@given(st.lists(st.sampled_from([(1, 1), (2, 1), (1, 3), (2, 2), (3, 2), (6, 1), (12, 1), (4, 3)]), min_size=1))
@settings(max_examples=60, deadline=None)
def test_shapes_survive_a_change_of_ranks_and_batch(sizes):
    buckets = np.arange(300) * 7 % 11 % 3
    order = BucketedOrder(starts_of([120, 180]), buckets, 12, seed=1)
    whole = order.rows(0, np.arange(len(order)))
    try:
        taken, position = consumed(order, sizes[:8], 2)
    except ValueError as error:
        assert "cannot share them equally" in str(error)  # noqa: PT017 (only some draws are refused)
        return
    assert all(np.ptp(buckets[rows]) == 0 for rows in taken)
    assert np.concatenate(taken).tolist() == whole[: position.samples].tolist()
    assert sum(map(len, taken)) == position.samples


# Mixtures


sizes_of_sources = st.lists(st.integers(20, 700), min_size=1, max_size=4)


@st.composite
def mixtures(draw):
    sizes = draw(sizes_of_sources)
    weights = draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    return sizes, weights, draw(st.integers(500, 9000))


def mixture(sizes, weights, length=None):
    sources = [ShuffledOrder(starts_of([size // 2, size - size // 2]), 3, groups=2, window=64) for size in sizes]
    return MixedOrder(sources, starts_of(sizes)[:-1].tolist(), weights, 3, length)


@given(st.lists(st.floats(1e-6, 1e6), min_size=1, max_size=9), st.integers(1, 5000))
def test_apportionment_is_exact_and_nearest(weights, places):
    counts, quotas = apportion(weights, places), places * np.array(weights) / sum(weights)
    assert counts.sum() == places
    assert np.abs(counts - quotas).max() < 1 + 1e-6
    assert apportion([1, 1, 2], 8).tolist() == [2, 2, 4]


@given(mixtures(), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_shares_are_exact_and_each_source_goes_through_its_own_epochs(arguments, skipped):
    sizes, weights, length = arguments
    order, edges = mixture(sizes, weights, length), starts_of(sizes)
    epochs = range(math.ceil(2 * BLOCK / length) + 1)
    rows = np.concatenate([order.rows(epoch, np.arange(len(order))) for epoch in epochs])[: 2 * BLOCK]
    visits = np.concatenate([order.visits(epoch, np.arange(len(order))) for epoch in epochs])[: 2 * BLOCK]
    source = np.searchsorted(edges, rows, side="right") - 1
    for block in source.reshape(2, BLOCK):
        assert np.bincount(block, minlength=len(sizes)).tolist() == apportion(weights, BLOCK).tolist()
    for k, size in enumerate(sizes):
        own, drawn = order.sources[k], rows[source == k]
        passes = [own.rows(epoch, np.arange(size)) for epoch in range(math.ceil(len(drawn) / size))]
        assert drawn.tolist() == (edges[k] + np.concatenate(passes))[: len(drawn)].tolist()
        assert visits[source == k].tolist() == (np.arange(len(drawn)) // size).tolist()
    # A jump to any place finds what the walk found, with nothing behind it.
    begin = skipped * 1500
    epoch, position = divmod(begin, length)
    end = min(position + 64, length)
    fresh = mixture(sizes, weights, length).rows(epoch, np.arange(position, end))
    assert fresh.tolist() == rows[begin : begin + end - position].tolist()


@given(mixtures(), st.integers(1, 5), st.integers(1, 3))
@settings(max_examples=30, deadline=None)
def test_mixtures_do_not_depend_on_ranks_or_batch(arguments, size, ranks):
    sizes, weights, length = arguments
    order = mixture(sizes, weights, length + 15)
    whole = order.rows(0, np.arange(len(order)))
    taken, position = consumed(order, [(size, ranks), (1, 1), (ranks, size)], 1)
    assert np.concatenate(taken)[: position.samples].tolist() == whole[: position.samples].tolist()


def test_no_visit_of_a_row_is_like_another():
    order = mixture([5, 600], [1, 1])
    keys = []
    for epoch in range(3):
        positions = np.arange(len(order))
        pairs = zip(order.rows(epoch, positions).tolist(), order.visits(epoch, positions).tolist(), strict=True)
        keys += [(epoch, *pair) for pair in pairs]
    assert len(set(keys)) == len(keys)
    assert not ShuffledOrder(starts_of([9]), 0).visits(4, np.arange(9)).any()


def test_weights_in_proportion_to_sizes_show_each_sample_about_once():
    sizes = [1000, 3000, 500]
    order = mixture(sizes, sizes)
    rows = order.rows(0, np.arange(len(order)))
    edges = starts_of(sizes)
    drawn = np.histogram(rows, edges)[0]
    # What a block may hold too many of a source or too few is less than the source's part of one block.
    assert np.abs(drawn - sizes).max() <= 40
    assert len(np.unique(rows)) > 0.98 * sum(sizes)


def test_mixtures_of_units_keep_their_shapes():
    buckets = [np.arange(200) % 3, np.arange(90) % 2]
    sources = [BucketedOrder(starts_of([len(own)]), own, 8, 1) for own in buckets]
    order = MixedOrder(sources, [0, 200], [1, 2], 1, length=1003)
    rows, shape = order.rows(2, np.arange(len(order))), np.concatenate(buckets)
    assert (len(order), order.unit) == (1000, 8)
    assert np.ptp(shape[rows].reshape(-1, 8), axis=1).max() == 0
    assert {len(set(unit)) for unit in rows.reshape(-1, 8).tolist()} == {8}


def test_mixture_is_frozen():
    order = mixture([50, 700, 300], [1, 2, 0.5], 5000)
    rows = np.concatenate([order.rows(epoch, np.arange(5000)) for epoch in (0, 1)])
    assert digest(rows) == "0695826ed0ab4ce684879a46acacfd136a2c304746621551567108b18e3d2a85"


@pytest.mark.parametrize(
    ("weights", "length", "said"),
    [
        ([1, 1e-6], None, r"no place among 4096.*`data.mixture`"),
        ([1, 0], None, "above 0"),
        ([1, math.inf], None, "above 0"),
        ([1], None, "1 weights"),
        ([1, 1], 0, "`data.mixture_length`"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(weights, length, said):
    with pytest.raises(ValueError, match=said):
        mixture([10, 10], weights, length)


def test_what_a_position_depends_on_is_described():
    shuffled = ShuffledOrder(starts_of([10, 10]), 0, groups=7, window=9)
    assert shuffled.describe() == {"shuffle_groups": 7, "shuffle_window": 9}
    described = [shuffled.describe()]
    described += [BucketedOrder(starts_of([12]), np.arange(12) % 2, unit, 0).describe() for unit in (2, 3)]
    described += [mixture([10, 10], weights, length).describe() for weights, length in [((1, 1), 9), ((1, 2), 9)]]
    described += [mixture([10, 10], (1, 1), 8).describe()]
    texts = [json.dumps(one, sort_keys=True) for one in described]
    assert len(set(texts)) == len(texts)
    assert all(json.loads(text) == one for text, one in zip(texts, described, strict=True))
