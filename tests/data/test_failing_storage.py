"""Storage that fails, shrinks or lies: tried again, then fatal, and never a bad sample."""

import os
import threading
import time

import numpy as np
import pytest

from ldm_train.data import (
    BatchRequest,
    ImageOptions,
    ImageTextDataset,
    Quarantine,
    ShardReader,
    ShardReadError,
    build_index,
    expand_shards,
    scan_shard,
)
from tests.data.conftest import sample, write_tar

ROWS = BatchRequest(0, np.arange(4), np.arange(4))


@pytest.fixture
def shard(tmp_path):
    return write_tar(tmp_path / "a.tar", [member for number in range(4) for member in sample(number)])


def dataset_of(path, attempts=5):
    dataset = ImageTextDataset(build_index([str(path)]), ImageOptions(8), 0, Quarantine(None, 0.0, 0))
    dataset.reader = ShardReader((str(path),), attempts=attempts, delay=0.01)
    return dataset


@pytest.mark.parametrize("failures", range(6))
def test_reads_that_fail_for_a_while_cost_time_and_no_sample(shard, monkeypatch, failures):
    real, left, waits = os.pread, [failures], []

    def unreliable(*arguments):
        if left[0]:
            left[0] -= 1
            raise OSError(5, "Input/output error")
        return real(*arguments)

    dataset = dataset_of(shard)
    monkeypatch.setattr(os, "pread", unreliable)
    monkeypatch.setattr(time, "sleep", waits.append)
    if failures < 5:
        assert dataset[ROWS]["sample_id"].tolist() == [0, 1, 2, 3]
    else:
        with pytest.raises(ShardReadError, match=r"5 attempts: .*Input/output.* must stay readable .*`data.shards`"):
            dataset[ROWS]
    assert dataset.quarantine.bad == 0
    assert waits == [0.01 * 2**attempt for attempt in range(min(failures, 4))]


def test_a_shard_cut_and_restored_is_read_on(shard):
    whole = shard.read_bytes()
    dataset = dataset_of(shard, attempts=8)
    os.truncate(shard, 100)
    restore = threading.Timer(0.05, shard.write_bytes, [whole])
    restore.start()
    assert dataset[ROWS]["sample_id"].tolist() == [0, 1, 2, 3]
    restore.join()
    assert dataset.quarantine.bad == 0


def test_a_shard_that_shrank_or_went_after_indexing_is_fatal(shard):
    dataset = dataset_of(shard, attempts=2)
    os.truncate(shard, 2000)
    with pytest.raises(ShardReadError, match=r"shorter than when indexed.*`data.shards`"):
        dataset[ROWS]
    shard.unlink()
    with pytest.raises(ShardReadError, match=r"No such file"):
        dataset[ROWS]
    assert dataset.quarantine.bad == 0


def test_a_shard_replaced_by_another_of_equal_size_is_indexed_anew(shard, tmp_path):
    before = build_index([str(shard)])
    other = write_tar(tmp_path / "b.tar", [member for number in range(5, 9) for member in sample(number)])
    assert other.stat().st_size == shard.stat().st_size
    os.replace(other, shard)
    after = build_index([str(shard)])
    assert [before.key(row) for row in range(4)] != [after.key(row) for row in range(4)]


@pytest.mark.parametrize("size", [(1 << 20) + 1, (1 << 31) + 5, (1 << 32) + 5])
def test_a_caption_of_gigabytes_is_damage_and_is_not_read(tmp_path, size):
    """The data are a hole in the file, so that they cost nothing; a size of 32 bits would take them for 5 bytes."""
    path = write_tar(tmp_path / "a.tar", [*sample(0), *sample(1)[:1], ("000001.txt", b"")])
    place = scan_shard(path)[0][-1].offset - 512
    header = bytearray(path.read_bytes()[place : place + 512])
    header[124:136] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    with path.open("r+b") as file:
        file.truncate(place)
        file.seek(place)
        file.write(header)
        file.truncate(place + 512 + size + -size % 512 + 1024)
    index = build_index([str(path)])
    assert [index.key(row) for row in range(len(index))] == ["000000"]
    assert any(f"000001: the caption (.txt) has {size} bytes" in reason for _, reason in index.damage)


def test_what_is_no_file_is_no_shard(tmp_path):
    os.mkfifo(tmp_path / "pipe.tar")
    (tmp_path / "folder.tar").mkdir()
    os.symlink(tmp_path / "nothing", tmp_path / "link.tar")
    for name in ("pipe.tar", "folder.tar", "link.tar", "*.tar"):
        with pytest.raises(FileNotFoundError, match=r"is a (folder|pipe or .*); allowed are .*`data.shards`"):
            expand_shards(str(tmp_path / name))
