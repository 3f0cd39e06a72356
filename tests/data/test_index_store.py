"""Indices on disk: the same as in memory, brought up to date shard by shard, complete whatever happens."""

import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest

from ldm_train.data import FieldIn, build_index, expand_shards, index_store
from ldm_train.data.columns import ArrayWriter, ColumnsWriter, gathered, open_array
from ldm_train.data.index import IMAGE, METADATA
from ldm_train.data.index_store import Table, open_index, relative_names
from ldm_train.data.judging import Judge
from ldm_train.data.scanning import Contents
from ldm_train.data.shards import ShardReader
from tests.data.conftest import encode, sample, write_tar


@pytest.fixture
def scanned(monkeypatch):
    """The shards scanned so far by this process."""
    names, real = [], index_store.scan

    def counted(location, contents, storage):
        names.append(os.path.basename(location))
        return real(location, contents, storage)

    monkeypatch.setattr(index_store, "scan", counted)
    return names


def everything(index):
    """All that an index says."""
    rows = np.arange(len(index))
    return (
        [index.full_key(row) for row in rows.tolist()],
        *(part.tolist() for part in index.places(rows)),
        np.asarray(index.sample_id).tolist(),
        index.starts.tolist(),
        index.damage,
        index.refused,
        index.fingerprint,
        index.key_hash("validation").tolist(),
    )


def test_on_disk_equals_in_memory(write_shards, tmp_path):
    paths = expand_shards(write_shards(3, 0, 5, 1))
    write_tar(tmp_path / "shards" / "00001.tar", [*sample(90)[:2]])
    plain = build_index(paths)
    for workers in (0, 2):
        kept = build_index(paths, directory=tmp_path / f"index{workers}", workers=workers)
        assert isinstance(kept.columns.offsets.base, np.memmap)
        assert everything(kept) == everything(plain)


def test_an_index_without_samples_can_be_kept(write_shards, tmp_path):
    for _ in range(2):
        index = build_index(expand_shards(write_shards(0, 0)), directory=tmp_path / "index")
        assert (len(index), index.starts.tolist()) == (0, [0, 0, 0])
        assert len(index.split(0.5)[1]) == 0


def test_only_new_and_changed_shards_are_scanned(write_shards, tmp_path, scanned):
    pattern, directory = write_shards(3, 4, 2), tmp_path / "index"
    build_index(expand_shards(pattern), directory=directory)
    assert scanned == ["00000.tar", "00001.tar", "00002.tar"]
    build_index(expand_shards(pattern), directory=directory)
    assert len(scanned) == 3
    write_tar(tmp_path / "shards" / "00001.tar", [*sample(50), *sample(51)[:2]])
    write_tar(tmp_path / "shards" / "00003.tar", sample(60))
    del scanned[:]
    index = build_index(expand_shards(pattern), directory=directory)
    assert scanned == ["00001.tar", "00003.tar"]
    assert everything(index) == everything(build_index(expand_shards(pattern)))
    os.utime(tmp_path / "shards" / "00002.tar", ns=(1, 1))
    del scanned[:]
    build_index(expand_shards(pattern), directory=directory)
    assert scanned == ["00002.tar"]


def test_other_requirements_have_an_index_of_their_own(write_shards, tmp_path, scanned):
    paths = expand_shards(write_shards(2))
    for _ in range(2):
        build_index(paths, directory=tmp_path / "index")
        build_index(paths, (IMAGE, METADATA), directory=tmp_path / "index")
        build_index(paths, directory=tmp_path / "index", dimensions=True)
    assert len(scanned) == 3


@pytest.mark.parametrize("harm", ["cut column", "no column", "head", "table", "format", "cut head", "wrong kind"])
def test_a_damaged_index_is_built_anew_and_said(write_shards, tmp_path, scanned, harm):
    paths, directory = expand_shards(write_shards(3, 2)), tmp_path / "index"
    whole = everything(index := build_index(paths, directory=directory))
    columns, head = index.columns.folder, index.columns.folder.parent / "index.json"
    if harm == "cut column":
        with open(columns / "offsets.npy", "r+b") as file:
            file.truncate(200)
    elif harm == "no column":
        (columns / "sizes.npy").unlink()
    elif harm == "head":
        head.write_text("[]")
    elif harm == "cut head":
        head.write_text('{"format": 1, ')
    elif harm == "table":
        table = (columns / "table.json").read_text()
        (columns / "table.json").write_text(table.replace('"rows": [3,', '"rows": [4,'))
    elif harm == "format":
        head.write_text(json.dumps(json.loads(head.read_text()) | {"format": 0}))
    else:
        np.save(columns / "sizes.npy", np.zeros((5, 3), np.int64))
    del scanned[:]
    if harm == "no column":
        again = build_index(paths, directory=directory)
    else:
        with pytest.warns(UserWarning, match="built anew"):
            again = build_index(paths, directory=directory)
    assert scanned == ["00000.tar", "00001.tar"]
    assert everything(again) == whole
    assert everything(build_index(paths, directory=directory)) == whole


