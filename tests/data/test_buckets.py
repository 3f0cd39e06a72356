import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_train.data.buckets import AspectBuckets, ShapeOfRow, assign, bucket_shapes, next_alike

arguments = st.tuples(st.integers(1, 24), st.sampled_from([1, 8, 32, 64]), st.floats(1, 5))


@given(arguments)
def test_shapes_are_multiples_of_little_less_than_one_area_in_both_orientations(drawn):
    count, step, ratio = drawn
    size = count * step
    shapes = bucket_shapes(size, step, ratio)
    assert (size, size) in shapes
    assert {(width, height) for height, width in shapes} == set(shapes)
    for height, width in shapes:
        assert height % step == width % step == 0
        assert size * size - step * max(height, width) < height * width <= size * size
        assert max(height, width) <= ratio * min(height, width)
    ratios = [width / height for height, width in shapes]
    assert ratios == sorted(set(ratios))
    heights = [height for height, width in shapes if height <= width]
    assert len(set(heights)) == len(heights)


def test_no_shape_that_would_fit_is_missing():
    shapes = bucket_shapes(512, 64, 2.0)
    assert shapes == [(640, 384), (576, 448), (512, 512), (448, 576), (384, 640)]
    assert (256, 1024) in bucket_shapes(512, 64, 4.0)
    assert bucket_shapes(256, 32, 1.0) == [(256, 256)]


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(1, 5000)), min_size=1, max_size=40))
def test_every_image_goes_to_the_nearest_ratio(sizes):
    shapes = AspectBuckets(64, 2.5).shapes(512)
    ratios = np.log([width / height for height, width in shapes])
    found = assign(np.array(sizes, dtype=np.int32), shapes)
    for (width, height), bucket in zip(sizes, found, strict=True):
        distances = np.abs(ratios - np.log(width / height))
        assert distances[bucket] <= distances.min() + 1e-9
    turned = assign(np.array(sizes, dtype=np.int32)[:, ::-1], shapes)
    nearly_tied = [np.ptp(np.sort(np.abs(ratios - np.log(w / h)))[:2]) < 1e-9 for w, h in sizes]
    assert all(a + b == len(shapes) - 1 for a, b, tied in zip(found, turned, nearly_tied, strict=True) if not tied)


def test_long_data_sets_are_assigned_in_parts(monkeypatch):
    sizes = np.random.default_rng(0).integers(100, 1000, (1000, 2), dtype=np.int32)
    shapes = bucket_shapes(256, 32)
    whole = assign(sizes, shapes)
    monkeypatch.setattr("ldm_train.data.buckets._CHUNK", 7)
    assert np.array_equal(assign(sizes, shapes), whole)
    assert whole.dtype == np.uint8
    shape_of = ShapeOfRow(shapes, whole)
    assert [shape_of(row) for row in range(5)] == [shapes[bucket] for bucket in whole[:5]]


def test_images_of_unknown_size_are_refused(monkeypatch):
    monkeypatch.setattr("ldm_train.data.buckets._CHUNK", 2)
    sizes = np.array([[8, 8], [8, 9], [9, 8], [-1, -1], [-1, -1]], dtype=np.int32)
    message = r"size of 2 of 5 images is not known, row 3 .*; aspect buckets need .*; leave such .* `data.filters`"
    with pytest.raises(ValueError, match=message):
        assign(sizes, bucket_shapes(64, 8))


@pytest.mark.parametrize(
    ("size", "step", "ratio", "message"),
    [
        (100, 64, 2.0, r"image_size is 100 and the buckets' step 64; allowed are .*; change `image_size` or"),
        (64, 0, 2.0, r"step 0; allowed .*`data.buckets.step`"),
        (64, 8, math.nan, r"max_ratio is nan; allowed are numbers from 1"),
        (64, 8, 0.5, r"max_ratio is 0.5; allowed are numbers from 1, .*; change `data.buckets.max_ratio`"),
    ],
)
def test_impossible_buckets_are_refused(size, step, ratio, message):
    with pytest.raises(ValueError, match=message):
        bucket_shapes(size, step, ratio)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.data())
def test_the_next_row_of_a_shape_is_the_first_one_around_the_end(buckets, data):
    shapes = bucket_shapes(64, 8)[:4]
    shape_of, rows = ShapeOfRow(shapes, np.array(buckets, dtype=np.uint8)), st.integers(0, len(buckets) - 1)
    row, start = data.draw(rows), data.draw(rows)
    around = [*range(start, len(buckets)), *range(start)]
    expected = next(candidate for candidate in around if buckets[candidate] == buckets[row])
    assert next_alike(shape_of, row, start, len(buckets)) == expected
