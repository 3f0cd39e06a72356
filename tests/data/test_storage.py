import os

import pytest

from ldm_train.data import LocalFiles, RemoteFiles, Routed, ShardReadError
from ldm_train.data.storage import Identity


class Named:
    def open(self, location):
        return os.open(os.devnull, os.O_RDONLY)

    def identity(self, location):
        return Identity(1, location)


def test_paths_and_urls_go_their_ways(tmp_path):
    path = tmp_path / "a.tar"
    path.write_bytes(b"12345")
    routed = Routed(LocalFiles(), Named())
    before = routed.identity(str(path))
    assert before == (5, str(path.stat().st_mtime_ns))
    assert routed.identity("s3://b/a.tar") == (1, "s3://b/a.tar")
    os.utime(path, ns=(0, 0))
    assert routed.identity(str(path)) != before


def test_protocols_outside_the_list_and_missing_packages_are_named(monkeypatch):
    with pytest.raises(ValueError, match="unknown; allowed are paths and s3"):
        RemoteFiles().identity("file:///etc/passwd")
    monkeypatch.setattr("fsspec.filesystem", lambda *_, **__: __import__("no_such_package"))
    with pytest.raises(ShardReadError, match="pip install s3fs"):
        RemoteFiles().identity("s3://b/a.tar")