@pytest.mark.parametrize(("step", "call"), [("scan", 1), ("_write", 1), ("_write", 2), ("open_columns", 4)])
def test_an_interrupted_build_leaves_the_old_index_or_the_new(write_shards, tmp_path, monkeypatch, step, call):
    pattern, directory = write_shards(3), tmp_path / "index"
    build_index(expand_shards(pattern), directory=directory)
    (folder,) = {head.parent for head in directory.glob("*/index.json")}
    before = open_index(folder)[0].rows
    write_tar(tmp_path / "shards" / "00000.tar", [*sample(50), *sample(51)])

    with monkeypatch.context() as patch:
        calls, real = [], getattr(index_store, step)

        def interrupted(*arguments, **options):
            calls.append(arguments)
            if len(calls) == call:
                raise KeyboardInterrupt
            return real(*arguments, **options)

        patch.setattr(index_store, step, interrupted)
        with pytest.raises(KeyboardInterrupt):
            build_index(expand_shards(pattern), directory=directory)
    assert open_index(folder)[0].rows in (before, [2])
    assert len(build_index(expand_shards(pattern), directory=directory)) == 2
    assert len(list(folder.glob("columns-*"))) == 1
    assert not list(folder.glob("building-*"))


def test_one_process_builds_and_the_others_open_its_index(write_shards, tmp_path, scanned):
    paths = expand_shards(write_shards(3, 2))
    started = threading.Barrier(4)
    prints = []

    def build():
        started.wait()
        prints.append(build_index(paths, directory=tmp_path / "index").fingerprint)

    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(prints) == 4
    assert len(set(prints)) == 1
    assert len(scanned) == 2


def test_where_nothing_can_be_written_the_index_is_in_memory(write_shards, tmp_path):
    paths = expand_shards(write_shards(3))
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"built in memory.*`data.index_dir`"):
        index = build_index(paths, directory=tmp_path / "file")
    assert everything(index) == everything(build_index(paths))


def test_selections_are_computed_once(write_shards, tmp_path, monkeypatch):
    paths, directory = expand_shards(write_shards(40, 30)), tmp_path / "index"

    def chosen(index):
        index = index.filtered([FieldIn("parity", [1])]).first(33)
        return [*index.split(0.3), index.first(5), index.ranked("reference", 7)]

    plain = chosen(build_index(paths))
    first = chosen(build_index(paths, directory=directory))
    monkeypatch.setattr(hashlib, "blake2b", None)
    monkeypatch.setattr(Judge, "__call__", None)
    again = chosen(build_index(paths, directory=directory))
    for wanted, *others in zip(plain, first, again, strict=True):
        for other in others:
            if isinstance(wanted, np.ndarray):
                assert wanted.tolist() == other.tolist()
            else:
                assert wanted.sample_id.tolist() == other.sample_id.tolist()
                assert wanted.starts.tolist() == other.starts.tolist()
                assert (wanted.refused, wanted.fingerprint) == (other.refused, other.fingerprint)


def test_a_damaged_selection_is_computed_again(write_shards, tmp_path):
    paths, directory = expand_shards(write_shards(20)), tmp_path / "index"
    held_out = build_index(paths, directory=directory).split(0.5)[1]
    wanted = held_out.sample_id.tolist()
    with open(held_out.rows_file, "r+b") as file:
        file.truncate(130)
    assert build_index(paths, directory=directory).split(0.5)[1].sample_id.tolist() == wanted


def _read_back(index):
    reader = ShardReader(index.paths)
    return [index.read(reader, row, IMAGE) for row in range(len(index))]


def test_copies_open_the_same_files(write_shards, tmp_path):
    index = build_index(expand_shards(write_shards(30, 10)), directory=tmp_path / "index").split(0.4)[1]
    copied = pickle.dumps(index)
    assert _read_back(pickle.loads(copied)) == _read_back(index)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        assert pool.apply(_read_back, [index]) == _read_back(index)
    shutil.rmtree(tmp_path / "index")
    with pytest.raises(FileNotFoundError, match=r"is gone.*`data.index_dir`"):
        pickle.loads(copied)


def write_columns(folder, shards, rows):
    """A sparse index directory of `shards` times `rows` samples, all columns zeros but the ends of the keys."""
    columns = folder / "columns-x"
    columns.mkdir(parents=True)
    count = shards * rows
    for name, kind, *width in (("offsets", np.int64, 3), ("sizes", np.int32, 3), ("key_ends", np.int64)):
        np.lib.format.open_memmap(columns / f"{name}.npy", "w+", kind, (count, *width))
    ArrayWriter(columns / "key_bytes.npy", np.uint8).close()
    locations = [f"/data/{shard:05d}.tar" for shard in range(shards)]
    table = Table(Contents(), locations, [1] * shards, ["1"] * shards, [rows] * shards, [None] * shards)
    index_store._write_table(folder, columns, table)
    return folder


