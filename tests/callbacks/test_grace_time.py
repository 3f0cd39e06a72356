"""The time from a signal to the end of a job, beside what leaving takes."""

import logging

import pytest

from ldm_train.callbacks import CheckpointWriter, Preemption
from tests.callbacks.toy import ToyData, ToyStage, trainer_of


def test_a_save_that_does_not_fit_the_grace_time_is_warned_of(tmp_path, caplog):
    writer = CheckpointWriter(str(tmp_path), every_n_steps=2)
    writer.longest_save = 130.0
    with caplog.at_level(logging.WARNING):
        trainer_of(
            tmp_path, [Preemption(grace_seconds=120.0), writer], limit_val_batches=0, enable_checkpointing=True
        ).fit(ToyStage(), ToyData())
    warnings = [r.getMessage() for r in caplog.records if "may lose steps" in r.getMessage()]
    assert len(warnings) == 1
    assert "found 130 s for a save" in warnings[0]
    assert "change `callbacks.preemption.grace_seconds`" in warnings[0]


def test_a_save_is_compared_with_the_grace_time_however_short_it_was(tmp_path, caplog):
    """The longest wait was long before it."""
    now, preemption, writer = [0.0], Preemption(grace_seconds=120.0), CheckpointWriter(str(tmp_path))
    trainer = trainer_of(tmp_path, [writer, preemption], enable_checkpointing=True)
    preemption.setup(trainer, None, "validate")
    trainer.state.fn = "validate"
    with pytest.MonkeyPatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr("ldm_train.callbacks.preemption.time.monotonic", lambda: now[0])
        for seconds in (1.0, 50.0, 1.0):
            now[0] += seconds
            preemption.leave_if_told(trainer)
        assert "may lose steps" not in caplog.text
        now[0] += 40.0
        writer.seconds = writer.longest_save = 30.0
        preemption.on_save_checkpoint(trainer, None, {})
        preemption.leave_if_told(trainer)
    assert "found 30 s for a save and 50 s between two looks" in caplog.text
