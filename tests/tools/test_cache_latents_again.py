"""What `tools/cache_latents.py` makes again: what changed, and everything with --overwrite, by any number of tasks."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

import cache_latents
import pytest

from ldm_train.data import LocalFiles, latent_records, latent_writing
from ldm_train.data.latents import manifests_of
from tests.tools.test_cache_latents import arguments, run, same_files, source

__all__ = ["source"]


@pytest.fixture(autouse=True)
def _no_job(monkeypatch):
    """The job of SLURM that the tests may run in is not that of the tool."""
    for name in ("SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"):
        monkeypatch.delenv(name, raising=False)


def times(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.tar")}


def said(capsys):
    return " ".join(capsys.readouterr().err.split())


def change(path, old=b"caption", new=b"Caption"):
    """Change the captions of a shard, and not its size."""
    data = path.read_bytes()
    assert old in data
    path.write_bytes(data.replace(old, new))


def test_a_shard_that_changed_is_made_again_though_its_size_is_the_same(source, tmp_path, capsys):
    out, changed = tmp_path / "out", tmp_path / "shards" / "00002.tar"
    assert run(source, out) == 0
    before, manifest = times(out), json.loads((out / "manifest.json").read_text())
    change(changed)
    assert run(source, out) == 0
    assert "therefore made again: 00002.tar" in said(capsys)
    assert [name for name, time in times(out).items() if time != before[name]] == ["00002.tar"]
    assert b"Caption 9" in (out / "00002.tar").read_bytes()
    assert run(source, tmp_path / "fresh") == 0
    assert same_files(out, tmp_path / "fresh")
    fingerprint = json.loads((out / "manifest.json").read_text())["source"]["fingerprint"]
    assert fingerprint != manifest["source"]["fingerprint"]


def test_a_shard_that_changed_belongs_to_one_task_and_no_manifest_tells_of_it_until_it_is_made(source, tmp_path):
    out = tmp_path / "out"
    assert run(source, out) == 0
    change(tmp_path / "shards" / "00000.tar")
    change(tmp_path / "shards" / "00001.tar")
    assert run(source, out, "--task-index", 1, "--num-tasks", 2) == 0
    assert not (out / "manifest.json").exists()
    assert run(source, out, "--merge") == 1
    assert run(source, out, "--task-index", 0, "--num-tasks", 2) == 0
    assert (out / "manifest.json").exists()


def test_a_mere_copy_is_known_by_its_content_and_read_once(source, tmp_path, monkeypatch):
    out, copies = tmp_path / "out", tmp_path / "copies"
    assert run(source, out) == 0
    before = times(out)
    for path in (tmp_path / "shards").iterdir():
        os.utime(path, ns=(1, 1))
    monkeypatch.setattr(cache_latents, "encode_shards", None)
    assert run(source, out) == 0
    shutil.copytree(tmp_path / "shards", copies)
    assert run(copies / "*.tar", out) == 0
    for module in (latent_records, latent_writing):
        monkeypatch.setattr(module, "digest_of", None)
    assert run(copies / "*.tar", out) == 0
    assert times(out) == before
    assert json.loads((out / "manifest.json").read_text())["source"]["root"] == str(copies)


def test_another_data_set_does_not_replace_a_cache(source, tmp_path, capsys):
    assert run(source, tmp_path / "out") == 0
    before = times(tmp_path / "out")
    shutil.copytree(tmp_path / "shards", tmp_path / "others")
    change(tmp_path / "others" / "00001.tar")
    assert run(tmp_path / "others" / "*.tar", tmp_path / "out") == 2
    assert "other content from" in said(capsys)
    assert times(tmp_path / "out") == before
    assert run(tmp_path / "others" / "*.tar", tmp_path / "out", "--overwrite") == 0


def test_a_shard_that_changes_while_it_is_encoded_is_refused(source, tmp_path, capsys, monkeypatch):
    def fill(shard, *_):
        change(tmp_path / "shards" / shard.record.name)
        os.utime(tmp_path / "shards" / shard.record.name, ns=(1, 1))

    with monkeypatch.context() as changing:
        changing.setattr(latent_writing.OpenShard, "fill", fill)
        assert run(source, tmp_path / "out") == 2
    assert "00000.tar changed while it was encoded; allowed are shards that nobody writes" in said(capsys)
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_tasks_make_a_cache_anew_in_any_order(source, tmp_path, order):
    out = tmp_path / "out"
    assert run(source, out) == 0
    for index in order:
        again = ("--dtype", "float32", "--overwrite", "--task-index", index, "--num-tasks", 3)
        assert run(source, out, *again) == 0
        assert (out / "manifest.json").exists() == (index == order[-1])
    assert run(source, tmp_path / "fresh", "--dtype", "float32") == 0
    assert same_files(out, tmp_path / "fresh")


def test_nothing_old_is_left_though_the_settings_are_the_same(source, tmp_path):
    """A shard of the old making would be taken for one of the new, if its record were still there."""
    out = tmp_path / "out"
    assert run(source, out) == 0
    before = times(out)
    assert run(source, out, "--overwrite", "--task-index", 0, "--num-tasks", 2) == 0
    assert run(source, out, "--merge") == 1
    assert run(source, out, "--task-index", 1, "--num-tasks", 2) == 0  # without --overwrite it goes on all the same
    assert (out / "manifest.json").exists()
    assert all(time != before[name] for name, time in times(out).items())


def test_a_task_that_is_started_again_goes_on_and_one_without_shards_begins_nothing(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert run(source, out) == 0
    tasks = [("--overwrite", "--task-index", index, "--num-tasks", 6) for index in range(6)]
    for index in (0, 1, 2):
        assert run(source, out, *tasks[index]) == 0
    with monkeypatch.context() as broken:
        broken.setattr(cache_latents, "encode_shards", None)
        assert run(source, out, *tasks[1]) == 0
        assert run(source, out, *tasks[5]) == 0
    assert run(source, out, *tasks[3]) == 0
    assert (out / "manifest.json").exists()
    before = times(out)
    assert run(source, out, *tasks[5]) == 0
    assert (out / "manifest.json").exists()
    assert run(source, out, "--overwrite") == 0
    assert all(time != before[name] for name, time in times(out).items())
    assert not (out / latent_writing.OVERWRITING).exists()


def test_a_task_tells_its_job_s_script_how_many_of_its_shards_it_has_finished(source, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(cache_latents, "tell_finished", told.append)
    assert run(source, tmp_path / "out") == 0
    count = len(times(tmp_path / "out"))
    assert told == list(range(count + 1))
    change(tmp_path / "shards/00000.tar")
    assert run(source, tmp_path / "out") == 0
    assert told[count + 1 :] == [count - 1, count]


@pytest.mark.parametrize("name", ["SLURM_JOB_ID", "SLURM_ARRAY_JOB_ID"])
def test_a_task_that_a_finished_job_runs_once_more_leaves_the_cache_alone(source, tmp_path, capsys, monkeypatch, name):
    out, tasks = tmp_path / "out", [("--overwrite", "--task-index", index, "--num-tasks", 2) for index in range(2)]
    assert run(source, out) == 0
    before = times(out)
    for job, task in zip(("7", "8"), tasks, strict=True):  # of two jobs, each of which may run again
        monkeypatch.setenv(name, job)
        assert run(source, out, *task) == 0
    made, manifest = times(out), (out / "manifest.json").read_bytes()
    assert all(time != before[name] for name, time in made.items())
    for job, task in zip(("7", "8"), tasks, strict=True):
        monkeypatch.setenv(name, job)
        assert run(source, out, *task) == 0
        assert f"job {job} has made all shards anew before" in said(capsys)
    assert (times(out), (out / "manifest.json").read_bytes()) == (made, manifest)
    assert not (out / latent_writing.OVERWRITING).exists()
    assert run(source, out, *tasks[0], "--dtype", "float32") == 0  # another cache
    monkeypatch.setenv(name, "9")
    assert run(source, out, "--overwrite") == 0
    assert all(time != made[name] for name, time in times(out).items())


def test_the_identity_of_a_shard_is_asked_for_as_seldom_as_can_be_and_in_threads(source, tmp_path, monkeypatch):
    asked, threads = [], set()
    right = LocalFiles.identity

    def identity(self, location):
        asked.append(location)
        threads.add(threading.get_ident())
        time.sleep(0.01)
        return right(self, location)

    assert run(source, tmp_path / "out") == 0
    monkeypatch.setattr(LocalFiles, "identity", identity)
    assert run(source, tmp_path / "out") == 0
    assert len(asked) == 4
    assert len(threads) > 1


def test_what_a_larger_cache_left_is_named_and_how_to_get_rid_of_it(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert run(source, out) == 0
    assert "not of this cache" not in said(capsys)
    fewer = tmp_path / "shards" / "{00000,00002}.tar"
    assert run(fewer, out, "--overwrite") == 0
    text = said(capsys)
    assert "names it: 00001.tar; remove it" in text
    assert "names it: 00003.tar; remove it" in text
    with pytest.raises(ValueError, match=r"00001.tar is there, .* says nothing of it; .*remove it, or change"):
        manifests_of(sorted(map(str, out.glob("*.tar"))))


def test_without_locks_a_cache_is_made_but_not_anew(source, tmp_path, capsys, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(latent_writing.fcntl, "flock", flock)
    assert run(source, tmp_path / "out") == 0
    assert run(source, tmp_path / "out", "--overwrite") == 2
    assert "has no locks" in said(capsys)
    assert (tmp_path / "out" / "manifest.json").exists()


@pytest.mark.slow
@pytest.mark.thorough
def test_tasks_that_run_at_once_make_a_cache_anew(source, tmp_path):
    out, root = tmp_path / "out", Path(__file__).parents[2]
    assert run(source, out) == 0
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    again = ("--dtype", "float32", "--overwrite", "--num-tasks", 4, "--task-index")
    commands = [[sys.executable, "tools/cache_latents.py", *arguments(source, out, *again, i)] for i in range(4)]
    tasks = [
        subprocess.Popen(command, cwd=root, env=environment, stderr=subprocess.PIPE, text=True) for command in commands
    ]
    told = [task.communicate(timeout=240)[1] for task in tasks]
    assert [task.returncode for task in tasks] == [0] * 4, told
    assert run(source, tmp_path / "fresh", "--dtype", "float32") == 0
    assert same_files(out, tmp_path / "fresh")