def test_a_million_samples_are_pickled_in_little(tmp_path):
    table, columns = open_index(write_columns(tmp_path / "index", 100, 10_000))
    assert len(columns) == 10**6
    assert len(pickle.dumps(columns)) < 1000
    assert len(pickle.dumps(table)) < 20_000


def test_columns_written_in_blocks_are_the_columns(write_shards, tmp_path):
    columns = build_index(expand_shards(write_shards(7)), dimensions=True).columns
    with ColumnsWriter(tmp_path, 3, True) as writer:
        for begin, end in ((0, 0), (0, 3), (3, 4), (4, 7)):
            writer.append(columns.part(begin, end))
    for name in ("offsets", "sizes", "key_ends", "key_bytes", "dimensions"):
        assert open_array(tmp_path / f"{name}.npy").tolist() == getattr(columns, name).tolist()


def test_rows_gathered_from_a_mapped_column_are_its_rows(tmp_path):
    """Of 24 bytes a row, so that some lie across the pages of 4096."""
    column = np.random.default_rng(0).integers(1 << 60, size=(1000, 3))
    np.save(tmp_path / "column.npy", column)
    mapped = open_array(tmp_path / "column.npy")
    for rows in (np.arange(1000), np.array([999, 0, 165, 165]), np.zeros(0, np.int64)):
        assert gathered(mapped, rows).tolist() == gathered(column, rows).tolist() == column[rows].tolist()


def test_urls_are_named_from_where_they_part():
    assert relative_names(["s3://b/x/0.tar", "s3://b/y/0.tar"]) == ("x/0.tar", "y/0.tar")
    assert relative_names(["s3://b/x/0.tar", "s3://b/x/1.tar"]) == ("0.tar", "1.tar")


def test_dimensions_are_those_of_the_decoded_image(tmp_path):
    from PIL import Image

    upright, lying = Image.new("RGB", (30, 20)), Image.Exif()
    lying[0x0112] = 6
    images = [
        ("0.jpg", encode(upright, "JPEG")),
        ("1.jpg", encode(upright, "JPEG", exif=lying)),
        ("2.png", encode(upright)),
        ("3.webp", encode(upright, "WEBP", exif=lying)),
        ("4.png", b"nothing"),
    ]
    members = [member for name, data in images for member in ((name, data), (f"{name[0]}.txt", b"text"))]
    path = write_tar(tmp_path / "a.tar", members)
    for directory in (None, tmp_path / "index"):
        index = build_index([str(path)], directory=directory, dimensions=True)
        assert index.dimensions(np.arange(5)).tolist() == [[30, 20], [20, 30], [30, 20], [20, 30], [-1, -1]]
    with pytest.raises(ValueError, match="--dimensions"):
        build_index([str(path)]).dimensions(np.arange(5))


JUMP = """
import json, sys, time
import numpy as np
from pathlib import Path
from ldm_train.data.index import ShardIndex
from ldm_train.data.index_store import open_index
from ldm_train.data.order import ShuffledOrder

def memory(field):
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(field)) / 2**20

imported, begin = memory("VmRSS"), time.process_time()
table, columns = open_index(Path(sys.argv[1]))
index = ShardIndex(tuple(table.locations), tuple(table.locations), tuple(table.sizes), table.starts, columns)
order = ShuffledOrder(index.starts, 0)
opened = time.process_time() - begin
draw, jumps, clock = np.random.default_rng(0), [], []
for epoch in range(20):
    positions = int(draw.integers(len(index) - 64)) + np.arange(64)
    begin, wall = time.process_time(), time.perf_counter()
    index.places(order.rows(epoch, positions))
    jumps.append(time.process_time() - begin)
    clock.append(time.perf_counter() - wall)
print(json.dumps({
    "open": opened, "jump": np.median(jumps), "clock": np.median(clock), "samples": len(index),
    "GiB": memory("VmHWM"), "imports": imported,
}))
"""


@pytest.mark.slow
def test_a_hundred_million_samples_open_and_jump_in_little_memory(tmp_path):
    folder = write_columns(tmp_path / "index", 10_000, 10_000)
    command = [sys.executable, "-c", JUMP, str(folder)]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    print(found)
    assert found["samples"] == 10**8
    assert found["GiB"] < 1.0
    # Time of this process alone, for others may keep the machine busy. A jump enters another epoch at any position and
    # finds where the members of 64 samples lie: it draws 64 windows of 8192 samples and reads 128 pages.
    assert found["open"] < 0.05
    assert found["jump"] < 0.01
