"""`ShardWriter`: img2dataset's layout, whatever the metadata."""

import hashlib
import json
import tarfile

import pyarrow.parquet as pq
import pytest
import webdataset

from ldm_train.data.writing import ShardSample, ShardWriter


def write(folder, samples, per_shard=10_000):
    folder.mkdir(exist_ok=True)
    with ShardWriter(folder, per_shard) as writer:
        return [writer.write(sample) for sample in samples]


@pytest.mark.parametrize("count", [0, 1, 3, 4, 7])
def test_shards_are_full_but_the_last_and_keys_count_up(tmp_path, count):
    keys = write(tmp_path, [ShardSample(bytes([i]), "png", str(i)) for i in range(count)], 3)
    assert keys == [f"{i // 3:05d}{i % 3:04d}" for i in range(count)]
    tars = sorted(path.name for path in tmp_path.glob("*.tar"))
    assert tars == [f"{i:05d}.tar" for i in range(-(-count // 3))]
    if count:
        paths = [str(tmp_path / name) for name in tars]
        read = [(s["__key__"], s["png"], s["txt"]) for s in webdataset.WebDataset(paths, shardshuffle=False)]
        assert read == [(key, bytes([i]), str(i).encode()) for i, key in enumerate(keys)]
    counts = [json.loads((tmp_path / f"{name[:5]}_stats.json").read_text())["successes"] for name in tars]
    assert sum(counts) == count
    assert all(number == 3 for number in counts[:-1])


def test_parquet_takes_metadata_of_any_shape(tmp_path):
    odd = [1, "one", {}, [1, "a"], None, 2**80, True]
    write(tmp_path, [ShardSample(b"", "png", "", {"odd": value, "nest": {"a": [value]}}) for value in odd])
    table = pq.read_table(tmp_path / "00000.parquet").to_pydict()
    assert [None if text is None else json.loads(text) for text in table["nest"]] == [{"a": [value]} for value in odd]
    # Values that share no type are json, and what is an object or a list is json in any case.
    expected = [json.dumps(value) if isinstance(value, dict | list) else value for value in odd]
    assert [None if text is None else json.loads(text) for text in table["odd"]] == expected


def test_metadata_cannot_take_the_place_of_key_caption_and_status(tmp_path):
    write(tmp_path, [ShardSample(b"", "png", "true", {"key": "x", "caption": "y", "status": "z", "own": 1})])
    row = pq.read_table(tmp_path / "00000.parquet").to_pylist()[0]
    assert row == {"key": "000000000", "caption": "true", "status": "success", "own": 1}


def test_tars_depend_on_the_samples_alone(tmp_path):
    digests = set()
    for name in "ab":
        write(tmp_path / name, [ShardSample(b"image", "jpg", "ä", {"n": 1})])
        digests.add(hashlib.sha256((tmp_path / name / "00000.tar").read_bytes()).digest())
        with tarfile.open(tmp_path / name / "00000.tar") as tar:
            assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o444)}
    assert len(digests) == 1


@pytest.mark.parametrize("per_shard", [0, -1, 10_001])
def test_keys_have_four_digits_for_the_sample(tmp_path, per_shard):
    with pytest.raises(ValueError, match=rf"{per_shard}; allowed: 1 to 10000; change --samples-per-shard"):
        ShardWriter(tmp_path, per_shard)
