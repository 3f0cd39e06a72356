import json

import pytest

from ldm_train.data import build_index, expand_shards
from ldm_train.data.index import CAPTION, IMAGE, METADATA
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
    keep = index.sample_id % 2 == 1
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
