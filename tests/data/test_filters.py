import pytest

from ldm_train.data import FieldIn, FieldNotIn, MinimumSize, build_index, expand_shards
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
