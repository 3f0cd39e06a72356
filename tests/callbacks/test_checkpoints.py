"""Checkpoints: whole at any moment, kept as asked, and clear when one cannot be written."""

import errno
import itertools
import os
import random
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ldm_train.callbacks import CheckpointError, CheckpointWriter, MetricsCSV, RunRecord
from ldm_train.checkpoint import read_checkpoint, verify_checkpoint
from ldm_train.config import ConfigError
from ldm_train.train import resume_path
from tests.callbacks.toy import ToyData, ToyStage, trainer_of


def fit(directory, writer=None, *callbacks, **options):
    writer = writer or CheckpointWriter(str(directory), every_n_steps=2)
    defaults = {"limit_val_batches": 0, "enable_checkpointing": True}
    trainer = trainer_of(directory, [*callbacks, writer], **defaults | options)
    trainer.fit(ToyStage(), ToyData())
    return writer


def steps(directory):
    return {path.name: read_checkpoint(path)["global_step"] for path in sorted(directory.glob("*.ckpt"))}


def test_the_last_two_are_there_and_the_step_before_the_last_is_saved(tmp_path):
    """So that what is killed in its closing work has one step to repeat."""
    fit(tmp_path, CheckpointWriter(str(tmp_path), every_n_steps=100))
    assert steps(tmp_path) == {"last.ckpt": 6, "previous.ckpt": 5}
    assert not list(tmp_path.glob(".*"))


def test_every_so_many_steps_are_kept_in_the_place_of_the_last(tmp_path):
    fit(tmp_path, CheckpointWriter(str(tmp_path), every_n_steps=None, keep_every_n_steps=2))
    expected = {"last.ckpt": 6, "previous.ckpt": 5, "step_0000002.ckpt": 2, "step_0000004.ckpt": 4}
    assert steps(tmp_path) == expected | {"step_0000006.ckpt": 6}
    assert os.path.samefile(tmp_path / "last.ckpt", tmp_path / "step_0000006.ckpt")


@pytest.mark.parametrize(("images", "kept"), [(8, [2, 4, 6]), (10, [3, 5]), (3, [1, 2, 3, 4, 5, 6])])
def test_images_are_a_clock_too(tmp_path, images, kept):
    """Batches of 4: the first step at or behind each multiple."""
    fit(tmp_path, CheckpointWriter(str(tmp_path), every_n_steps=None, keep_every_images=images))
    assert [step for name, step in steps(tmp_path).items() if name.startswith("step")] == kept


def test_minutes_are_a_clock_too(tmp_path, monkeypatch):
    clock = itertools.count(0, 25)  # 25 s between two looks
    monkeypatch.setattr("ldm_train.callbacks.checkpoints.time.monotonic", lambda: float(next(clock)))
    saved = []
    monkeypatch.setattr(CheckpointWriter, "_write", lambda self, checkpoint, step: saved.append(step))
    fit(tmp_path, CheckpointWriter(str(tmp_path), every_n_steps=None, every_minutes=1.0), max_steps=12)
    assert saved[-2:] == [11, 12]
    assert len(saved[:-2]) >= 2
    assert all(b - a >= 2 for a, b in itertools.pairwise(saved[:-2]))


