import errno
import multiprocessing
import os
import pickle
import shutil
import signal
import threading

import pytest

from ldm_train.data import RemoteFiles, ShardCache, ShardReadError
from tests.data.faulty_server import serving

pytest.importorskip("aiohttp")
CONTENT = {f"{n}.tar": bytes([65 + n]) * (1000 + n) for n in range(6)}


@pytest.fixture
def server(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        for name, data in CONTENT.items():
            (tmp_path / folder / name).write_bytes(data + folder.encode())
    with serving(tmp_path) as faulty:
        yield faulty


def cache_in(tmp_path, max_bytes=1 << 20, **options):
    return ShardCache(tmp_path / "cache", max_bytes, RemoteFiles(**{"delay": 0.01, "timeout": 1.0, **options}))


def content(cache, url):
    fd = cache.open(url)
    try:
        return os.pread(fd, 1 << 20, 0)
    finally:
        os.close(fd)


def files(tmp_path, *suffixes):
    return [path for path in (tmp_path / "cache").iterdir() if path.suffix in suffixes]


def test_bytes_are_the_files_and_equal_names_do_not_collide(server, tmp_path):
    cache = cache_in(tmp_path)
    urls = [f"{server.url}/{folder}/{name}" for folder in "ab" for name in CONTENT]
    for _ in range(2):
        for url in urls:
            assert content(cache, url) == CONTENT[url.rpartition("/")[2]] + url.split("/")[3].encode()
    assert all(server.requests["GET", url.partition(server.url)[2][1:]] == 1 for url in urls)
    size = sum(len(data) + 1 for data in CONTENT.values()) * 2
    assert cache.counts == (len(urls), len(urls), size, 0)
    assert content(pickle.loads(pickle.dumps(cache)), urls[0]) == CONTENT["0.tar"] + b"a"


@pytest.mark.parametrize("faults", [["drop"], [503, 503], ["long"], ["stall"], [429, "drop", 500]])
def test_transient_failures_are_tried_again(server, tmp_path, faults):
    server.faults = [*faults]
    assert content(cache_in(tmp_path), f"{server.url}/a/1.tar") == CONTENT["1.tar"] + b"a"
    assert server.requests["GET", "a/1.tar"] == len(faults) + 1
    assert not files(tmp_path, ".part")


def test_lasting_failures_end_with_a_clear_error_and_nothing_cached(server, tmp_path):
    server.faults = ["drop"] * 3
    with pytest.raises(ShardReadError, match=r"could not be read in 3 attempts: .*`data.shards`"):
        cache_in(tmp_path, attempts=3).open(f"{server.url}/a/1.tar")
    assert not files(tmp_path, ".part", ".tar")


@pytest.mark.parametrize("status", [403, 404, 410])
def test_final_failures_are_not_tried_again_and_keep_secrets(server, tmp_path, status):
    server.faults = [status]
    with pytest.raises(ShardReadError, match=r"must exist and be readable.*`data.storage_options`") as failure:
        cache_in(tmp_path).open(f"{server.url}/a/1.tar?signature=SECRET")
    assert server.requests["GET", "a/1.tar"] == 1
    assert "SECRET" not in str(failure.value)
    assert failure.value.__suppress_context__


def _ask(cache, url, barrier, answers):
    barrier.wait()
    answers.put(content(cache, url))


def test_many_processes_download_a_shard_once(server, tmp_path):
    server.delay = 0.3
    context = multiprocessing.get_context("fork")
    barrier, answers = context.Barrier(5), context.Queue()
    cache, url = cache_in(tmp_path), f"{server.url}/a/3.tar"
    asking = [context.Process(target=_ask, args=(cache, url, barrier, answers)) for _ in range(5)]
    for process in asking:
        process.start()
    assert {answers.get(timeout=60) for _ in asking} == {CONTENT["3.tar"] + b"a"}
    for process in asking:
        process.join(60)
    assert server.requests["GET", "a/3.tar"] == 1


def test_the_directory_stays_under_its_bound_and_open_files_stay_readable(server, tmp_path):
    cache = cache_in(tmp_path, max_bytes=2100)
    held = cache.open(f"{server.url}/a/0.tar")
    for name in ("1.tar", "2.tar", "3.tar"):
        content(cache, f"{server.url}/a/{name}")
        assert sum(path.stat().st_size for path in files(tmp_path, ".tar", ".part")) <= 2100
    assert server.requests["GET", "a/0.tar"] == 1
    assert content(cache, f"{server.url}/a/0.tar") == CONTENT["0.tar"] + b"a"  # what is open goes last
    assert server.requests["GET", "a/0.tar"] == 1
    other = cache.open(f"{server.url}/a/4.tar")
    with pytest.warns(UserWarning, match=r"smaller than the shards.*`data.cache_bytes`"):
        content(cache, f"{server.url}/a/5.tar")
    assert os.pread(held, 2000, 0) == CONTENT["0.tar"] + b"a"
    assert content(cache, f"{server.url}/a/0.tar") == CONTENT["0.tar"] + b"a"
    os.close(held)
    os.close(other)


def test_the_longest_unopened_goes_first(server, tmp_path):
    cache = cache_in(tmp_path, max_bytes=3100)
    for name in ("0.tar", "1.tar", "0.tar", "2.tar", "3.tar", "0.tar"):
        content(cache, f"{server.url}/a/{name}")
    assert server.requests["GET", "a/0.tar"] == 1
    content(cache, f"{server.url}/a/1.tar")
    assert server.requests["GET", "a/1.tar"] == 2


def test_a_killed_download_leaves_nothing_that_is_taken_for_a_shard(server, tmp_path):
    server.delay = 30
    cache, url = cache_in(tmp_path, max_bytes=2500, timeout=60), f"{server.url}/a/2.tar"
    child = os.fork()
    if child == 0:
        cache.open(url)
        os._exit(0)
    assert server.started.wait(60)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not files(tmp_path, ".tar")
    assert len(files(tmp_path, ".part")) == 1
    server.delay = 0
    for name in ("0.tar", "1.tar"):  # fit only when what the dead process claimed is free again
        content(cache, f"{server.url}/a/{name}")
    assert not files(tmp_path, ".part")
    assert content(cache, url) == CONTENT["2.tar"] + b"a"


def test_a_changed_shard_is_fetched_anew_by_the_next_run_and_refused_within_one(server, tmp_path):
    url = f"{server.url}/a/0.tar"
    first = cache_in(tmp_path)
    before = first.identity(url)
    content(first, url)
    (tmp_path / "a" / "0.tar").write_bytes(b"new")
    server.version = "2"
    assert cache_in(tmp_path).identity(url) != before
    assert content(cache_in(tmp_path), url) == b"new"
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(ShardReadError, match="has changed since the run began"):
        first.open(url)


def test_an_unchanged_copy_is_kept_by_the_next_run(server, tmp_path):
    url = f"{server.url}/a/0.tar"
    assert content(cache_in(tmp_path), url) == content(cache_in(tmp_path), url)
    assert server.requests["GET", "a/0.tar"] == 1


def test_a_cut_copy_is_fetched_again(server, tmp_path):
    url, cache = f"{server.url}/a/0.tar", cache_in(tmp_path)
    content(cache, url)
    os.truncate(files(tmp_path, ".tar")[0], 10)
    assert content(cache, url) == CONTENT["0.tar"] + b"a"


def test_threads_wait_for_room_that_another_download_takes(server, tmp_path):
    server.delay = 0.2
    cache, answers = cache_in(tmp_path, max_bytes=1500), {}
    ask = lambda name: answers.update({name: content(cache, f"{server.url}/a/{name}")})  # noqa: E731
    threads = [threading.Thread(target=ask, args=(name,)) for name in ("0.tar", "1.tar")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert answers == {name: CONTENT[name] + b"a" for name in ("0.tar", "1.tar")}


def test_too_small_a_bound_and_a_full_disk_say_what_to_change(server, tmp_path, monkeypatch):
    with pytest.raises(ShardReadError, match=r"has 1001 bytes and does not fit .*`data.cache_bytes`"):
        cache_in(tmp_path, max_bytes=100).open(f"{server.url}/a/0.tar")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = cache_in(tmp_path)
    monkeypatch.setattr(cache.remote, "download", full)
    with pytest.raises(
        ShardReadError, match=r"cache took no shard of 1001 bytes.*`data.cache_dir`.*`data.cache_bytes`"
    ):
        cache.open(f"{server.url}/a/0.tar")


@pytest.mark.parametrize("size", [1003, 700])
def test_what_a_killed_download_of_the_same_shard_claimed_is_no_reason_to_wait(server, tmp_path, size):
    cache, url = cache_in(tmp_path, max_bytes=1500), f"{server.url}/a/2.tar"
    content(cache, url)
    (copy,) = files(tmp_path, ".tar")
    copy.rename(copy.with_name(f"{copy.stem}.{size}.part"))
    answers = []
    asking = threading.Thread(target=lambda: answers.append(content(cache, url)), daemon=True)
    asking.start()
    asking.join(20)
    assert answers == [CONTENT["2.tar"] + b"a"]
    assert not files(tmp_path, ".part")


def _count_often(cache, times):
    for _ in range(times):
        cache._count(0, 1)


def test_processes_that_share_a_counter_lose_no_count(tmp_path):
    context, cache, times = multiprocessing.get_context("fork"), cache_in(tmp_path), 4000
    cache.directory.mkdir()
    counting = [context.Process(target=_count_often, args=(cache, times)) for _ in range(4)]
    for process in counting:
        process.start()
    for process in counting:
        process.join(120)
    assert cache.counts.hits == 4 * times
