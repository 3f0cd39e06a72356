"""What a run holds does not grow with its epochs: open files, and memory.

Counted is what the package's own lines hold: whatever else runs in this process, such as a measurement of coverage,
has memory of its own.
"""

import os
import tracemalloc

import pytest

from ldm_train.data import ImageTextDataModule
from tests.data.faulty_server import serving

SHARDS = 6


def held_by_the_package():
    own = tracemalloc.take_snapshot().filter_traces([tracemalloc.Filter(True, "*/ldm_train/*")])
    return sum(trace.size for trace in own.traces)


def open_files(process):
    return len(os.listdir(f"/proc/{process}/fd"))


@pytest.mark.parametrize("workers", [0, 2])
def test_many_epochs_through_a_cache_that_is_too_small_hold_no_more_than_a_few(write_shards, tmp_path, workers):
    pytest.importorskip("aiohttp")
    write_shards(*[3] * SHARDS)
    bytes_of_one = (tmp_path / "shards" / "00000.tar").stat().st_size
    with serving(tmp_path / "shards") as server:
        module = ImageTextDataModule(
            server.url + "/{00000..00005}.tar",
            8,
            2,
            seed=3,
            num_workers=workers,
            cache_dir=str(tmp_path / "cache"),
            cache_bytes=3 * bytes_of_one,
        )
        module.setup("fit")
        loader = module.train_dataloader()
        loader.dataset.reader.max_open = 2  # so that files are closed, and fetched again
        held, sizes = [], []
        tracemalloc.start()
        for epoch in range(20):
            loader.sampler.position = loader.sampler.position._replace(epoch=epoch, samples=0)
            batches = iter(loader)
            assert sum(len(batch["key"]) for batch in batches) == 3 * SHARDS
            processes = [os.getpid(), *(worker.pid for worker in getattr(batches, "_workers", []))]
            held.append([open_files(process) for process in processes])
            sizes.append(held_by_the_package())
        tracemalloc.stop()
    assert module.shard_cache.counts.evictions > 20
    assert max(map(max, held[8:])) <= max(map(max, held[:8])) + 2
    assert max(sizes[-5:]) - max(sizes[4:8]) < 1 << 14  # the samples of twelve epochs are three times as much
    copies = [path for path in (tmp_path / "cache").iterdir() if path.suffix in (".tar", ".part")]
    assert sum(path.stat().st_size for path in copies) <= 3 * bytes_of_one
    assert len(list((tmp_path / "cache").iterdir())) <= 3 * 2 * (SHARDS + 2)
