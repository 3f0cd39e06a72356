import hashlib
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_train.data import Position, ShuffledOrder, TrainingSampler, ValidationSampler
from ldm_train.data.sampler import substitute_rows


def starts_of(counts):
    return np.concatenate(([0], np.cumsum(counts)))


layouts = st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(sum)


@given(layouts, st.integers(1, 8), st.integers(1, 50), st.integers(0, 2**64 - 1), st.integers(0, 3))
@settings(max_examples=200, deadline=None)
def test_every_epoch_is_a_permutation(counts, groups, window, seed, epoch):
    order = ShuffledOrder(starts_of(counts), seed, groups, window)
    assert sorted(order.rows(epoch, np.arange(len(order)))) == list(range(sum(counts)))


@given(layouts, st.integers(1, 8), st.integers(1, 50), st.data())
@settings(max_examples=100, deadline=None)
def test_any_position_is_reached_without_those_before(counts, groups, window, data):
    order = ShuffledOrder(starts_of(counts), 1, groups, window)
    whole = order.rows(2, np.arange(len(order)))
    some = np.array(data.draw(st.lists(st.integers(0, len(order) - 1), min_size=1, max_size=9)))
    assert ShuffledOrder(starts_of(counts), 1, groups, window).rows(2, some).tolist() == whole[some].tolist()
    order.rows(3, some)
    assert order.rows(2, some).tolist() == whole[some].tolist()


def test_order_is_frozen():
    """A change of these digits changes the data that every saved position stands for."""
    order = ShuffledOrder(starts_of([1000, 37, 500, 2000]), seed=2**40 + 5, groups=4, window=256)
    rows = np.concatenate([order.rows(epoch, np.arange(len(order))) for epoch in range(3)])
    digest = hashlib.sha256(rows.astype("<i8").tobytes()).hexdigest()
    assert digest == "996b7db4719b3beffc8c201466144d4ca93e7422c95b4c02a25c48ae4fc62f99"


def test_epochs_and_seeds_differ_and_are_well_mixed():
    starts = starts_of([500, 500])
    first = ShuffledOrder(starts, 0).rows(0, np.arange(1000))
    for other in (ShuffledOrder(starts, 0).rows(1, np.arange(1000)), ShuffledOrder(starts, 1).rows(0, np.arange(1000))):
        # Fixed points of a random permutation are Poisson(1); correlations have a standard deviation of 0.03.
        assert (first == other).sum() <= 7
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.15
    assert abs(np.corrcoef(first, np.arange(1000))[0, 1]) < 0.15


def test_small_data_sets_are_permuted_as_a_whole():
    orders = {tuple(ShuffledOrder(starts_of([3]), seed).rows(0, np.arange(3))) for seed in range(60)}
    assert len(orders) == math.factorial(3)


