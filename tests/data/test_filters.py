import json
import math

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from ldm_train.data import FieldIn, FieldNotIn, MinimumSize, build_index, expand_shards
from ldm_train.data.filters import AspectRatio, CaptionLength, Maximum, Minimum
from ldm_train.data.parquet import read_table
from ldm_train.data.storage import LOCAL_FILES
from ldm_train.data.writing import metadata_table
from tests.data.conftest import sample, write_tar

FILTERS = [
    (FieldIn("parity", [1]), [1, 3, 5], "fails: parity in [1]"),
    (FieldNotIn("number", [0, 2]), [1, 3, 4, 5], "fails: number not in [0, 2]"),
    (MinimumSize(8), [0, 1, 2, 3, 4, 5], None),
    (MinimumSize(9), [], "fails: short side >= 9"),
    (FieldIn("colour", ["red"]), [], "no metadata field 'colour' for colour in ['red']"),
    (FieldNotIn("colour", ["red"]), [], "no metadata field 'colour' for colour not in ['red']"),
]


@pytest.mark.parametrize(("filter_", "kept", "reason"), FILTERS)
def test_kept_and_refused_add_up(write_shards, filter_, kept, reason):
    whole = build_index(expand_shards(write_shards(4, 2)))
    index = whole.filtered([filter_])
    assert index.sample_id.tolist() == kept
    assert dict(index.refused) == ({} if reason is None else {reason: 6 - len(kept)})
    assert filter_.description in index.selection
    assert index.fingerprint != whole.fingerprint


def test_a_sample_is_counted_under_the_first_filter_it_fails(write_shards):
    index = build_index(expand_shards(write_shards(6))).filtered([FieldIn("parity", [1]), FieldIn("number", [1, 2])])
    assert index.sample_id.tolist() == [1]
    assert dict(index.refused) == {"fails: parity in [1]": 3, "fails: number in [1, 2]": 2}


def test_unreadable_metadata_are_refused_and_counted(tmp_path):
    members = [*sample(0), sample(1)[0], sample(1)[2]]
    for number, text in ((2, b"{"), (3, b"[1]"), (4, b"\xff\xfe")):
        members += [sample(number)[0], (f"{number:06d}.json", text), sample(number)[2]]
    index = build_index([str(write_tar(tmp_path / "a.tar", members))])
    assert len(index) == 5
    filtered = index.filtered([MinimumSize(1)])
    assert filtered.sample_id.tolist() == [0]
    assert filtered.refused.total() == 4
    assert all(reason.startswith("metadata: ") for reason in filtered.refused)


def test_metadata_are_read_only_for_filters(tmp_path):
    index = build_index([str(write_tar(tmp_path / "a.tar", sample(0)))])
    (tmp_path / "a.tar").unlink()
    assert index.filtered([]) is index


LAION = [
    (Maximum("punsafe", 0.5), {"punsafe": 0.5}, {"punsafe": 0.51}),
    (Minimum("similarity", 0.3), {"similarity": 0.3}, {"similarity": 0.29}),
    (Minimum("AESTHETIC_SCORE", 5), {"AESTHETIC_SCORE": 5.0}, {"AESTHETIC_SCORE": 4}),
    (AspectRatio(2), {"width": 20, "height": 10}, {"width": 20, "height": 9}),
    (AspectRatio(2), {"width": 10, "height": 20}, {"width": 0, "height": 0}),
    (CaptionLength(2, 3), {"caption": " abc\n"}, {"caption": "abcd"}),
    (CaptionLength(2), {"caption": "ab"}, {"caption": " a "}),
    (CaptionLength(1, field="TEXT"), {"TEXT": "a"}, {"TEXT": ""}),
    (MinimumSize(9), {"width": 9, "height": 10}, {"width": 9, "height": 8}),
]


@pytest.mark.parametrize(("filter_", "good", "bad"), LAION)
def test_filters_keep_the_good_and_refuse_the_bad(filter_, good, bad):
    assert filter_("key", good) is True
    assert filter_("key", bad) is False
    assert set(filter_.fields) == set(good)
    for field in good:
        with pytest.raises(KeyError, match=field):
            filter_("key", {**good, field: None})
        with pytest.raises(KeyError, match=field):
            filter_("key", {other: value for other, value in good.items() if other != field})
        with pytest.raises(ValueError, match=f"{field} is no"):
            filter_("key", {**good, field: []})


@pytest.mark.parametrize("kind", [Maximum, Minimum])
def test_missing_numbers_are_kept_when_asked_for(kind):
    for metadata in ({}, {"similarity": None}, {"similarity": math.nan}):
        assert kind("similarity", 0.3, keep_missing=True)("key", metadata)
        with pytest.raises(KeyError, match="similarity"):
            kind("similarity", 0.3)("key", metadata)
    assert kind("similarity", 0.3, keep_missing=True).description != kind("similarity", 0.3).description


@given(number=st.floats(allow_nan=False, allow_infinity=False), value=st.floats(-10, 10))
def test_a_number_is_above_or_below_or_both_when_equal(number, value):
    metadata = {"f": number}
    assert Maximum("f", value)("", metadata) + Minimum("f", value)("", metadata) == 1 + (number == value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AspectRatio(0.5), "max_ratio is 0.5; allowed.*`data.filters`"),
        (lambda: CaptionLength(5, 4), "min is 5 and max is 4; allowed.*`data.filters`"),
    ],
)
def test_filters_that_nothing_can_pass_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def with_parquet(folder, rows, table=None):
    """A shard whose samples' `.json` are the rows, and the parquet beside it."""
    members = []
    for number, row in enumerate(rows):
        image, _, caption = sample(number)
        members += [image, (f"{number:06d}.json", json.dumps(row).encode()), caption]
    path = write_tar(folder / "00000.tar", members)
    keyed = [{"key": f"{number:06d}", "status": "success"} | row for number, row in enumerate(rows)]
    failed = {"key": "000099", "status": "failed_to_download"}
    pq.write_table(metadata_table([failed, *keyed]) if table is None else table, folder / "00000.parquet")
    return str(path)


VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.floats(-3, 3),
    st.just(math.nan),
    st.sampled_from(["a", "1", "null"]),
)
ROWS = st.lists(st.dictionaries(st.sampled_from(["a", "b", "caption"]), VALUES, max_size=3), min_size=1, max_size=6)
EVERY = [Maximum("a", 1), Minimum("b", 0, keep_missing=True), FieldIn("b", [1, "a", None, True])]
EVERY += [FieldNotIn("a", [0, "1"]), CaptionLength(1, 3), Maximum("b", 2)]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(rows=[{"b": 0.0}, {"a": None, "b": False}], filters=[EVERY[1]])  # false is no number, and must stay false
@given(rows=ROWS, filters=st.lists(st.sampled_from(EVERY), min_size=1, max_size=3))
def test_parquet_and_json_give_the_same_selection(tmp_path_factory, rows, filters):
    folder = tmp_path_factory.mktemp("shards")
    path = with_parquet(folder, rows)
    with_parquets = build_index([path]).filtered(filters)
    (folder / "00000.parquet").unlink()
    without = build_index([path]).filtered(filters)
    assert with_parquets.sample_id.tolist() == without.sample_id.tolist()
    assert with_parquets.refused == without.refused


def test_what_the_parquet_has_is_not_read_from_the_members(tmp_path):
    rows = [{"punsafe": number / 4, "width": 8} for number in range(5)]
    path = with_parquet(tmp_path, rows)
    data = bytearray((tmp_path / "00000.tar").read_bytes())
    for row in rows:
        text = json.dumps(row).encode()
        data[data.index(text) : data.index(text) + len(text)] = b"{" * len(text)
    (tmp_path / "00000.tar").write_bytes(data)
    index = build_index([path])
    assert index.filtered([Maximum("punsafe", 0.5)]).sample_id.tolist() == [0, 1, 2]
    assert index.filtered([MinimumSize(8)]).sample_id.tolist() == []  # no column `height`: the damaged json is asked


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"key": ["000000"], "a": ["[1]"]}),  # may stand for a list
        pa.table({"key": ["000000"], "a": [[1]]}),
        pa.table({"key": ["000000"], "b": [1]}),
        pa.table({"a": [1]}),
        pa.Table.from_arrays([pa.array(["000000"]), pa.array([1]), pa.array([2])], ["key", "a", "a"]),
    ],
)
def test_a_parquet_that_may_differ_from_the_json_is_not_believed(tmp_path, table):
    path = with_parquet(tmp_path, [{"a": 1}], table)
    assert read_table(path, ("a",), LOCAL_FILES) == {}
    (tmp_path / "00000.parquet").write_bytes(b"PAR1 damaged")
    assert read_table(path, ("a",), LOCAL_FILES) == {}


@pytest.mark.parametrize("harm", ["text", "name"])
def test_a_parquet_that_is_no_utf8_leaves_it_to_the_json(tmp_path, harm):
    path = with_parquet(tmp_path, [{"similar": "a long text"}, {"similar": "b"}])
    file, bad = tmp_path / "00000.parquet", {"text": b"a long text", "name": b"similar"}[harm]
    table = pa.table({"key": ["000000", "000001"], "similar": ["a long text", "b"]})
    pq.write_table(table, file, compression="none", use_dictionary=False, write_statistics=False, store_schema=False)
    data = file.read_bytes()
    assert bad in data
    file.write_bytes(data.replace(bad, b"\xff" * len(bad)))
    assert read_table(path, ("similar",), LOCAL_FILES) == {}
    assert build_index([path]).filtered([FieldIn("similar", ["a long text"])]).sample_id.tolist() == [0]


def test_texts_of_a_parquet_that_are_nested_without_end_leave_it_to_the_json(tmp_path):
    deep = "[" * 100_000
    path = with_parquet(tmp_path, [{"a": 1}], pa.table({"key": ["000000"], "a": [deep]}))
    assert read_table(path, ("a",), LOCAL_FILES) == {}
    assert build_index([path]).filtered([Minimum("a", 1)]).sample_id.tolist() == [0]


@pytest.mark.parametrize("workers", [0, 2])
def test_a_new_parquet_is_a_new_selection(tmp_path, workers):
    path = with_parquet(tmp_path, [{"a": 1}, {"a": 2}])
    index = build_index([path], directory=tmp_path / "index")
    assert index.filtered([Maximum("a", 1)], workers).sample_id.tolist() == [0]
    table = pa.table({"key": ["000000", "000001"], "a": [3, 0]})
    pq.write_table(table, tmp_path / "00000.parquet")
    assert index.filtered([Maximum("a", 1)], workers).sample_id.tolist() == [1]


def test_dimensions_of_the_parquet_are_believed_where_headers_agree(tmp_path, monkeypatch):
    rows = [{"width": 8, "height": 8}] * 20
    path = with_parquet(tmp_path, rows)
    from ldm_train.data import scanning

    opened, real = [], scanning._upright_size
    monkeypatch.setattr(scanning, "_upright_size", lambda *place: opened.append(place) or real(*place))
    index = build_index([path], dimensions=True)
    assert index.dimensions(np.arange(20)).tolist() == [[8, 8]] * 20
    assert len(opened) == 8
    with_parquet(tmp_path, [{"width": 8, "height": 9}] * 20)
    assert build_index([path], dimensions=True).dimensions(np.arange(20)).tolist() == [[8, 8]] * 20
