import math
from types import SimpleNamespace

import pytest
import torch

from ldm_train.callbacks import LossByTime
from ldm_train.callbacks.loss_by_time import LossByQuarter


class Stage:
    """Knows the length of its schedule, and remembers what it is told to log."""

    device = torch.device("cpu")
    denoiser = SimpleNamespace(schedule=SimpleNamespace(num_steps=1000))

    def __init__(self):
        self.logged = {}

    def log(self, key, value):
        self.logged[key] = value


def outputs_of(square_error, t):
    return {"square_error": torch.tensor(square_error), "t": torch.tensor(t)}


def validated(*batches):
    """What one validation of these outputs logs."""
    callback, stage = LossByTime(), Stage()
    callback.on_validation_start(None, stage)
    for batch_idx, outputs in enumerate(batches):
        callback.on_validation_batch_end(None, stage, outputs, None, batch_idx)
    callback.on_validation_epoch_end(None, stage)
    return stage.logged


def test_each_time_counts_in_its_own_quarter_whatever_the_batches():
    times = [0, 249, 250, 499, 500, 749, 750, 999]
    errors = [1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0]
    expected = {"val/loss_q1": 2.0, "val/loss_q2": 20.0, "val/loss_q3": 200.0, "val/loss_q4": 2000.0}
    assert validated(outputs_of(errors, times)) == expected
    assert validated(*(outputs_of([error], [t]) for error, t in zip(errors, times, strict=True))) == expected


def test_a_quarter_without_times_has_no_figure():
    assert validated(outputs_of([4.0, 6.0], [10, 600])) == {"val/loss_q1": 4.0, "val/loss_q3": 6.0}


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_a_broken_loss_is_shown_in_its_quarter_and_in_no_other(broken):
    logged = validated(outputs_of([4.0, broken, 8.0], [10, 900, 950]))
    assert logged.pop("val/loss_q4") == pytest.approx(broken, nan_ok=True)
    assert logged == {"val/loss_q1": 4.0}


def test_training_logs_the_mean_since_the_last_logged_step():
    callback, stage = LossByTime(), Stage()
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, max_steps=100)
    callback.on_train_start(trainer, stage)
    logged = []
    for step, error in enumerate([1.0, 3.0, 10.0, math.nan, 5.0, 7.0], start=1):
        trainer.global_step, stage.logged = step, {}
        callback.on_train_batch_end(trainer, stage, outputs_of([error], [900]), None, step - 1)
        logged.append(stage.logged.get("train/loss_q4"))
    assert logged == pytest.approx([None, 2.0, None, math.nan, None, 6.0], nan_ok=True)


def test_two_processes_are_as_one():
    """A quarter that only the other process saw has a figure here as well."""
    whole, own, other = (LossByQuarter() for _ in range(3))
    values, t = torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 300, 10, 800])
    for metric, rows in ((whole, slice(0, 4)), (own, slice(0, 1)), (other, slice(1, 4))):
        metric.update(values[rows], t[rows], 1000)
    gathered = iter([other.sums, other.counts])
    own.distributed_available_fn, own.dist_sync_fn = lambda: True, lambda state, group: [state, next(gathered)]
    (means, counts), (expected, _) = own.compute(), whole.compute()
    torch.testing.assert_close(means, expected, equal_nan=True)
    assert counts.tolist() == [2, 1, 0, 1]
