"""Stop after any batch, go on from the last checkpoint: what is trained is the unbroken sequence.

`test_datamodule` stops at every checkpoint and changes batch size and ranks; here the checkpoint is older than the
stop, gradients are accumulated, and everything is stopped again at once.
"""

import lightning as L
import pytest
import torch

from ldm_train.data import AspectBuckets, ImageTextDataModule
from tests.data.test_corpus import pictures
from tests.data.test_datamodule import RankRecorder, Recorder, SaveAt, fit


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


SHAPES = {"image_size": 16, "buckets": AspectBuckets(4, 2.0), "bucket_unit": 12}


@pytest.fixture(params=[{}, SHAPES], ids=["squares", "shapes"])
def mixed(tmp_path, request):
    """A mixture whose small data set comes again and again within an epoch; global batches of 1, 2, 3, 4, 6 and 12."""
    counts = {"small": (40, 2), "large": (150, 3)}
    mixture = {
        name: {"shards": pictures(tmp_path / name / "0.tar", count), "weight": weight}
        for name, (count, weight) in counts.items()
    }
    options = {"image_size": 8, "seed": 3, "mixture": mixture, "mixture_length": 120, **request.param}
    return lambda **changes: ImageTextDataModule(None, **options | changes)


def trained(make, folder, images, batch, ranks=1, workers=0, resume=None):
    """(epoch, id) of each image that is trained up to `images`, in the order of the mixture; saves at every step."""
    folder.mkdir()
    module = RankRecorder(folder)
    options = {"devices": ranks, "strategy": "ddp_fork"} if ranks > 1 else {}
    datamodule = make(batch_size=batch, num_workers=workers)
    fit(datamodule, 10_000, resume, [SaveAt(folder, "on_train_batch_end"), StopAt(images)], module, **options)
    seen = [torch.load(folder / f"rank{rank}.pt", weights_only=True)[0] for rank in range(ranks)]
    return [
        (epoch, sample)
        for parts in zip(*seen, strict=True)
        for (epoch, *_), samples in [(parts[0], [part[1:] for part in parts])]
        for together in zip(*samples, strict=True)  # rank r has the places r, r + R, ...
        for sample in together
    ]


class StopAt(L.Callback):
    """Stops when so many images of this run are trained."""

    def __init__(self, images):
        self.images, self.trained = images, 0

    def on_train_batch_end(self, trainer, module, outputs, batch, index):
        self.trained += len(batch["sample_id"]) * trainer.world_size
        trainer.should_stop = self.trained >= self.images


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("before", "after"),  # images a process and step, processes, workers
    [((2, 2, 0), (2, 1, 2)), ((3, 1, 2), (1, 2, 1)), pytest.param((1, 1, 0), (2, 3, 0), marks=pytest.mark.thorough)],
)
def test_a_mixture_is_one_sequence_whatever_the_processes_and_workers_before_and_after(mixed, tmp_path, before, after):
    straight = trained(mixed, tmp_path / "straight", 360, 1)
    assert [epoch for epoch, _ in straight] == [0] * 120 + [1] * 120 + [2] * 120
    assert len(set(straight)) == 360
    first = trained(mixed, tmp_path / "first", 216, *before)
    assert first == straight[:216]
    size = before[0] * before[1]
    for step in (48 // size, 120 // size, 204 // size):  # in an epoch, at its end, in the next
        behind = step * size
        resumed = trained(mixed, tmp_path / f"from{step}", 96, *after, resume=tmp_path / "first" / f"{step}.ckpt")
        assert resumed == straight[behind : behind + 96], behind
