import hashlib
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ldm_train.data import build_index, expand_shards
from ldm_train.data.index import CAPTION, IMAGE, METADATA
from ldm_train.data.selections import RowNumbers, smallest
from ldm_train.data.shards import ShardReader
from tests.data.conftest import sample, write_tar


def keys(index):
    return [index.key(row) for row in range(len(index))]


def test_patterns_globs_and_lists_name_the_same_shards(write_shards, tmp_path):
    pattern = write_shards(1, 1, 1)
    folder = tmp_path / "shards"
    listed = [str(folder / f"{n:05d}.tar") for n in range(3)]
    assert expand_shards(pattern) == expand_shards(f"{folder}/{{00000..00002}}.tar") == tuple(listed)
    assert expand_shards([listed[0], f"{folder}/0000[12].tar"]) == tuple(listed)


@pytest.mark.parametrize(
    ("shards", "error", "message"),
    [
        (
            "{0}/{{00000..00003}}.tar",
            FileNotFoundError,
            r"no shard '00003.tar' in .*shards \(the folder exists\).*`data.shards`",
        ),
        ("{0}/no/*.tar", FileNotFoundError, r"the folder does not exist"),
        (["{0}/*.tar", "{0}/00001.tar"], ValueError, r"00001.tar is named 2 times.*`data.shards`"),
        ([], ValueError, r"`data.shards` is empty"),
        ("pipe:cat {0}/00000.tar", ValueError, r"`data.shards` names 'pipe:"),
        ("ftp://host/00000.tar", ValueError, r"files on a mounted disk"),
    ],
)
def test_wrong_shards_are_refused(write_shards, tmp_path, shards, error, message):
    write_shards(1, 1, 1)
    place = str(tmp_path / "shards")
    shards = shards.format(place) if isinstance(shards, str) else [shard.format(place) for shard in shards]
    with pytest.raises(error, match=message):
        expand_shards(shards)


def test_rows_lead_to_the_members(write_shards):
    index = build_index(expand_shards(write_shards(3, 0, 2)))
    reader = ShardReader(index.paths)
    assert index.starts.tolist() == [0, 3, 3, 5]
    assert not index.damage
    for row in range(5):
        image, metadata, caption = (data for _, data in sample(row))
        assert index.read(reader, row, IMAGE) == image
        assert index.read(reader, row, CAPTION) == caption
        assert index.metadata(reader, row) == json.loads(metadata)
        assert index.full_key(row) == f"{'00000' if row < 3 else '00002'}/{row:06d}"


def test_every_sample_is_indexed_or_named(tmp_path):
    members = [
        *sample(0),
        *sample(1)[1:],  # no image
        *sample(2)[:2],  # no caption
        *sample(3),
        *sample(4),
        *sample(3)[:1],  # twice
        ("000005.jpg", b""),
        ("000005.txt", b"empty image"),
        ("000006.PNG", b"x"),
        ("000006.txt", b""),
        ("000007.seg.png", b"another kind of file"),
        ("folder.v1/000008.webp", b"x"),
        ("folder.v1/000008.txt", b"x"),
    ]
    path = write_tar(tmp_path / "a.tar", members)
    index = build_index([str(path)])
    assert keys(index) == ["000000", "000004", "000006", "folder.v1/000008"]
    named = {reason.split(":")[0]: reason for _, reason in index.damage}
    assert set(named) == {"000001", "000002", "000003", "000005"}
    assert "no image" in named["000001"]
    assert "no caption" in named["000002"]
    assert "more than one image" in named["000003"]
    assert "empty" in named["000005"]


def test_captions_may_come_from_metadata(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample(0)[:2], sample(1)[0], sample(1)[2]])
    assert keys(build_index([str(path)], (IMAGE, METADATA))) == ["000000"]
    assert keys(build_index([str(path)], (IMAGE, CAPTION))) == ["000001"]


def test_stats_file_is_believed(write_shards, tmp_path):
    paths = expand_shards(write_shards(2, 2))
    for number, promised in enumerate((2, 3)):
        (tmp_path / "shards" / f"{number:05d}_stats.json").write_text(json.dumps({"successes": promised}))
    damage = build_index(paths).damage
    assert [entry.shard for entry in damage] == ["00001.tar"]
    assert "2 complete samples where the stats file promises 3" in damage[0].reason


def test_selections_keep_rows_together_and_change_the_fingerprint(write_shards):
    index = build_index(expand_shards(write_shards(3, 4)))
    keep = np.asarray(index.sample_id) % 2 == 1
    odd = index.select(keep, "odd")
    assert odd.sample_id.tolist() == [1, 3, 5]
    assert odd.starts.tolist() == [0, 1, 3]
    assert keys(odd) == ["000001", "000003", "000005"]
    assert [odd.shard_of(row) for row in range(3)] == [0, 1, 1]
    prints = {index.fingerprint, odd.fingerprint, index.select(keep, "others").fingerprint}
    prints.add(index.select(~keep, "odd").fingerprint)
    assert len(prints) == 4


