"""Training from real servers on this machine equals training from files."""

import numpy as np
import pytest
from torch.utils.data import DataLoader

from ldm_train.data import (
    ImageOptions,
    ImageTextDataset,
    LocalFiles,
    Quarantine,
    RemoteFiles,
    Routed,
    ShardCache,
    ShuffledOrder,
    TrainingSampler,
    build_index,
    expand_shards,
)
from tests.data.faulty_server import serving

COUNTS = (4, 5, 2)


def as_is(batch):
    return batch


def epoch(locations, storage, workers):
    index = build_index(locations, storage=storage)
    dataset = ImageTextDataset(index, ImageOptions(8, flip=True), 3, Quarantine(None, 0.0, workers))
    sampler = TrainingSampler(ShuffledOrder(index.starts, 3), 2)
    loader = DataLoader(dataset, sampler=sampler, batch_size=None, collate_fn=as_is, num_workers=workers)
    return [
        (key, caption, image.numpy().tobytes())
        for batch in loader
        for key, caption, image in zip(batch["key"], batch["caption"], batch["image"], strict=True)
    ]


def stems(samples):
    return [(key.rpartition("/")[2], *rest) for key, *rest in samples]


def cached(tmp_path, workers, max_bytes=1 << 24, **options):
    return ShardCache(tmp_path / "cache", max_bytes, RemoteFiles(delay=0.01, **options), workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_http_equals_files(write_shards, tmp_path, workers):
    pytest.importorskip("aiohttp")
    here = expand_shards(write_shards(*COUNTS))
    with serving(tmp_path / "shards") as server:
        cache = cached(tmp_path, workers)
        there = expand_shards(server.url + "/{00000..00002}.tar")
        seen = epoch(there, Routed(LocalFiles(), cache), workers)
    assert stems(seen) == stems(epoch(here, LocalFiles(), 0))
    assert len(seen) == 10
    assert cache.counts.misses == 3
    assert cache.counts.hits >= 3  # the workers' too


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:datetime.datetime.utcnow:DeprecationWarning")
def test_s3_equals_files(write_shards, tmp_path, workers, monkeypatch):
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server")
    import s3fs

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    here = expand_shards(write_shards(*COUNTS))
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        options = {"endpoint_url": "http://{}:{}".format(*server.get_host_and_port())}
        store = s3fs.S3FileSystem(**options, skip_instance_cache=True)
        store.mkdir("bucket")
        for path in here:
            store.put_file(path, "bucket/" + path.rpartition("/")[2])
        cache = cached(tmp_path, workers, storage_options={"s3": options})
        there = expand_shards("s3://bucket/*.tar", list_remote=cache.glob)
        assert there == expand_shards("s3://bucket/{00000..00002}.tar")
        seen = epoch(there, Routed(LocalFiles(), cache), workers)
        version = cache.identity(there[0])
        store.pipe_file(there[0], b"other")
        assert np.all(np.array(cache.identity(there[0])) != np.array(version))
    finally:
        server.stop()
    assert stems(seen) == stems(epoch(here, LocalFiles(), 0))
    assert cache.counts.misses == 3
