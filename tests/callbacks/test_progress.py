import re
import sys

import pytest

from ldm_train.callbacks import RunSummary, progress_bar
from ldm_train.callbacks.progress import BarProgress, LineProgress, subtask, total_steps
from ldm_train.callbacks.summary import files_to_look_at
from tests.callbacks.toy import ToyData, ToyStage, trainer_of


def test_the_display_follows_the_kind_of_output(monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert isinstance(progress_bar(), BarProgress)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: False, raising=False)
    assert isinstance(progress_bar(), LineProgress)


def test_lines_come_at_the_interval_and_at_the_end_with_loss_and_remaining_time(tmp_path, capsys):
    bar = LineProgress(every_n_steps=3)
    trainer_of(tmp_path, [bar], max_steps=7, accumulate_grad_batches=2, limit_val_batches=0).fit(ToyStage(), ToyData())
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["3/7", "6/7", "7/7"]
    assert all(re.fullmatch(r"step \d/7 \(\d+ %\)  loss \d\.\d+  0:00:0\d left", line) for line in lines)


def test_a_resumed_run_counts_from_its_start(tmp_path, capsys):
    trainer = trainer_of(tmp_path, [], limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    options = {"max_steps": 12, "limit_val_batches": 0}
    trainer_of(tmp_path, [LineProgress(4)], **options).fit(ToyStage(), ToyData(), ckpt_path=tmp_path / "last.ckpt")
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step")]
    assert [line.split()[1] for line in lines] == ["8/12", "12/12"]


def test_the_bar_reaches_the_end_and_work_inside_the_run_vanishes(tmp_path):
    class Watched(BarProgress):
        def _stop(self):
            if self._progress is not None:
                self.tasks = [(task.description, task.completed, task.total) for task in self._progress.tasks]
            super()._stop()

    bar = Watched()
    trainer = trainer_of(tmp_path, [bar], val_check_interval=3)
    trainer.fit(ToyStage(), ToyData())
    assert bar.tasks == [("training", 6, 6)]
    with subtask(trainer, "work", 10) as advance:
        advance(4)
        assert [(task.description, task.completed) for task in bar._progress.tasks] == [("work", 4)]
    assert bar._progress.tasks == []
    bar._stop()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": -1, "max_epochs": 2}, 12),
        ({"max_steps": -1, "max_epochs": 2, "accumulate_grad_batches": 4}, 4),
        ({"max_steps": 7, "max_epochs": 2}, 7),
    ],
)
def test_total_steps_are_the_steps_that_are_made(tmp_path, options, steps):
    trainer = trainer_of(tmp_path, [], limit_val_batches=0, **options)
    trainer.fit(ToyStage(), ToyData())
    assert trainer.global_step == total_steps(trainer) == steps


def test_summaries_tell_the_run_and_name_the_files_that_exist(tmp_path, capsys):
    for name in ("samples/step_0000001.png", "samples/step_0000002.png", "checkpoints/last.ckpt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "wandb" / "offline-run-1-abc").mkdir(parents=True)
    summary = RunSummary(str(tmp_path), metrics=["train/loss", "val/never_logged"])
    trainer_of(tmp_path, [summary], accumulate_grad_batches=2, max_steps=3, limit_val_batches=0).fit(
        ToyStage(), ToyData()
    )
    out = capsys.readouterr().out
    start, end = out.split("Look at")
    facts = [r"colours\W+72\W+72\W+100 %", r"frozen\W+6\W+0\W+0 %", r"total\W+78\W+72\W+92\.3 %"]
    facts += [
        r"optimizer steps\W+3",
        r"effective batch\W+8 images a step",
        r"images to see\W+24",
        r"precision\W+32-true",
    ]
    facts += [r"training images\W+24", r"train/loss\W+0\.\d+"]
    for fact in facts:
        assert re.search(fact, start), fact
    assert "never_logged" not in out
    assert end.split("\n")[1:] == [
        f"  samples: {tmp_path}/samples/step_0000002.png (and 1 earlier)",
        f"  checkpoint: {tmp_path}/checkpoints/last.ckpt",
        f"  charts: wandb leet {tmp_path}/wandb",
        "",
    ]
    assert files_to_look_at(tmp_path / "nothing") == {}
