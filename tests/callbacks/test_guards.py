import pytest
import torch
from torch.utils.data import DataLoader

from ldm_train.callbacks import NonFiniteGuard, NonFiniteLossError
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, batch_of, trainer_of


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


class BrokenPixels(ToyData):
    """Single pixels of samples 9 and 11, in the third batch, are no numbers."""

    def train_dataloader(self):
        def collate(indices):
            batch = batch_of(indices)
            for sample, value in ((9, float("nan")), (11, float("-inf"))):
                batch["image"][batch["sample_id"] == sample, 1, 2, 3] = value
            return batch

        return DataLoader(range(NUM_IMAGES), batch_size=4, collate_fn=collate)


class Unmoved(ToyStage):
    """Its loss does not see the pixels."""

    def training_step(self, batch, batch_idx):
        return self.colours(batch["sample_id"]).square().mean()


@pytest.mark.parametrize("stage", [ToyStage, Unmoved])
def test_samples_with_broken_pixels_are_named_alone_whatever_the_loss(tmp_path, stage):
    trainer = trainer_of(tmp_path, [NonFiniteGuard()], limit_val_batches=0)
    with pytest.raises(NonFiniteLossError) as error:
        trainer.fit(stage(), BrokenPixels())
    message = str(error.value)
    assert "pixels that are NaN or infinite at step 3" in message
    assert "in the samples 00000/0009, 00000/0011. Allowed are finite pixels" in message
    assert "`data.filters`" in message


def test_many_keys_are_counted(tmp_path):
    class Wide(ToyData):
        def train_dataloader(self):
            return DataLoader(range(NUM_IMAGES), batch_size=12, collate_fn=batch_of)

    with pytest.raises(NonFiniteLossError, match=r"00000/0007 and 4 more\. Allowed"):
        trainer_of(tmp_path, [NonFiniteGuard()], limit_val_batches=0).fit(Diverging(bad_batch=0), Wide())