def test_each_group_reads_its_place_in_windows():
    groups, window, total = 4, 16, 400
    order = ShuffledOrder(starts_of([total]), 0, groups, window)
    rows = order.rows(0, np.arange(total)).reshape(-1, groups)
    for group in range(groups):
        for begin in range(0, total // groups, window):
            place = group * total // groups + begin
            read = rows[begin : begin + window, group]
            assert sorted(read) == list(range(place, place + len(read)))


def take(sampler, batches):
    """The rows of the next batches, moving the position as training would, epoch after epoch."""
    requests = []
    while len(requests) < batches:
        for request in sampler:
            requests.append(request)
            sampler.advance()
            if len(requests) == batches:
                break
    return requests


def global_rows(order, size, ranks, position, steps):
    """What all ranks together consume in the order of positions, and where they then stand."""
    samplers = [TrainingSampler(order, size, rank, ranks) for rank in range(ranks)]
    for sampler in samplers:
        sampler.position = position
    taken = [take(sampler, steps) for sampler in samplers]
    assert len({sampler.position for sampler in samplers}) == 1
    rows = [row for step in zip(*taken, strict=True) for row in np.stack([part.rows for part in step], 1).ravel()]
    return rows, samplers[0].position


@given(layouts, st.integers(1, 4), st.integers(1, 4), st.integers(0, 9))
@settings(max_examples=100, deadline=None)
def test_ranks_share_every_epoch_in_equal_steps(counts, size, ranks, seed):
    order = ShuffledOrder(starts_of(counts), seed, groups=2, window=8)
    batch, total = size * ranks, sum(counts)
    if total < batch:
        with pytest.raises(ValueError, match=r"lower `data.batch_size`"):
            TrainingSampler(order, size, 0, ranks)
        return
    assert {len(TrainingSampler(order, size, rank, ranks)) for rank in range(ranks)} == {total // batch}
    rows, position = global_rows(order, size, ranks, Position(), 2 * (total // batch))
    used = total // batch * batch
    expected = [order.rows(epoch, np.arange(used)).tolist() for epoch in (0, 1)]
    assert rows == expected[0] + expected[1]
    assert position == Position(2, 0)


@given(layouts, st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=2, max_size=5), st.integers(0, 2))
@settings(max_examples=100, deadline=None)
def test_changing_ranks_and_batch_size_keeps_the_sequence(counts, sizes, steps):
    order = ShuffledOrder(starts_of(counts), 4, groups=3, window=8)
    whole = order.rows(0, np.arange(len(order))).tolist()
    position, consumed = Position(), []
    for size, ranks in sizes:
        if (len(order) - position.samples) // (size * ranks) <= steps:
            break
        rows, position = global_rows(order, size, ranks, position, steps)
        consumed += rows
    assert consumed == whole[: len(consumed)]
    assert position == Position(0, len(consumed))


@given(layouts, st.integers(1, 4), st.integers(1, 4))
@settings(max_examples=60, deadline=None)
def test_positions_of_a_step_are_consecutive_and_name_their_rows(counts, size, ranks):
    order = ShuffledOrder(starts_of(counts), 4, groups=2, window=8)
    if len(order) < size * ranks:
        return
    own = [list(TrainingSampler(order, size, rank, ranks)) for rank in range(ranks)]
    for step, requests in enumerate(zip(*own, strict=True)):
        together = np.stack([request.positions for request in requests], 1).ravel()
        assert together.tolist() == list(range(step * size * ranks, (step + 1) * size * ranks))
        for request in requests:
            assert request.rows.tolist() == order.rows(0, request.positions).tolist()


def test_length_is_that_of_the_full_epoch_after_a_jump():
    sampler = TrainingSampler(ShuffledOrder(starts_of([100]), 0), 3, 0, 2)
    sampler.position = Position(5, 60)
    assert (len(sampler), sampler.remaining, len(list(sampler))) == (16, 6, 6)


@given(st.integers(1, 60), st.integers(1, 5), st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_validation_loses_and_repeats_nothing(rows, size, ranks):
    samplers = [ValidationSampler(rows, size, rank, ranks) for rank in range(ranks)]
    batches = [[request.rows.tolist() for request in sampler] for sampler in samplers]
    assert {len(own) for own in batches} == {len(samplers[0])}
    assert all(len(sampler) == len(own) for sampler, own in zip(samplers, batches, strict=True))
    assert all(1 <= len(batch) <= size + 1 for own in batches for batch in own)
    seen = sorted(row for own in batches for batch in own for row in batch)
    positions = sorted(place for sampler in samplers for request in sampler for place in request.positions.tolist())
    assert positions == list(range(len(positions)))
    if rows >= ranks:
        assert seen == positions == list(range(rows))
    else:
        assert set(seen) == set(range(rows))
        assert len(seen) == ranks


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 5), st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_validation_of_buckets_loses_nothing_and_mixes_no_shapes(buckets, size, ranks):
    buckets = np.array(buckets)
    samplers = [ValidationSampler(len(buckets), size, rank, ranks, buckets) for rank in range(ranks)]
    steps = list(zip(*samplers, strict=True))
    assert len(steps) == len(samplers[0])
    shown = []
    for step in steps:
        assert all(1 <= len(part.rows) <= size + 1 for part in step)
        rows = np.concatenate([part.rows for part in step])
        assert np.ptp(buckets[rows]) == 0
        shown += rows.tolist()
    positions = [place for step in steps for part in step for place in part.positions.tolist()]
    assert sorted(positions) == list(range(len(shown)))
    repeated = sum(max(0, ranks - count) for count in np.bincount(buckets) if count)
    assert set(shown) == set(range(len(buckets)))
    assert len(shown) == len(buckets) + repeated


def test_jump_into_a_large_index_is_quick_and_small():
    import time
    import tracemalloc

    starts = starts_of(np.full(10_000, 10_000))
    tracemalloc.start()
    order = ShuffledOrder(starts, 0)
    order.rows(0, np.arange(2))
    begin = time.perf_counter()
    rows = order.rows(1, np.arange(54_321_000, 54_321_064))
    seconds = time.perf_counter() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(set(rows.tolist())) == 64
    assert seconds < 0.2  # about 5 ms on an idle core
    assert peak < 32 << 20


def test_substitutes_depend_on_nothing_but_their_key():
    rows = substitute_rows(8, 1000, seed=1, epoch=2, sample_id=3)
    assert rows == substitute_rows(8, 1000, seed=1, epoch=2, sample_id=3)
    others = [(0, 2, 3), (1, 3, 3), (1, 2, 4), (1 + 2**32, 2, 3), (1, 2, 3 + 2**32)]
    assert all(rows != substitute_rows(8, 1000, *key) for key in others)
    assert len(set(rows)) > 4
    assert 0 <= min(rows) <= max(rows) < 1000
