"""Stop after any batch, go on from the last checkpoint: what is trained is the unbroken sequence.

`test_datamodule` stops at every checkpoint and changes batch size and ranks; here the checkpoint is older than the
stop, gradients are accumulated, and everything is stopped again at once.
"""

import lightning as L
import pytest

from ldm_train.data import ImageTextDataModule
from tests.data.test_datamodule import Recorder, fit


class PowerError(Exception):
    """What stops a run from outside."""


class Saver(L.Callback):
    """Saves after every so many batches, and stops the run after one of them.

    Args:
        folder: holds `<batches behind>.ckpt`.
        behind: batches trained before this run.
        every: batches between checkpoints.
        stop: batches behind when the power fails.
    """

    def __init__(self, folder, behind=0, every=1, stop=None):
        self.folder, self.behind, self.every, self.stop = folder, behind, every, stop

    def on_train_batch_end(self, trainer, module, *_):
        trained = self.behind + len(module.seen)
        if trained % self.every == 0:
            trainer.save_checkpoint(self.folder / f"{trained}.ckpt")
        if trained == self.stop:
            raise PowerError


@pytest.fixture
def make(write_shards):
    shards = write_shards(4, 5, 2)  # eleven samples: an epoch of five batches leaves one over

    def build(**options):
        return ImageTextDataModule(shards, **{"image_size": 8, "batch_size": 2, "seed": 3, **options})

    return build


def stopped(datamodule, steps, saver, resume, **options):
    """What is trained until the power fails."""
    module = Recorder()
    with pytest.raises(PowerError):
        fit(datamodule, steps, resume, [saver], module, **options)
    return module.seen


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_steps_since_the_last_checkpoint_are_repeated_alike_twice_in_a_row(make, tmp_path, workers):
    every, steps = 3, 12
    straight = fit(make(), steps)
    for stop in range(1, steps):
        folder = tmp_path / str(stop)
        folder.mkdir()
        first = stopped(make(num_workers=workers), steps, Saver(folder, every=every, stop=stop), None)
        assert first == straight[:stop]
        behind = stop // every * every
        saved = folder / f"{behind}.ckpt" if behind else None
        again = min(stop + 2, steps - 1)  # soon after it has gone on
        second = stopped(make(num_workers=workers), steps, Saver(folder, behind, every, again), saved)
        assert second == straight[behind:again]
        behind = again // every * every
        saved = folder / f"{behind}.ckpt" if behind else None
        assert fit(make(num_workers=workers), steps, saved) == straight[behind:]


@pytest.mark.parametrize("options", [{}, {"limit_train_batches": 3}, {"val_check_interval": 2, "limit_val_batches": 1}])
def test_gradients_in_the_midst_of_accumulation_shift_no_batch(make, tmp_path, options):
    options = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 0, **options}
    make_it = lambda: make(val_shards=make().corpus.options.shards)  # noqa: E731
    straight = fit(make_it(), 7, callbacks=[Saver(tmp_path)], **options)
    assert len(straight) > 10
    for behind in range(1, len(straight)):
        assert fit(make_it(), 7, tmp_path / f"{behind}.ckpt", **options) == straight[behind:], behind
