"""Folders that this user may only read, and disks that are full: used as far as they go, or said in three parts."""

import errno
import os
import shutil
import tempfile
import warnings
from contextlib import contextmanager
from pathlib import Path

import pytest

from ldm_train.data import FieldIn, RemoteFiles, ShardCache, ShardReadError, build_index, expand_shards, index_store
from ldm_train.data.columns import ArrayWriter
from ldm_train.data.index_store import UnwritableError
from tests.data.conftest import sample, write_tar
from tests.data.test_index_store import everything

NOBODY = 65534


@contextmanager
def powerless():
    """Root may write everywhere: inside, it is nobody."""
    is_root = os.getuid() == 0
    if is_root:
        os.setresuid(NOBODY, NOBODY, 0)
    try:
        yield
    finally:
        if is_root:
            os.setresuid(0, 0, 0)


@pytest.fixture
def shared():
    """A folder that everyone can enter, unlike the temporary ones of pytest; its shards."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    for number in range(3):
        members = [member for key in range(5 * number, 5 * number + 5) for member in sample(key)]
        write_tar(folder / "shards" / f"{number}.tar", members)
    yield folder
    close(folder, 0o755)
    shutil.rmtree(folder)


def close(folder, mode=0o555):
    for path in [folder, *(path for path in folder.rglob("*") if path.is_dir())]:
        path.chmod(mode)


def chosen(index, fraction=0.4):
    """What is kept of an index in several steps."""
    training, validation = index.filtered([FieldIn("parity", [1])]).split(fraction)
    return everything(training), everything(validation), training.ranked("reference", 3).tolist()


def test_a_valid_index_that_may_only_be_read_is_used_without_a_write(shared, monkeypatch):
    paths, directory = expand_shards(str(shared / "shards/*.tar")), shared / "index"
    wanted, other = chosen(build_index(paths)), chosen(build_index(paths), 0.2)
    chosen(build_index(paths, directory=directory))
    close(directory)
    before = sorted((str(path), path.stat().st_mtime_ns) for path in directory.rglob("*"))
    monkeypatch.setattr(index_store, "scan", None)  # nothing is scanned again
    with powerless(), warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not os.access(directory, os.W_OK)
        index = build_index(paths, directory=directory)
        assert index.columns.folder is not None
        assert chosen(index) == wanted
        assert chosen(index, 0.2) == other  # a selection that nobody kept
    assert sorted((str(path), path.stat().st_mtime_ns) for path in directory.rglob("*")) == before


def test_a_stale_index_that_may_only_be_read_is_made_in_memory_and_said(shared):
    paths, directory = expand_shards(str(shared / "shards/*.tar")), shared / "index"
    build_index(paths, directory=directory)
    close(directory)
    write_tar(shared / "shards" / "1.tar", [*sample(50), *sample(51)])
    with powerless(), pytest.warns(UserWarning, match=r"cannot be kept in .*built in memory.*`data.index_dir`"):
        index = build_index(paths, directory=directory)
    assert chosen(index) == chosen(build_index(paths))


def test_selections_are_made_in_memory_where_only_the_attempt_tells_that_nothing_can_be_written(shared, monkeypatch):
    paths, directory = expand_shards(str(shared / "shards/*.tar")), shared / "index"
    build_index(paths, directory=directory)
    close(directory)
    monkeypatch.setattr(os, "access", lambda *_: True)  # as some file servers answer
    with powerless(), pytest.warns(UserWarning, match=r"selections cannot be kept in .*`data.index_dir`"):
        assert chosen(build_index(paths, directory=directory)) == chosen(build_index(paths))


def full_after(monkeypatch, blocks):
    """The disk is full after some blocks of an array."""
    real, left = ArrayWriter.append, [blocks]

    def append(self, block):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, block)

    monkeypatch.setattr(ArrayWriter, "append", append)


@pytest.mark.parametrize("blocks", [0, 6])
def test_an_index_that_does_not_fit_on_the_disk_is_built_in_memory(shared, monkeypatch, blocks):
    paths, directory = expand_shards(str(shared / "shards/*.tar")), shared / "index"
    plain = everything(build_index(paths))
    full_after(monkeypatch, blocks)
    with pytest.warns(UserWarning, match=r"No space left.*built in memory.*`data.index_dir`"):
        assert everything(build_index(paths, directory=directory)) == plain
    assert not list(directory.rglob("building-*"))


def test_a_selection_that_does_not_fit_on_the_disk_says_what_to_change(shared, monkeypatch):
    index = build_index(expand_shards(str(shared / "shards/*.tar")), directory=shared / "index")
    full_after(monkeypatch, 1)
    with pytest.raises(UnwritableError, match=r"took no selection: No space left.*Allowed are.*`data.index_dir`"):
        index.split(0.5)
    assert not list((shared / "index").rglob("building-*"))


@pytest.mark.parametrize("there", [False, True])
def test_a_cache_that_cannot_be_written_says_what_to_change(shared, there):
    folder = shared / "cache"
    if there:
        folder.mkdir()
    close(shared)
    cache = ShardCache(folder, 1 << 20, RemoteFiles())
    with powerless(), pytest.raises(ShardReadError, match=r"cannot be written. Allowed is .*`data.cache_dir`"):
        cache.open("http://127.0.0.1:1/a.tar")


def test_a_shard_that_may_not_be_read_says_what_to_change(shared):
    paths = expand_shards(str(shared / "shards/*.tar"))
    os.chmod(paths[1], 0)
    with powerless(), pytest.raises(ShardReadError, match=r"1.tar could not be read: Permission denied.*`data.shards`"):
        build_index(paths)
