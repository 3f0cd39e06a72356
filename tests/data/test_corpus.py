"""Several data sets and several shapes, from the config's words to the batches of a run."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch

from ldm_train.data import AspectBuckets, ImageTextDataModule
from ldm_train.data.corpus import CorpusOptions
from tests.data.conftest import encode, write_tar
from tests.data.test_datamodule import Recorder, SaveAt, fit

SIZES = [(8, 8), (16, 8), (8, 16), (9, 8), (24, 12), (8, 15)]


def pictures(path, count, first=0):
    """A shard of images of several sizes, whose colour says which sample it is."""
    members = []
    for number in range(first, first + count):
        height, width = SIZES[number % len(SIZES)]
        pixels = np.full((height, width, 3), (number % 256, number // 256, 7), dtype=np.uint8)
        members += [(f"{number:06d}.png", encode(pixels)), (f"{number:06d}.txt", f"caption {number}".encode())]
        members += [(f"{number:06d}.json", json.dumps({"number": number}).encode())]
    return str(write_tar(path, members))


@pytest.fixture
def bucketed(tmp_path):
    def make(**changes):
        shards = [pictures(tmp_path / "shapes" / f"{i}.tar", 30, 30 * i) for i in range(3)]
        options = {"image_size": 16, "batch_size": 2, "seed": 3, "buckets": AspectBuckets(4, 2.0), "bucket_unit": 4}
        return ImageTextDataModule(shards, **options | changes)

    return make


@pytest.fixture
def mixed(tmp_path):
    def make(**changes):
        small, large = (pictures(tmp_path / name / "0.tar", count) for name, count in (("small", 6), ("large", 40)))
        mixture = {"small": {"shards": small, "weight": 1}, "large": {"shards": large, "weight": 3}}
        return ImageTextDataModule(None, 8, 2, 3, **{"mixture": mixture} | changes)

    return make


class Shapes(Recorder):
    """Also remembers the shape of each batch."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def training_step(self, batch, batch_idx):
        self.shapes.append(tuple(batch["image"].shape[-2:]))
        return super().training_step(batch, batch_idx)


def test_every_batch_has_one_of_the_shapes_and_all_come(bucketed):
    datamodule, module = bucketed(), Shapes()
    seen = fit(datamodule, len(datamodule.corpus.order) // 2, module=module)
    assert set(module.shapes) <= set(datamodule.corpus.shapes)
    assert len(set(module.shapes)) > 1
    ids = [sample for _, *batch in seen for sample in batch]
    assert len(set(ids)) == len(ids)
    assert len(ids) + datamodule.corpus.order.waiting == 90
    facts = datamodule.summary()
    assert facts["images waiting per epoch"] == datamodule.corpus.order.waiting
    assert facts["batches per epoch"] == len(module.shapes)


@pytest.mark.parametrize("workers", [0, 2])
def test_shapes_go_on_where_they_stopped_with_another_batch_size(bucketed, tmp_path, workers):
    straight = fit(bucketed(num_workers=workers), 12)
    fit(bucketed(), 6, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    resumed = fit(bucketed(batch_size=4, num_workers=workers), 9, resume=tmp_path / "6.ckpt")
    flat = [sample for _, *batch in straight for sample in batch]
    assert [sample for _, *batch in resumed for sample in batch] == flat[12:]


def test_validation_shows_every_image_once_in_its_shape(bucketed):
    datamodule = bucketed(val_fraction=0.4)
    datamodule.setup("fit")
    shapes, keys = set(), []
    for batch in datamodule.val_dataloader():
        shapes.add(tuple(batch["image"].shape[-2:]))
        keys += batch["key"]
    assert len(shapes) > 1
    assert len(keys) == len(set(keys)) == len(datamodule.val_index)


def test_a_checkpoint_of_other_shapes_is_refused(bucketed, tmp_path):
    fit(bucketed(), 3, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    for changes in ({"bucket_unit": 8}, {"buckets": None, "bucket_unit": 0}, {"buckets": AspectBuckets(4, 1.5)}):
        with pytest.raises(ValueError, match=r"in another order \(.*bucket.*data.bucket"):
            fit(bucketed(**changes), 5, resume=tmp_path / "3.ckpt")


def test_a_mixture_has_its_shares_and_each_visit_its_own_noise(mixed):
    datamodule = mixed(mixture_length=4096)
    seen = fit(datamodule, 1024)
    ids = torch.tensor([sample for _, *batch in seen for sample in batch])
    rows = ids & ((1 << 40) - 1)
    share = float((rows < 6).float().mean())
    assert share == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 2048))
    assert len(set(ids.tolist())) == len(ids)  # keys of noise: no visit has another one's
    visits = Counter(rows.tolist())
    small = [visits[row] for row in range(6)]
    assert max(small) - min(small) <= 1  # each goes through its own permutation before it repeats


def test_a_mixture_goes_on_where_it_stopped(mixed, tmp_path):
    straight = fit(mixed(), 30)
    fit(mixed(), 13, callbacks=[SaveAt(tmp_path, "on_train_batch_end")])
    assert fit(mixed(num_workers=2), 30, resume=tmp_path / "13.ckpt") == straight[13:]
    with pytest.raises(ValueError, match="mixture"):
        fit(mixed(mixture_length=20), 30, resume=tmp_path / "13.ckpt")


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({}, "data.shards"),
        ({"shards": "a", "mixture": {}}, "data.shards"),
        ({"mixture": {"a": {"shards": "a"}}}, "data.mixture.a"),
        ({"mixture": {"a": {"shards": "a", "weight": 1, "wait": 2}}}, "data.mixture.a"),
        ({"mixture": {}, "limit": 3}, "data.limit"),
        ({"shards": "a", "mixture_length": 3}, "data.mixture_length"),
        ({"shards": "a", "bucket_unit": 4}, "data.bucket_unit"),
        ({"shards": "a", "buckets": AspectBuckets()}, "data.bucket_unit"),
        ({"shards": "a", "index_workers": -1}, "data.index_workers"),
    ],
)
def test_contradictions_are_refused_in_three_parts(options, key):
    with pytest.raises(ValueError, match=rf"`{key}` is .*; it must be"):
        CorpusOptions(seed=0, **options)


def test_a_batch_that_would_hold_two_shapes_is_refused(bucketed):
    with pytest.raises(ValueError, match=r"Allowed are .* change `data.batch_size` or `data.bucket_unit`"):
        fit(bucketed(batch_size=3), 2)


def test_an_index_that_is_kept_gives_the_same_batches(tmp_path):
    shards = [pictures(tmp_path / "kept" / f"{i}.tar", 12, 12 * i) for i in range(2)]
    plain, kept, again = (
        fit(ImageTextDataModule(shards, 8, 2, 3, val_fraction=0.2, index_dir=folder), 8)
        for folder in (None, str(tmp_path / "index"), str(tmp_path / "index"))
    )
    assert plain == kept == again