@given(
    every=st.none() | st.integers(1, 12),
    keep=st.none() | st.integers(1, 12),
    images=st.none() | st.integers(1, 60),
    minutes=st.none() | st.floats(0.1, 3.0),
    batch=st.integers(1, 20),
    accumulated=st.integers(1, 3),
    first=st.integers(0, 30),
)
def test_what_is_counted_between_two_looks_leaves_no_step_out(every, keep, images, minutes, batch, accumulated, first):
    """A batch takes ten seconds."""
    saved, batches, last = [], [0], 40
    trainer = SimpleNamespace(
        global_step=first,
        datamodule=SimpleNamespace(global_batch_size=batch),
        accumulate_grad_batches=accumulated,
        fit_loop=SimpleNamespace(
            epoch_loop=SimpleNamespace(_should_accumulate=lambda: (batches[0] % accumulated) != 0)
        ),
    )
    writer = CheckpointWriter("", every, minutes, keep, images)
    writer._save = lambda trainer, **_: (saved.append(trainer.global_step), writer._start_clock())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ldm_train.callbacks.checkpoints.total_steps", lambda _: last)
        patch.setattr("ldm_train.callbacks.checkpoints.log_trained_batch", lambda _: None)
        patch.setattr("ldm_train.callbacks.checkpoints.time.monotonic", lambda: 10.0 * batches[0])
        writer.setup(trainer, None, "fit")
        writer.on_train_start(trainer, None)
        for batches[0] in range(1, (last - first) * accumulated + 1):
            trainer.global_step += batches[0] % accumulated == 0
            writer.on_train_batch_end(trainer)
    joined, due, last_save = batch * accumulated, [], first
    for step in range(first + 1, last):
        if (
            step == last - 1
            or (every and step % every == 0)
            or (keep and step % keep == 0)
            or (images and step * joined // images > (step - 1) * joined // images)
            or (minutes and 10.0 * accumulated * (step - last_save) > 60.0 * minutes)
        ):
            due.append(step)
            last_save = step
    assert saved == due


class OneTalkLater:
    """What ranks agree on when all say the same: each call returns what the one before said, if it still counts."""

    is_alone = False

    def __init__(self):
        self.pending = 0

    def next_call_talks(self):
        return True

    def exchange(self, value):
        agreed, self.pending = self.pending, value
        return agreed

    def forget(self):
        self.pending = 0


@pytest.mark.parametrize(("accumulated", "steps"), [(1, [7, 14, 21, 23, 24]), (4, [3, 5, 6])])
def test_ranks_that_learn_late_that_time_is_up_save_once(tmp_path, monkeypatch, accumulated, steps):
    """After 66 s, a batch until all know of it, and what the step still takes; epochs of six batches end steps."""
    now, saved = [0.0], []

    class Steps(L.Callback):
        def on_train_batch_start(self, *_):
            now[0] += 11.0

    writer = CheckpointWriter(str(tmp_path), every_n_steps=None, every_minutes=1.0)
    monkeypatch.setattr("ldm_train.callbacks.checkpoints.time.monotonic", lambda: now[0])
    monkeypatch.setattr(CheckpointWriter, "_write", lambda self, checkpoint, step: saved.append(step))
    monkeypatch.setattr("ldm_train.callbacks.checkpoints.PacedAgreement", lambda *_: OneTalkLater())
    fit(tmp_path, writer, Steps(), max_steps=24 // accumulated, accumulate_grad_batches=accumulated)
    assert saved == steps


@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_step_that_is_saved_has_its_row_and_has_it_once_whatever_ends_the_run_then(tmp_path, monkeypatch, step):
    """Step 2 is validated after its save, and 5 is the one before the last."""

    class Gone(BaseException):
        pass

    def save_and_go(self, trainer, **options):
        save(self, trainer, **options)
        if trainer.global_step == step:
            raise Gone

    def start(name, **options):
        writer = CheckpointWriter(str(tmp_path / name), every_n_steps=1)
        logger = MetricsCSV(str(tmp_path / name))
        validated = {"limit_val_batches": 1, "val_check_interval": 2, "log_every_n_steps": 1}
        defaults = {"enable_checkpointing": True, "logger": logger} | validated
        trainer_of(tmp_path, [writer], **defaults).fit(ToyStage(), ToyData(), weights_only=True, **options)

    save = CheckpointWriter._save
    start("unbroken")
    monkeypatch.setattr(CheckpointWriter, "_save", save_and_go)
    with pytest.raises(Gone):
        start("broken")
    monkeypatch.undo()
    start("broken", ckpt_path=tmp_path / "broken/last.ckpt")
    rows = {name: (tmp_path / name / "metrics.csv").read_text().splitlines() for name in ("unbroken", "broken")}
    assert len(rows["unbroken"]) == 1 + 6 + 3
    assert [row.split(",")[0] for row in rows["broken"]] == [row.split(",")[0] for row in rows["unbroken"]]


class Figures(L.Callback):
    """Validation figures as they are given."""

    def __init__(self, figures):
        self.figures = iter(figures)

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("val/figure", torch.tensor(next(self.figures)))


@pytest.mark.parametrize("minutes", [None, 60.0])
def test_a_run_without_an_end_saves_nothing_before_it_is_told_to(tmp_path, monkeypatch, minutes):
    saved = []

    class Ends(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step == 12

    monkeypatch.setattr(CheckpointWriter, "_write", lambda self, checkpoint, step: saved.append(step))
    writer = CheckpointWriter(str(tmp_path), every_n_steps=None, every_minutes=minutes)
    fit(tmp_path, writer, Ends(), max_steps=-1, max_epochs=-1)
    assert saved == [12]


def test_a_validation_amid_a_step_keeps_nothing_and_says_what_to_change(tmp_path, caplog):
    """After the third of six batches, for the first time before any step; the sixth ends one."""
    saved = []

    class Notes(CheckpointWriter):
        def _save(self, trainer, **options):
            saved.append(trainer.fit_loop.epoch_loop._should_accumulate())
            super()._save(trainer, **options)

    writer = Notes(str(tmp_path), every_n_steps=None, best_metric="val/figure")
    figures = Figures(1.0 / (1 + number) for number in range(20))
    fit(tmp_path, writer, figures, accumulate_grad_batches=4, val_check_interval=3, limit_val_batches=1, max_steps=4)
    assert saved
    assert not any(saved)
    assert steps(tmp_path)["best.ckpt"] == 4
    assert caplog.text.count("is not kept") == 2
    assert (
        "change `trainer.val_check_interval` to a multiple of `trainer.accumulate_grad_batches`, which is 4"
        in caplog.text
    )


@pytest.mark.parametrize(("mode", "best"), [("min", 2), ("max", 4)])
def test_the_step_with_the_best_figure_stays_and_one_that_is_no_number_never_is(tmp_path, mode, best):
    writer = CheckpointWriter(str(tmp_path), every_n_steps=100, best_metric="val/figure", best_mode=mode)
    figures = Figures([float("nan"), 1.0, 2.0, 3.0, 2.0, 1.5])
    fit(tmp_path, writer, figures, limit_val_batches=1, val_check_interval=1)
    assert steps(tmp_path)["best.ckpt"] == best
    again = CheckpointWriter(str(tmp_path))
    again.on_load_checkpoint(None, None, read_checkpoint(tmp_path / "last.ckpt"))
    assert not again._is_better({"min": 1.0, "max": 3.0}[mode])


def test_a_file_system_without_links_gets_copies(tmp_path, monkeypatch):
    def link(*_):
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", link)
    fit(tmp_path)
    assert steps(tmp_path) == {"last.ckpt": 6, "previous.ckpt": 5}


def test_any_cut_and_any_changed_byte_is_noticed_and_the_one_before_taken(tmp_path, caplog):
    fit(tmp_path / "checkpoints")
    last, previous = (tmp_path / "checkpoints" / name for name in ("last.ckpt", "previous.ckpt"))
    whole, draw = last.read_bytes(), random.Random(0)
    offset = whole.index(read_checkpoint(last)["state_dict"]["colours.weight"].numpy().tobytes())
    twentieth = len(whole) / 20
    damaged = [whole[: int((part + draw.random()) * twentieth)] for part in range(20) for _ in range(2)]
    damaged += [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in (offset, offset + 100)]
    for content in damaged:
        last.write_bytes(content)
        assert resume_path("auto", tmp_path) == previous
    assert "trying the one before" in caplog.text
    previous.write_bytes(whole[:100])
    with pytest.raises(ConfigError, match=r"found no whole checkpoint .*; allowed are .*; change `resume`"):
        resume_path("auto", tmp_path)


def test_a_damaged_last_never_takes_the_place_of_the_one_before(tmp_path):
    fit(tmp_path)
    (tmp_path / "last.ckpt").write_bytes(b"cut")
    fit(tmp_path, max_steps=3)
    assert steps(tmp_path) == {"last.ckpt": 3, "previous.ckpt": 2}
    (tmp_path / "last.ckpt").write_bytes(b"cut")
    writer = CheckpointWriter(str(tmp_path))
    assert writer._write({"state_dict": {}, "global_step": 7}, 7) is None
    assert steps(tmp_path) == {"last.ckpt": 7, "previous.ckpt": 2}


def assert_refused_and_untouched(directory, write):
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    with pytest.raises(CheckpointError) as error:
        write()
    assert "could not be saved" in str(error.value)
    assert "Allowed is a directory that can be written" in str(error.value)
    assert "change `paths.root`" in str(error.value)
    assert re.search(r"[\d.]+ MiB are needed and [\d.,]+ MiB free", str(error.value))
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == before
    return str(error.value)


def test_what_cannot_be_written_leaves_the_old_one_and_nothing_else(tmp_path, monkeypatch):
    fit(tmp_path)

    def save(checkpoint, file):
        file.write(b"a part")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(torch, "save", save)
    assert_refused_and_untouched(tmp_path, lambda: fit(tmp_path))


class Full:
    """A file on a disk that takes so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, data):
        taken = bytes(data)[: self.room]
        self.file.write(taken)
        self.room -= len(taken)
        if len(taken) < len(data):
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(taken)

    def flush(self):
        self.file.flush()


@pytest.mark.parametrize("share", [k / 20 for k in range(20)])
def test_a_disk_that_is_full_after_any_byte_costs_no_checkpoint(tmp_path, monkeypatch, share):
    fit(tmp_path)
    original, size = torch.save, (tmp_path / "last.ckpt").stat().st_size
    monkeypatch.setattr(torch, "save", lambda content, file: original(content, Full(file, int(share * size))))
    assert "No space left" in assert_refused_and_untouched(tmp_path, lambda: fit(tmp_path))
    assert steps(tmp_path) == {"last.ckpt": 6, "previous.ckpt": 5}
    assert not list(tmp_path.glob(".*"))


def test_what_cannot_be_read_back_does_not_become_the_last(tmp_path, monkeypatch):
    fit(tmp_path)
    original = torch.save

    def save(checkpoint, file):
        original(checkpoint, file)
        file.seek(-50, 2)
        file.truncate()

    monkeypatch.setattr(torch, "save", save)
    assert_refused_and_untouched(tmp_path, lambda: fit(tmp_path))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a file system")
@pytest.mark.parametrize("state", ["full", "read-only"])
def test_a_full_and_a_read_only_disk(tmp_path, state):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", disk], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mount: {mount.stderr}")
    try:
        fit(disk)
        if state == "read-only":
            subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        else:
            (disk / "other").write_bytes(b"0" * max(0, free(disk) - 4096))
        assert_refused_and_untouched(disk, lambda: fit(disk))
        verify_checkpoint(disk / "last.ckpt")
    finally:
        subprocess.run(["umount", disk], check=True)


def free(directory: Path) -> int:
    found = os.statvfs(directory)
    return found.f_bavail * found.f_frsize


def test_a_checkpoint_says_where_it_comes_from_in_plain_values(tmp_path):
    fit(tmp_path, None, RunRecord({"seed": 0}))
    found = read_checkpoint(tmp_path / "last.ckpt")
    assert found["config"] == {"seed": 0}
    provenance = found["provenance"]
    assert provenance["restarts"] == 0
    assert provenance["packages"]["torch"] == torch.__version__.partition("+")[0]
    assert provenance["data_fingerprint"] == "toy"
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if commit.returncode == 0:
        assert provenance["git"]["commit"] == commit.stdout.strip()
    again = RunRecord({})
    again.on_load_checkpoint(None, None, found)
    assert again.restarts == 1


@pytest.mark.parametrize("key", ["every_n_steps", "every_minutes", "keep_every_n_steps", "keep_every_images"])
def test_an_interval_that_is_none_is_refused(key):
    with pytest.raises(ValueError, match=rf"change `callbacks.checkpoint.{key}`"):
        CheckpointWriter("x", **{key: 0})
