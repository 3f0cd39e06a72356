from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_train.data.captions import (
    FieldCaption,
    PlainCaption,
    ShuffledTags,
    TextCaption,
    TextLines,
    Texts,
    WeightedCaptions,
)
from ldm_train.data.index import CAPTION, METADATA
from ldm_train.data.quarantine import CaptionError
from ldm_train.randomness import Stream, uniform

COUNT = 4000
TEXTS = Texts(" a dog\n\n two dogs \n", {"text": " field ", "many": ["one", "two", "three"], "tags": "a, b,c , d,,e"})
SOURCES = [
    TextCaption(),
    TextLines(),
    FieldCaption("many"),
    WeightedCaptions([FieldCaption("many"), TextLines()], [1, 3]),
    ShuffledTags(FieldCaption("tags"), keep=1, drop_rate=0.5),
]


def drawn(source, texts=TEXTS, count=COUNT):
    numbers = uniform(0, 0, torch.arange(count), Stream.CAPTION, (source.draws,)) if source.draws else [[]] * count
    return [source(texts, row.tolist() if torch.is_tensor(row) else row) for row in numbers]


def assert_shares(counts, shares):
    assert set(counts) == set(shares)
    for caption, share in shares.items():
        assert abs(counts[caption] / COUNT - share) <= 4 * (share * (1 - share) / COUNT) ** 0.5


def test_the_text_is_taken_as_a_whole():
    assert TextCaption()(TEXTS, []) == "a dog\n\n two dogs"
    assert TextCaption()(Texts(""), []) == TextLines()(Texts(" \n"), [0.7]) == ""


def test_lines_and_lists_are_equally_likely():
    assert_shares(Counter(drawn(TextLines())), {"a dog": 1 / 2, "two dogs": 1 / 2})
    assert_shares(Counter(drawn(FieldCaption("many"))), {"one": 1 / 3, "two": 1 / 3, "three": 1 / 3})
    assert set(drawn(FieldCaption("text"), count=9)) == {"field"}


def test_sources_are_drawn_by_their_weights():
    source = WeightedCaptions([TextCaption(), FieldCaption("many"), FieldCaption("absent")], [3, 1, 0])
    shares = {"a dog\n\n two dogs": 3 / 4, "one": 1 / 12, "two": 1 / 12, "three": 1 / 12}
    assert_shares(Counter(drawn(source)), shares)
    assert source.kinds == {CAPTION, METADATA}


def test_tags_are_shuffled_behind_those_that_stay():
    source = ShuffledTags(FieldCaption("tags"), keep=2)
    counts = Counter(drawn(source))
    assert_shares(
        counts,
        {f"a, b, {order}": 1 / 6 for order in ("c, d, e", "c, e, d", "d, c, e", "d, e, c", "e, c, d", "e, d, c")},
    )


def test_tags_are_left_out_each_on_its_own():
    tags = [caption.split(", ") for caption in drawn(ShuffledTags(FieldCaption("tags"), keep=1, drop_rate=0.3))]
    present = torch.tensor([[tag in row for tag in "abcde"] for row in tags]).double()
    assert all(row[0] == "a" for row in tags)
    assert ((present.mean(0)[1:] - 0.7).abs() < 4 * (0.21 / COUNT) ** 0.5).all()
    assert (torch.corrcoef(present[:, 1:].T) - torch.eye(4)).abs().max() < 4 / COUNT**0.5


@given(st.lists(st.text("abc xyz", min_size=1), max_size=12), st.integers(0, 3), st.integers(4, 8), st.integers(0, 999))
def test_no_tag_is_lost_or_made_and_the_last_stay_last(tags, keep, most, sample_id):
    expected = [tag.strip() for tag in tags if tag.strip()]
    source = ShuffledTags(TextCaption(), keep, separator=";", max_tags=most)
    numbers = uniform(0, 0, torch.tensor([sample_id]), Stream.CAPTION, (source.draws,))[0].tolist()
    found = source(Texts(";".join(tags)), numbers).split("; ") if expected else []
    assert sorted(found) == sorted(expected)
    assert found[:keep] == expected[:keep]
    assert found[most:] == expected[most:]


@pytest.mark.parametrize("source", SOURCES)
def test_validation_reads_the_first_caption_as_it_stands(source):
    first = {TextLines: "a dog", TextCaption: "a dog\n\n two dogs", ShuffledTags: "a, b, c, d, e"}
    plain = PlainCaption(source)
    assert plain(TEXTS, []) == first.get(type(source), "one")
    assert (plain.draws, plain.kinds) == (0, source.kinds)


@pytest.mark.parametrize(
    ("value", "error"),
    [
        ({}, KeyError),
        ({"f": 4}, CaptionError),
        ({"f": []}, CaptionError),
        ({"f": ["a", None]}, CaptionError),
        ({"f": None}, CaptionError),
    ],
)
def test_fields_that_hold_no_text_are_errors(value, error):
    with pytest.raises(error, match="metadata field 'f'"):
        FieldCaption("f")(Texts(None, value), [0.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WeightedCaptions([], []), r"0 sources .*; allowed are one .*; change `data.caption.weights`"),
        (lambda: WeightedCaptions([TextCaption()], [0]), "first above 0"),
        (lambda: WeightedCaptions([TextCaption()], [1, 2]), "each with a weight"),
        (lambda: ShuffledTags(TextCaption(), keep=-1), r"keep is -1; allowed are .*; change `data.caption.keep`"),
        (lambda: ShuffledTags(TextCaption(), drop_rate=1.0), r"drop_rate is 1.0; allowed are 0 to below 1"),
        (lambda: ShuffledTags(TextCaption(), separator=" "), r"separator is ' '; allowed"),
        (lambda: ShuffledTags(TextCaption(), keep=8, max_tags=8), r"max_tags is 8; allowed are numbers above"),
    ],
)
def test_impossible_sources_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