def test_fingerprint_is_of_the_data_and_not_of_the_place(write_shards, tmp_path):
    here = build_index(expand_shards(write_shards(3, 4)))
    moved = build_index(expand_shards(write_shards(3, 4, folder="elsewhere/deep")))
    other = build_index(expand_shards(write_shards(4, 3, folder="other")))
    assert here.fingerprint == moved.fingerprint
    assert here.fingerprint != other.fingerprint


def test_equal_shard_names_in_two_folders_stay_apart(write_shards, tmp_path):
    write_shards(2, folder="a")
    write_shards(3, folder="b")
    index = build_index(expand_shards([str(tmp_path / "a" / "*.tar"), str(tmp_path / "b" / "*.tar")]))
    assert index.names == ("a/00000.tar", "b/00000.tar")
    assert len({index.full_key(row) for row in range(5)}) == 5


def test_hashes_and_fingerprint_are_those_of_earlier_versions(write_shards):
    index = build_index(expand_shards(write_shards(3, 4)))
    expected = [
        int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8, person=b"validation").digest(), "little")
        for key in keys(index)
    ]
    assert index.key_hash("validation").tolist() == expected
    sizes = list(index.file_sizes)
    held_out = index.key_hash("validation") < np.uint64(0.4 * 2**64)
    training, validation = index.split(0.4)
    for selected, keep, line in (
        (index, held_out | True, []),
        (index.first(5), np.arange(7) < 5, ["the first 5"]),
        (training, ~held_out, ["all but 0.4 by key"]),
        (validation, held_out, ["0.4 by key"]),
    ):
        counts = [int(keep[:3].sum()), int(keep[3:].sum())]
        identity = json.dumps([["00000.tar", "00001.tar"], sizes, counts, line])
        assert selected.fingerprint == hashlib.sha256(identity.encode()).hexdigest()
        assert selected.sample_id.tolist() == np.flatnonzero(keep).tolist()


def test_a_split_of_nothing_changes_nothing(write_shards):
    index = build_index(expand_shards(write_shards(3, 4)))
    training, validation = index.split(0.0)
    assert training is index
    assert (len(validation), validation.selection) == (0, ("0.0 by key",))


@given(st.lists(st.lists(st.integers(0, 20), max_size=8), max_size=6), st.integers(0, 30))
def test_the_smallest_are_those_of_a_stable_sort(blocks, count):
    blocks = [np.array(block, dtype=np.uint64) for block in blocks]
    (found,) = smallest(blocks, count)
    whole = np.concatenate([np.zeros(0, np.uint64), *blocks])
    assert found.tolist() == np.argsort(whole, kind="stable")[:count].tolist()


def test_ranked_is_the_order_of_the_hashes(write_shards):
    index = build_index(expand_shards(write_shards(3, 4))).split(0.3)[0]
    order = np.argsort(index.key_hash("reference"), kind="stable")
    assert index.ranked("reference").tolist() == order.tolist()
    assert index.ranked("reference", 4).tolist() == order[:4].tolist()


@given(st.integers(1, 50), st.data())
def test_row_numbers_are_an_array(count, data):
    numbers, plain = RowNumbers(count), np.arange(count)
    rows = data.draw(st.lists(st.integers(-count, count - 1)))
    begin, end = data.draw(st.tuples(st.integers(-60, 60), st.integers(-60, 60)))
    mask = np.array(data.draw(st.lists(st.booleans(), min_size=count, max_size=count)))
    assert numbers[rows].tolist() == plain[np.array(rows, dtype=int)].tolist()
    assert numbers[begin:end].tolist() == plain[begin:end].tolist()
    assert numbers[mask].tolist() == plain[mask].tolist()
    assert numbers.tolist() == np.asarray(numbers).tolist() == plain.tolist()
    assert (len(numbers), int(numbers[-1])) == (count, count - 1)
    with pytest.raises(IndexError, match=f"not among {count} rows"):
        numbers[count]


def test_members_above_2_gib_are_damage(tmp_path):
    path = tmp_path / "a.tar"
    write_tar(path, [*sample(0), ("000001.txt", b"x"), ("000001.png", b"x")])
    header = bytearray(path.read_bytes())
    at = header.index(b"000001.png")
    size = 2**31
    header[at + 124 : at + 136] = f"{size:011o}\0".encode()
    header[at + 148 : at + 156] = b" " * 8
    header[at + 148 : at + 156] = f"{sum(header[at : at + 512]):06o}\0 ".encode()
    path.write_bytes(header[: at + 512])
    with open(path, "r+b") as file:
        file.truncate(at + 512 + size + 1024)
    index = build_index([str(path)])
    assert keys(index) == ["000000"]
    assert "000001: the image has 2147483648 bytes" in index.damage[0].reason
