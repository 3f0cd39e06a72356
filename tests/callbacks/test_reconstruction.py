import logging
import multiprocessing as mp

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from ldm_train.callbacks import ReconstructionFrechet, ReconstructionGrid
from ldm_train.metrics import FeatureExtractor, FrechetDistance, RandomConvFeatures
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, batch_of, trainer_of
from tests.ranks import run_ranks

KEY = "val/rfid_randomconv"


class Reconstructing(ToyStage):
    """Makes the images darker, and each validation darker still."""

    def __init__(self):
        super().__init__()
        self.validations = 0

    def reconstruct(self, image):
        return image * 0.8**self.validations - 0.1

    def on_validation_epoch_start(self):
        if not self.trainer.sanity_checking:
            self.validations += 1


class Few(ToyData):
    """A validation set of one image."""

    def val_dataloader(self):
        return DataLoader([0], batch_size=4, collate_fn=batch_of)


def _expected(validations):
    """The distance without the callback."""
    image, distance = batch_of(range(NUM_IMAGES))["image"], FrechetDistance(RandomConvFeatures())
    distance.update(image, real=True)
    distance.update(image * 0.8**validations - 0.1, real=False)
    return distance.compute().item()


class Figures(L.Callback):
    """What was logged by each validation; to be listed after the callback that logs."""

    def __init__(self):
        self.seen = []

    def on_validation_end(self, trainer, pl_module):
        if not trainer.sanity_checking:
            self.seen.append(trainer.callback_metrics[KEY].item())


def test_each_validation_is_measured_against_the_same_images(tmp_path):
    callback, figures = ReconstructionFrechet(RandomConvFeatures()), Figures()
    images_measured = []
    update = callback.distance.update
    callback.distance.update = lambda images, real: images_measured.append(real) or update(images, real=real)
    # The sanity check shows two batches of six: their statistics must not be taken for those of the set.
    trainer = trainer_of(tmp_path, [callback, figures], val_check_interval=2, num_sanity_val_steps=2)
    trainer.fit(Reconstructing(), ToyData())
    assert figures.seen == pytest.approx([_expected(1), _expected(2), _expected(3)], rel=1e-4)
    assert figures.seen[0] < figures.seen[1] < figures.seen[2]
    assert (images_measured.count(True), images_measured.count(False)) == (6, 18)


def test_perfect_reconstructions_have_no_distance(tmp_path):
    class Perfect(Reconstructing):
        def reconstruct(self, image):
            return image

    callback = ReconstructionFrechet(RandomConvFeatures())
    trainer = trainer_of(tmp_path, [callback])
    trainer.validate(Perfect(), ToyData())
    assert trainer.callback_metrics[KEY].item() == pytest.approx(0.0, abs=1e-5)


def test_the_inception_distance_alone_has_the_name_of_the_literature():
    class Inception(FeatureExtractor):
        name, num_features, fingerprint = "inception", 3, ""

        def features(self, images):
            return images.float().mean(dim=(2, 3))

    assert ReconstructionFrechet(Inception()).key == "val/rfid"
    assert ReconstructionFrechet(RandomConvFeatures()).key == KEY


def test_a_single_image_is_left_out_with_a_word(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, logger="ldm_train.callbacks.reconstruction"):
        trainer = trainer_of(tmp_path, [ReconstructionFrechet(RandomConvFeatures())])
        trainer.validate(Reconstructing(), Few())
    assert KEY not in trainer.callback_metrics
    (record,) = (r for r in caplog.records if r.name == "ldm_train.callbacks.reconstruction")
    assert "found 1 validation images; allowed are 2 or more; change `data.val_fraction`" in record.getMessage()


def _one_rank(rank, directory, world, shared):
    torch.distributed.init_process_group("gloo", init_method=f"file://{directory}/store", rank=rank, world_size=world)
    callback, stage = ReconstructionFrechet(RandomConvFeatures()), Reconstructing()
    logged = {}
    stage.log = lambda key, value, **_: logged.update({key: value.item()})
    trainer = trainer_of(directory, [callback])
    for _ in range(2):
        stage.validations += 1
        callback.on_validation_start(trainer, stage)
        for first in range(4 * rank, NUM_IMAGES, 4 * world):
            batch = batch_of(range(first, first + 4))
            callback.on_validation_batch_end(trainer, stage, stage.reconstruct(batch["image"]), batch, 0)
        callback.on_validation_epoch_end(trainer, stage)
    shared[rank] = logged[KEY]
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
@pytest.mark.slow
def test_two_ranks_measure_what_one_does(tmp_path):
    with mp.Manager() as manager:
        shared = manager.dict()
        run_ranks(_one_rank, tmp_path, 2, shared)
        assert [shared[0], shared[1]] == pytest.approx([_expected(2)] * 2, rel=1e-5)


def test_the_grid_shows_what_the_validation_made(tmp_path):
    """Nothing is decoded again: a stage that cannot do so has its sheet, of the first images in their order."""

    class Once(Reconstructing):
        def validation_step(self, batch, batch_idx):
            reds = torch.full_like(batch["image"], -1.0)
            reds[:, 0] = self.red(batch["sample_id"].float())[:, None, None]
            return reds

        def red(self, sample):
            return 0.9 - 0.05 * sample

    trainer = trainer_of(tmp_path, [ReconstructionGrid(str(tmp_path), num_images=6)])
    trainer.validate(Once(), ToyData())
    with Image.open(tmp_path / "reconstructions" / "step_0000000.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB")).reshape(-1, 3)
    colours = {tuple(pixel) for pixel in np.unique(pixels, axis=0).tolist()}
    bytes_of_red = [round((Once().red(sample) + 1) * 127.5) for sample in range(8)]
    assert [(red, 0, 0) in colours for red in bytes_of_red] == [True] * 6 + [False] * 2
