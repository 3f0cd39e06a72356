"""What the ranks of a run are compared by."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import pytest
from torch.utils.data import DataLoader

import ldm_train
from ldm_train.callbacks import ranks
from ldm_train.roll_call import RanksDifferError
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, batch_of, trainer_of


def test_code_is_the_same_wherever_it_lies_and_another_with_one_more_space(tmp_path):
    package = Path(ldm_train.__file__).parent
    shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    assert ranks.code_digest(tmp_path / "copy") == ranks.code_digest(package)
    module = tmp_path / "copy/nn/unet.py"
    module.write_text(module.read_text() + " ")
    assert ranks.code_digest(tmp_path / "copy") != ranks.code_digest(package)


def test_the_comparison_of_ranks_asks_no_git(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was asked"))
    facts = ranks._facts(SimpleNamespace(datamodule=None, world_size=2), {"seed": 1})
    assert facts["the code"] == ranks.code_digest(Path(ldm_train.__file__).parent)


@pytest.mark.parametrize(
    ("words", "is_told"),
    [("unbound_buffer.cc:78] Timed out waiting 3000ms for recv operation to complete", True),
     ("Application timeout caused pair closure", True),
     ("wait timeout after 3000ms, keys: /default_pg/0//x", True),
     ("Connection closed by peer [127.0.0.1]:4242", False)],
)  # fmt: skip
def test_a_rank_that_has_waited_in_vain_tells_the_job_s_script(tmp_path, monkeypatch, words, is_told):
    """All ranks may answer: one only was slow."""
    monkeypatch.setenv("LDM_START_FILE", str(tmp_path / "17"))
    watch = ranks.RankWatch({})
    watch._pulse = SimpleNamespace(report=lambda: None, silent=[], stop=lambda reason: None)
    watch.on_exception(SimpleNamespace(world_size=2), None, RuntimeError(words))
    assert (tmp_path / "17.lost").exists() is is_told


class WithoutOthers(ranks.RankWatch):
    """Stays, but compares nothing."""

    _store = None

    def setup(self, *_, **__):
        pass


def test_one_process_is_not_watched_and_the_other_callbacks_miss_nothing(tmp_path):
    """It leaves the list while Lightning goes through it."""

    class Notes(L.Callback):
        def __init__(self):
            self.hooks = []

        def setup(self, *_, **__):
            self.hooks.append("setup")

        def on_train_start(self, *_):
            self.hooks.append("start")

    before, after = Notes(), Notes()
    trainer = trainer_of(tmp_path, [before, ranks.RankWatch({}), after])
    trainer.fit(ToyStage(), ToyData())
    assert before.hooks == after.hooks == ["setup", "start"]
    assert not any(isinstance(callback, ranks.RankWatch) for callback in trainer.callbacks)


def test_the_place_is_told_without_a_word_of_any_step(tmp_path):
    """From the counts of the loops, at any hook."""
    watch, told, waiting = WithoutOthers({}), [], []

    class Look(L.Callback):
        def _look(self, trainer, *_, **__):
            told.append(watch._place(trainer))

        on_fit_start = on_train_batch_start = on_train_batch_end = on_train_end = _look
        on_validation_start = on_validation_batch_start = on_validation_end = _look

        def on_before_zero_grad(self, trainer, *_):
            self._look(trainer)

    class Waiting(ToyData):
        def train_dataloader(self):
            def collate(indices):
                waiting.append(watch._place(trainer))
                return batch_of(indices)

            return DataLoader(range(NUM_IMAGES), batch_size=4, collate_fn=collate)

    trainer = trainer_of(tmp_path, [watch, Look()], max_epochs=2, max_steps=-1, limit_train_batches=2,
                         limit_val_batches=2, check_val_every_n_epoch=2)  # fmt: skip
    trainer.fit(ToyStage(), Waiting())
    assert {"the start", "after batch 0 of epoch 0", "the start of epoch 1", "after batch 0 of epoch 1"} <= {*waiting}
    parts = ("the beginning of ", "", "the end of ")
    steps = [f"{part}batch {b} of epoch {e}" for e in range(2) for b in range(2) for part in parts]
    validation = ["the start of a validation", "validation batch 0", "validation batch 1"]
    last = ["after the validation at step 4", "the closing work after step 4"]
    assert told == ["the start", *steps, *validation, *last]


@pytest.mark.parametrize(("world", "told"), [(1, False), (2, True)])
@pytest.mark.parametrize(
    "error", [RuntimeError("Timed out waiting 6000ms"), RanksDifferError("nothing was heard of rank 1 within 6 s")]
)
def test_a_time_out_before_the_ranks_were_compared_is_told_too(tmp_path, monkeypatch, world, told, error):
    monkeypatch.setenv("LDM_START_FILE", str(tmp_path / "17"))
    ranks.RankWatch({}).on_exception(SimpleNamespace(world_size=world), None, error)
    assert (tmp_path / "17.lost").exists() is told
