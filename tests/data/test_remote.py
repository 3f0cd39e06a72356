"""Training from real servers on this machine equals training from files."""

import json
import os
import tarfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ldm_train.data import FieldIn, ImageTextDataModule, LocalFiles, RemoteFiles, Routed, ShardCache, build_index
from ldm_train.data.locations import expand_shards
from tests.data.conftest import sample, write_tar
from tests.data.faulty_server import serving

COUNTS = (4, 5, 2)


@pytest.fixture
def here(write_shards):
    """Shards on this disk, the first with what img2dataset writes beside it."""
    paths = expand_shards(write_shards(*COUNTS))
    stem = paths[0].removesuffix(".tar")
    with open(stem + "_stats.json", "w") as file:
        json.dump({"successes": COUNTS[0]}, file)
    with tarfile.open(paths[0]) as tar:
        rows = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
    columns = {"key": [f"{row['number']:06d}" for row in rows], "parity": [row["parity"] for row in rows]}
    pq.write_table(pa.table(columns), stem + ".parquet")
    return paths


@pytest.fixture
def s3(monkeypatch):
    """An empty bucket in an S3 store on this machine: its file system, and what reaches it."""
    moto = pytest.importorskip("moto.server")
    s3fs = pytest.importorskip("s3fs")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    options = {"endpoint_url": "http://{}:{}".format(*server.get_host_and_port())}
    store = s3fs.S3FileSystem(**options, skip_instance_cache=True)
    store.mkdir("bucket")
    yield store, options
    store.rm("bucket", recursive=True)  # stores of one process share their buckets
    server.stop()


def filled(store, paths):
    folder = Path(paths[0]).parent
    for path in folder.iterdir():
        store.put_file(str(path), f"bucket/{path.name}")


def module_of(shards, tmp_path, workers, **options):
    options = {"filters": [FieldIn("parity", [0, 1])], "flip": True, "seed": 3, **options}
    return ImageTextDataModule(shards, 8, 2, num_workers=workers, cache_dir=str(tmp_path / "cache"), **options)


def epoch(module):
    """What one epoch of training and the validation show, sample by sample."""
    module.setup("fit")
    loaders = [module.train_dataloader(), module.val_dataloader()]
    return [
        (key.rpartition("/")[2], identifier, caption, image.numpy().tobytes())
        for loader in loaders
        for batch in loader
        for key, identifier, caption, image in zip(
            batch["key"], batch["sample_id"].tolist(), batch["caption"], batch["image"], strict=True
        )
    ]


def cache_in(tmp_path, **options):
    return ShardCache(tmp_path / "cache", 1 << 24, RemoteFiles(delay=0.01, **options))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_a_run_on_s3_sees_what_a_run_on_files_sees(here, s3, tmp_path, workers):
    store, options = s3
    filled(store, here)
    shared = {"storage_options": {"s3": options}, "val_fraction": 0.3}
    local = epoch(module_of(list(here), tmp_path, 0, val_fraction=0.3))
    for shards in ("s3://bucket/*.tar", "s3://bucket/{00000..00002}.tar"):
        module = module_of(shards, tmp_path, workers, **shared)
        assert epoch(module) == local
        assert module.shard_cache.counts.hits >= 3  # the workers' too
    assert len({identifier for _, identifier, _, _ in local}) == len(local) >= 8
    assert module.shard_cache.counts.bytes_downloaded == 0  # the second run found the copies of the first


@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_s3_tells_versions_apart_and_says_what_is_missing(here, s3, tmp_path):
    store, options = s3
    filled(store, here)
    cache = cache_in(tmp_path, storage_options={"s3": options})
    before = cache.identity("s3://bucket/00000.tar")
    assert before.size == os.path.getsize(here[0])
    store.pipe_file("bucket/00000.tar", b"other")
    assert np.all(np.array(cache.identity("s3://bucket/00000.tar")) != np.array(before))
    for url in ("s3://bucket/9.tar", "s3://elsewhere/0.tar"):
        with pytest.raises(RuntimeError, match=rf"{url} could not be read: .*must exist.*`data.shards`"):
            cache.open(url)
    with pytest.raises(FileNotFoundError, match=r"no shard matches 's3://bucket/x\*'"):
        expand_shards("s3://bucket/x*", list_remote=cache.glob)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_run_on_http_sees_what_a_run_on_files_sees(here, tmp_path, workers):
    pytest.importorskip("aiohttp")
    with serving(tmp_path / "shards") as server:
        server.faults = [503, "drop"]
        module = module_of(server.url + "/{00000..00002}.tar?signature=S", tmp_path, workers, val_fraction=0.3)
        seen = epoch(module)
    assert seen == epoch(module_of(list(here), tmp_path, 0, val_fraction=0.3))
    downloads = Counter({name: count for (method, name), count in server.requests.items() if method == "GET"})
    assert sum(downloads[f"{shard:05d}.tar"] for shard in range(3)) == 3 + 2
    # What img2dataset writes beside a shard is asked for once by each reader, and no further where it is missing.
    assert downloads["00000.parquet"] == downloads["00000_stats.json"] == 1
    assert module.train_index.names == ("00000.tar", "00001.tar", "00002.tar")
    size = sum(path.stat().st_size for path in (tmp_path / "shards").iterdir())
    assert module.shard_cache.counts[1:] == (5, size, 0)


def test_what_is_missing_beside_a_shard_costs_no_waiting(tmp_path, monkeypatch):
    pytest.importorskip("aiohttp")
    write_tar(tmp_path / "shards" / "0.tar", sample(0))
    clock = SimpleNamespace(sleep=lambda seconds: pytest.fail(f"slept {seconds} s"))
    monkeypatch.setattr("ldm_train.data.remote.time", clock)
    with serving(tmp_path / "shards") as server:
        index = build_index([server.url + "/0.tar"], storage=cache_in(tmp_path)).filtered([FieldIn("parity", [0])])
    assert len(index) == 1
    assert server.requests["GET", "0.tar"] == 1
    assert max(server.requests.values()) <= 3


def test_a_process_pool_indexes_through_one_cache(here, tmp_path):
    pytest.importorskip("aiohttp")
    with serving(tmp_path / "shards") as server:
        urls = expand_shards(server.url + "/{00000..00002}.tar")
        cache = cache_in(tmp_path)
        options = {"directory": tmp_path / "index", "storage": Routed(LocalFiles(), cache), "dimensions": True}
        index = build_index(urls, workers=2, **options)
        kept = index.filtered([FieldIn("parity", [1])], workers=2)
        downloads = sum(server.requests["GET", f"{shard:05d}.tar"] for shard in range(3))
        again = build_index(urls, **options)
    assert downloads == 3
    assert cache.counts.misses == 5  # three shards, one stats file, one parquet: counted in the processes of the pool
    local = build_index(here, dimensions=True)
    rows = np.arange(len(local))
    for one in (index, again):
        assert [one.full_key(row) for row in rows] == [local.full_key(row) for row in rows]
        assert one.fingerprint == local.fingerprint
        assert all(np.array_equal(*pair) for pair in zip(one.places(rows), local.places(rows), strict=True))
        assert np.array_equal(one.dimensions(rows), local.dimensions(rows))
    assert kept.fingerprint == local.filtered([FieldIn("parity", [1])]).fingerprint
    assert kept.refused == local.filtered([FieldIn("parity", [1])]).refused
    assert server.requests["GET", "00001.tar"] == 1  # the index that was kept needs no shard
