import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ldm_train.data.crops import (
    REDUCTIONS,
    CenterCrop,
    RandomCrop,
    RandomResizedCrop,
    Shape,
    covering_box,
    crop_of,
    margins,
    reduced,
    reduction,
)
from ldm_train.randomness import Stream, uniform

side = st.integers(1, 3000)
images = st.builds(Shape, side, side)
shapes = st.builds(Shape, st.integers(1, 600), st.integers(1, 600))
number = st.floats(0, 1, exclude_max=True)


@given(images, shapes, number)
def test_a_covering_box_lies_inside_touches_two_borders_and_has_the_ratio(image, shape, place):
    box = covering_box(image, shape, place)
    assert min(box.top, box.left) >= 0
    assert box.top + box.height <= image.height
    assert box.left + box.width <= image.width
    assert box.height == image.height or box.width == image.width
    # The side that is not whole is the exact one rounded, and at least 1.
    exact = min(image.height * shape.width / shape.height, image.width)
    if box.height == image.height:
        assert abs(box.width - exact) <= max(0.5, 1 - exact)


@given(images, st.integers(1, 600), number)
def test_square_boxes_are_where_they_always_were(image, size, place):
    box = covering_box(image, Shape(size, size), place)
    small, large = sorted(image)
    begin = int(place * (large - small + 1))
    assert box == ((begin, 0) if image.height > image.width else (0, begin)) + (small, small)


def test_all_places_are_equally_likely():
    image, shape = Shape(4, 7), Shape(8, 8)
    lefts = [covering_box(image, shape, place).left for place in (0.0, 0.24, 0.26, 0.5, 0.9999999)]
    assert lefts == [0, 0, 1, 2, 3]
    assert RandomCrop()(image, shape, [0.26]) == covering_box(image, shape, 0.26)
    assert CenterCrop()(image, shape, []) == (0, 2, 4, 4)  # of two middle places the second, as ever


@settings(max_examples=300)
@given(images, shapes, st.lists(number, min_size=5, max_size=5), st.floats(0.01, 1), st.floats(1, 4))
def test_a_resized_crop_lies_inside_with_its_area_and_ratio(image, shape, draws, least, stretch):
    crop = RandomResizedCrop((least, 1.0), (1 / stretch, stretch))
    box = crop(image, shape, draws)
    assert min(box.top, box.left) >= 0
    assert box.top + box.height <= image.height
    assert box.left + box.width <= image.width
    if min(box.height, box.width) > 50:  # rounded to whole pixels, small boxes say little
        ratio = box.width / box.height / (shape.width / shape.height)
        assert 1 / stretch / 1.03 <= ratio <= stretch * 1.03
        area = (least + (1 - least) * draws[2]) * image.height * image.width
        assert box.height * box.width <= area * 1.03 + 1


def test_areas_are_uniform_and_ratios_log_uniform_where_all_fit():
    crop = RandomResizedCrop((0.1, 0.4), (0.5, 2.0))
    draws = uniform(0, 0, torch.arange(4000), Stream.AUGMENTATION, (crop.draws,)).tolist()
    boxes = [crop(Shape(2000, 2000), Shape(64, 64), row) for row in draws]
    area = torch.tensor([box.height * box.width / 4e6 for box in boxes])
    log_ratio = torch.tensor([math.log2(box.width / box.height) for box in boxes])
    assert abs(area.mean() - 0.25) < 4 * 0.3 / 12**0.5 / 4000**0.5
    assert abs(log_ratio.mean()) < 4 * 2 / 12**0.5 / 4000**0.5
    assert abs(log_ratio.std() - 2 / 12**0.5) < 0.02
    corners = torch.tensor([[box.top / (2000 - box.height), box.left / (2000 - box.width)] for box in boxes])
    assert ((corners.mean(0) - 0.5).abs() < 4 / 12**0.5 / 4000**0.5).all()
    assert abs(torch.corrcoef(corners.T)[0, 1]) < 4 / 4000**0.5


def test_the_whole_area_unstretched_is_the_covering_box():
    crop = RandomResizedCrop((1.0, 1.0), (1.0, 1.0))
    for image in (Shape(40, 90), Shape(90, 40), Shape(64, 64)):
        assert crop(image, Shape(32, 48), [0.3, 0, 0.5, 0.5, 0.3]) == covering_box(image, Shape(32, 48), 0.3)


@given(images, shapes, number)
def test_margins_and_what_is_shown_make_up_the_resized_image(image, shape, place):
    box = covering_box(image, shape, place)
    top, left, right = margins(image, box, shape)
    width = image.width * shape.width / box.width
    assert abs(left + shape.width + right - width) <= 1.001
    assert top == round(box.top * shape.height / box.height)


@given(images, shapes, number, st.floats(1, 4))
def test_a_reduction_is_the_largest_that_leaves_the_gap(image, shape, place, gap):
    box = covering_box(image, shape, place)
    by = reduction(box, shape, gap)
    assert by == 1 or (box.height >= by * gap * shape.height and box.width >= by * gap * shape.width)
    larger = [r for r in REDUCTIONS if r > by]
    assert not any(box.height >= r * gap * shape.height and box.width >= r * gap * shape.width for r in larger)
    assert reduction(box, shape, None) == 1


@given(images, shapes, number, st.sampled_from(REDUCTIONS))
def test_a_reduced_box_is_the_same_part_to_half_a_pixel(image, shape, place, by):
    box = covering_box(image, shape, place)
    small = Shape(*(-(-side // by) for side in image))
    found = reduced(box, by, small)
    assert min(found.top, found.left) >= 0
    assert min(found.height, found.width) >= 1
    assert found.top + found.height <= small.height
    assert found.left + found.width <= small.width
    for begin, length, old_begin, old_length in zip(found[:2], found[2:], box[:2], box[2:], strict=True):
        tolerance = 0.5 if old_length >= by else 1.5  # there a whole pixel is kept of less than one
        assert abs(begin - old_begin / by) <= tolerance
        assert abs(begin + length - (old_begin + old_length) / by) <= tolerance


def test_names_and_objects_are_crops():
    own = RandomResizedCrop()
    assert crop_of(own) is own
    assert isinstance(crop_of("center"), CenterCrop)
    assert isinstance(crop_of("random"), RandomCrop)
    with pytest.raises(ValueError, match=r"`data.crop` is 'left'; it must be one of \('center', 'random'\), or"):
        crop_of("left")


@pytest.mark.parametrize(
    ("ranges", "key"),
    [
        ({"area": (0.0, 1.0)}, "area"),
        ({"area": (0.5, 1.1)}, "area"),
        ({"ratio": (2.0, 1.0)}, "ratio"),
        ({"ratio": (1.0,)}, "ratio"),
    ],
)
def test_impossible_ranges_are_refused(ranges, key):
    with pytest.raises(ValueError, match=rf"{key} is \[.*\]; allowed are two numbers .*; change `data.crop.{key}`"):
        RandomResizedCrop(**ranges)
