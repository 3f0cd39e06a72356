from types import SimpleNamespace

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from ldm_train.callbacks import EMACallback, evaluation_weights
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, batch_of, trainer_of


class Record(L.Callback):
    """The raw weights after each batch, and what is saved at some moments."""

    def __init__(self, path=None):
        self.raw, self.path, self.fail = [], path, False

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.raw.append((trainer.global_step, pl_module.colours.weight.detach().clone()))

    def on_validation_batch_end(self, trainer, pl_module, *_):
        if self.path is not None:
            trainer.save_checkpoint(self.path)
            trainer.save_checkpoint(f"{self.path}.weights", weights_only=True)
        if self.fail:
            raise KeyError("broken validation")


def _closed_form(weights, decay):
    average = torch.zeros_like(weights[0])
    for n, weight in enumerate(weights):
        d = min(decay, (1 + n) / (10 + n))
        average = d * average + (1 - d) * weight
    return average


@pytest.mark.parametrize("accumulate", [1, 3])
def test_one_update_per_optimizer_step_whatever_the_accumulation(tmp_path, accumulate):
    record, ema = Record(), EMACallback(decay=0.5)
    trainer = trainer_of(tmp_path, [record, ema], accumulate_grad_batches=accumulate, max_steps=4, limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData())
    steps = dict(reversed(record.raw))  # the first batch that ended each step
    steps.pop(0, None)
    assert sorted(steps) == [1, 2, 3, 4]
    assert ema.average.num_updates == 4
    expected = _closed_form([steps[step] for step in sorted(steps)], 0.5)
    torch.testing.assert_close(ema.average.average["colours.weight"], expected)
    assert set(ema.average.average) == {"colours.weight"}  # the frozen part is not copied


