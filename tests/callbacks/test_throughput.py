import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_train.callbacks import MetricsCSV, ThroughputMonitor
from tests.callbacks.toy import ToyData, ToyStage, batch_of, trainer_of

WAIT, WORK, PAUSE = 0.03, 0.01, 0.2


def _rows(tmp_path):
    import csv

    with (tmp_path / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["train/images_seen"]]
    return [{key: float(value) for key, value in row.items() if value} for row in rows]


class SlowData(ToyData):
    def train_dataloader(self):
        def collate(indices):
            time.sleep(WAIT)
            return batch_of(indices)

        return DataLoader(range(24), batch_size=4, collate_fn=collate)


class SlowStage(ToyStage):
    def training_step(self, batch, batch_idx):
        time.sleep(WORK)
        return super().training_step(batch, batch_idx)


class Pause(L.Callback):
    """What other callbacks do after a step: sample, draw, save."""

    def on_train_batch_end(self, *_):
        time.sleep(PAUSE)


def test_waits_count_and_pauses_do_not(tmp_path):
    trainer = trainer_of(tmp_path, [ThroughputMonitor(), Pause()], logger=MetricsCSV(tmp_path), val_check_interval=3)
    trainer.fit(SlowStage(), SlowData())
    rows = _rows(tmp_path)
    assert [row["train/images_seen"] for row in rows] == [8, 16, 24]
    for row in rows[1:]:
        seconds = 4 / row["train/images_per_second"]
        assert WAIT + WORK < seconds < WAIT + WORK + PAUSE / 2
        assert WAIT / seconds <= row["train/data_wait_share"] < 1 - WORK / seconds


def test_norm_is_that_before_clipping_and_the_rate_the_one_used(tmp_path):
    class Norms(L.Callback):
        def __init__(self):
            self.expected = {}

        def on_after_backward(self, trainer, pl_module):
            self.expected[trainer.global_step] = (pl_module.colours.weight.grad.norm().item(), pl_module.used_rate())

    class Stage(ToyStage):
        def used_rate(self):
            return self.optimizers().param_groups[0]["lr"]

    norms = Norms()
    callbacks, options = [ThroughputMonitor(), norms], {"gradient_clip_val": 1e-3, "limit_val_batches": 0}
    trainer_of(tmp_path, callbacks, logger=MetricsCSV(tmp_path), **options).fit(Stage(), ToyData())
    rows = _rows(tmp_path)
    assert [row["step"] for row in rows] == [1, 3, 5]
    for row in rows:
        norm, rate = norms.expected[row["step"]]
        assert row["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["train/learning_rate"] == pytest.approx(rate, rel=1e-6)


def test_accumulated_batches_count_and_log_once(tmp_path):
    options = {"accumulate_grad_batches": 3, "max_steps": 4, "limit_val_batches": 0}
    trainer = trainer_of(tmp_path, [ThroughputMonitor()], logger=MetricsCSV(tmp_path), **options)
    trainer.fit(ToyStage(), ToyData())
    assert [row["train/images_seen"] for row in _rows(tmp_path)] == [24, 48]


def test_images_seen_goes_on_in_a_resumed_run(tmp_path):
    monitor = ThroughputMonitor()
    trainer = trainer_of(tmp_path, [monitor], limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["ThroughputMonitor"]["images_seen"] == 24
    resumed = ThroughputMonitor()
    trainer = trainer_of(tmp_path, [resumed], max_steps=9, limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData(), ckpt_path=tmp_path / "last.ckpt")
    assert resumed.images_seen == 36


def test_a_profiler_of_the_user_s_still_gets_every_action(tmp_path):
    from lightning.pytorch.profilers import SimpleProfiler

    profiler = SimpleProfiler()
    trainer_of(tmp_path, [ThroughputMonitor()], profiler=profiler, limit_val_batches=0).fit(ToyStage(), ToyData())
    durations = profiler.recorded_durations
    assert len(durations["[_TrainingEpochLoop].train_dataloader_next"]) >= 6
    assert len(durations["run_training_batch"]) == 6
