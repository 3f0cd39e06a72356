import json
import time

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_train.callbacks import MetricsCSV, RunSummary, ThroughputMonitor
from ldm_train.callbacks.summary import loading_figures
from ldm_train.callbacks.throughput import _over_ranks
from tests.callbacks.toy import ToyData, ToyStage, batch_of, trainer_of
from tests.ranks import run_ranks

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


class CountingData(ToyData):
    """Says what a real data module's workers count: 10 images in 2 seconds a logged step, and one bad caption."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def meters(self):
        self.reads += 1
        images = 10 * self.reads + self.reads * (self.reads - 1)  # 10, 22, 36: the rate rises
        return {"images_made": images, "busy_seconds": 2.0 * self.reads, "bad/caption": self.reads, "cache/hits": 7}


def test_meters_of_the_data_are_logged_as_rates_since_the_last_step_and_as_totals(tmp_path, capsys):
    data = CountingData()
    callbacks = [ThroughputMonitor(), RunSummary(str(tmp_path))]
    trainer_of(tmp_path, callbacks, logger=MetricsCSV(tmp_path), limit_val_batches=0).fit(ToyStage(), data)
    rows = _rows(tmp_path)
    assert data.reads == len(rows) == 3  # nothing is asked on steps that are not logged
    assert [row["data/images_per_second_per_worker"] for row in rows] == [5.0, 6.0, 7.0]
    assert [row["data/bad/caption"] for row in rows] == [1, 2, 3]
    assert {row["data/cache/hits"] for row in rows} == {7}
    shown = capsys.readouterr().out
    assert "7.0 images/s" in shown
    assert "3 caption" in shown


def _sum_over_ranks(rank, directory):
    torch.distributed.init_process_group("gloo", f"file://{directory}/meet", rank=rank, world_size=2)
    totals = {"images_made": 10.0 + rank, "bad/label": 2**40 + rank}
    (directory / f"{rank}.json").write_text(json.dumps(_over_ranks(totals, torch.device("cpu"))))
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_totals_of_ranks_are_added_exactly(tmp_path):
    run_ranks(_sum_over_ranks, tmp_path)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert found == [{"images_made": 21.0, "bad/label": 2**41 + 1}] * 2
    assert _over_ranks(found[0], torch.device("cpu")) == found[0]


def test_loading_is_told_in_words():
    silent = {"data/bad/label": 0.0, "data/bad/too_large": 0.0}
    assert loading_figures({"train/loss": 1.0}) == {}
    assert loading_figures(silent) == {"bad samples": "none"}
    assert loading_figures(silent | {"data/bad/label": 1200.0})["bad samples"] == "1,200 label"
    told = loading_figures({"train/data_wait_share": 0.125, "data/cache/misses": 3.0})
    assert told == {"waiting for data": "12.5% of the time", "cache misses": "3"}