def test_half_life_counts_the_images_of_an_accumulated_step(tmp_path):
    ema = EMACallback(decay=None, half_life_images=1)
    trainer = trainer_of(tmp_path, [ema], accumulate_grad_batches=2, max_steps=1, limit_val_batches=0)
    stage = ToyStage()
    trainer.fit(stage, ToyData())
    # 8 images, half-life of 1: d = 2^-8, far below the warm-up's 0.1
    torch.testing.assert_close(ema.average.average["colours.weight"], (1 - 2**-8) * stage.colours.weight.detach())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_life_counts_the_images_of_all_processes(accumulate):
    """Twice the processes with half the batch each make the same average."""
    averages = []
    for world_size in (1, 2, 4):
        stage, ema = ToyStage(), EMACallback(decay=None, half_life_images=4)
        trainer = SimpleNamespace(world_size=world_size, global_step=0)
        ema.on_fit_start(trainer, stage)
        ema.on_train_start(trainer, stage)
        for batch_idx in range(3 * accumulate):
            torch.nn.init.constant_(stage.colours.weight, float(batch_idx + 1))
            trainer.global_step = (batch_idx + 1) // accumulate
            ema.on_train_batch_end(trainer, stage, None, batch_of(range(16 // world_size)), batch_idx)
        averages.append(float(ema.average.average["colours.weight"][0, 0]))
    decay, expected = 2 ** (-16 * accumulate / 4), 0.0
    for step in (1, 2, 3):
        expected = decay * expected + (1 - decay) * step * accumulate
    assert averages == pytest.approx([expected] * 3)


def test_validation_sees_the_averages_and_leaves_the_raw_weights_bit_equal(tmp_path):
    record, ema, stage = Record(), EMACallback(decay=0.9), ToyStage()
    trainer_of(tmp_path, [ema, record], val_check_interval=3, num_sanity_val_steps=1).fit(stage, ToyData())
    without = ToyStage()
    trainer_of(tmp_path, [], limit_val_batches=0).fit(without, ToyData())
    assert torch.equal(stage.colours.weight, without.colours.weight)

    weights = [weight for _, weight in record.raw]
    torch.testing.assert_close(stage.seen[0], torch.zeros_like(weights[0]))  # the sanity check, before training
    torch.testing.assert_close(stage.seen[1], _closed_form(weights[:3], 0.9))
    torch.testing.assert_close(stage.seen[-1], _closed_form(weights, 0.9))
    assert not torch.equal(stage.seen[-1], weights[-1])


def test_a_broken_validation_gives_the_raw_weights_back(tmp_path):
    record, stage = Record(), ToyStage()
    record.fail = True
    with pytest.raises(KeyError, match="broken validation"):
        trainer_of(tmp_path, [EMACallback(decay=0.9), record], val_check_interval=3).fit(stage, ToyData())
    assert torch.equal(stage.colours.weight, record.raw[-1][1])


def test_a_checkpoint_saved_while_swapped_holds_raw_and_averaged_weights(tmp_path):
    record, stage, ema = Record(tmp_path / "swapped.ckpt"), ToyStage(), EMACallback(decay=0.9)
    trainer_of(tmp_path, [ema, record], val_check_interval=6).fit(stage, ToyData())
    for name in ("swapped.ckpt", "swapped.ckpt.weights"):
        saved = torch.load(tmp_path / name, weights_only=True)
        assert torch.equal(saved["state_dict"]["colours.weight"], record.raw[-1][1]), name
    saved = torch.load(tmp_path / "swapped.ckpt", weights_only=True)
    assert torch.equal(saved["ema"]["average"]["colours.weight"], ema.average.average["colours.weight"])


def test_an_average_on_the_host_is_the_same_and_refuses_other_places(tmp_path):
    averages = []
    for device in (None, "cpu"):
        ema = EMACallback(decay=0.9, device=device)
        trainer_of(tmp_path, [ema], limit_val_batches=0).fit(ToyStage(), ToyData())
        assert ema.average.device == device
        averages.append(ema.average.average["colours.weight"])
    assert torch.equal(*averages)
    with pytest.raises(ValueError, match=r"change `callbacks\.ema\.device`"):
        trainer_of(tmp_path, [EMACallback(device="elsewhere")]).fit(ToyStage(), ToyData())


class OneBatch(ToyData):
    """The same batch at every step: the toy's loader knows no position to resume from."""

    def train_dataloader(self):
        return DataLoader(range(6), batch_size=1, collate_fn=lambda _: batch_of(range(NUM_IMAGES)))


def test_a_resumed_run_ends_like_an_unbroken_one(tmp_path):
    whole, first, second = (EMACallback(decay=0.9) for _ in range(3))
    trainer_of(tmp_path, [whole], max_steps=12, limit_val_batches=0).fit(ToyStage(), OneBatch())

    trainer = trainer_of(tmp_path, [first], limit_val_batches=0)
    trainer.fit(ToyStage(), OneBatch())
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed = trainer_of(tmp_path, [second], max_steps=12, limit_val_batches=0)
    resumed.fit(ToyStage(), OneBatch(), ckpt_path=tmp_path / "half.ckpt")
    assert second.average.num_updates == whole.average.num_updates == 12
    assert torch.equal(second.average.average["colours.weight"], whole.average.average["colours.weight"])


def test_validate_judges_the_checkpoint_s_averages(tmp_path):
    ema = EMACallback(decay=0.9)
    trainer = trainer_of(tmp_path, [ema], limit_val_batches=0)
    trainer.fit(ToyStage(), ToyData())
    trainer.save_checkpoint(tmp_path / "last.ckpt")

    stage = ToyStage()
    trainer_of(tmp_path, [EMACallback(decay=0.9)]).validate(stage, ToyData(), ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(stage.seen[0], ema.average.average["colours.weight"])


def test_evaluation_weights_restore_weights_and_the_mode_of_every_submodule(tmp_path):
    ema, stage = EMACallback(decay=0.9), ToyStage()
    trainer = trainer_of(tmp_path, [ema], limit_val_batches=0)
    trainer.fit(stage, ToyData())
    stage.train()
    stage.frozen.eval()
    raw = stage.colours.weight.detach().clone()
    with evaluation_weights(trainer, stage), evaluation_weights(trainer, stage):
        assert torch.equal(stage.colours.weight, ema.average.average["colours.weight"])
        assert not stage.training
        assert not torch.is_grad_enabled()
    assert torch.equal(stage.colours.weight, raw)
    assert (stage.training, stage.colours.training, stage.frozen.training) == (True, True, False)
