import pytest
import torch

from ldm_train.callbacks import NonFiniteGuard, NonFiniteLossError
from tests.callbacks.toy import ToyData, ToyStage, trainer_of


class Diverging(ToyStage):
    """The loss of one batch is NaN."""

    def __init__(self, bad_batch):
        super().__init__()
        self.bad_batch = bad_batch

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * (float("nan") if batch_idx == self.bad_batch else 1.0)


def _fit(tmp_path, stage, guard, **options):
    trainer = trainer_of(tmp_path, [guard], limit_val_batches=0, **options)
    trainer.fit(stage, ToyData())
    return trainer


def test_the_error_names_the_step_the_samples_and_the_keys_to_change(tmp_path):
    with pytest.raises(NonFiniteLossError) as error:
        _fit(tmp_path, Diverging(bad_batch=2), NonFiniteGuard())
    message = str(error.value)
    assert "train/loss = nan at step 3" in message
    assert "00000/0008, 00000/0009, 00000/0010, 00000/0011." in message
    for key in ("optimizer.lr", "lr_scheduler", "trainer.gradient_clip_val", "trainer.precision"):
        assert key in message


def test_a_finite_run_passes_and_the_device_is_asked_on_logged_steps_only(tmp_path, monkeypatch):
    guard, looks = NonFiniteGuard(), []
    look = guard._look
    monkeypatch.setattr(guard, "_look", lambda: looks.append(len(guard._pending)) or look())
    _fit(tmp_path, ToyStage(), guard, log_every_n_steps=3)
    assert looks == [3, 3]


def test_no_checkpoint_is_written_after_such_a_step(tmp_path):
    guard = NonFiniteGuard()
    trainer = _fit(tmp_path, Diverging(bad_batch=4), guard, max_steps=5, log_every_n_steps=50)
    with pytest.raises(NonFiniteLossError, match="step 5"):
        trainer.save_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "last.ckpt").exists()


def test_another_rank_s_error_stops_this_rank_too(tmp_path, monkeypatch):
    monkeypatch.setattr("ldm_train.callbacks.guards.all_reduce_sum", lambda value: value + torch.ones_like(value))
    with pytest.raises(NonFiniteLossError, match="1 other rank"):
        _fit(tmp_path, ToyStage(), NonFiniteGuard())
