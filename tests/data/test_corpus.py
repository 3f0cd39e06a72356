"""Several data sets and several shapes, from the config's words to the batches of a run."""

import json
import math
import warnings
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


def never_trained(datamodule, steps=2):
    """What a run says that it never trains: in the table, and aloud."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        fit(datamodule, steps)
        named = datamodule.summary().get("shapes never trained")
    return named, [str(warning.message) for warning in heard if "never trained" in str(warning.message)]


@pytest.fixture
def uneven(tmp_path):
    """31 squares, and 30 images of each of two other shapes, where a shape needs 31."""
    shards = [pictures(tmp_path / "uneven" / "0.tar", 90), pictures(tmp_path / "uneven" / "1.tar", 1)]
    return ImageTextDataModule(shards, 16, 1, 3, buckets=AspectBuckets(4, 2.0), bucket_unit=31)


def test_shapes_of_too_few_images_are_named_and_counted(bucketed, uneven):
    assert never_trained(bucketed()) == (None, [])
    named, (line,) = never_trained(uneven)  # said once a run
    assert named == "12x20 (30), 20x12 (30): fewer than data.bucket_unit"
    assert line.startswith("60 images of 2 shapes are never trained: 12x20 (30), 20x12 (30). A shape needs 31 images")
    assert "lower `data.bucket_unit`" in line
    assert "`data.buckets`" in line


def test_shapes_of_too_few_images_of_a_data_set_in_a_mixture_are_named_and_counted(tmp_path):
    counts = {"small": 7, "large": 60}  # of three shapes: 2, 3 and 2 images, and 20 of each
    mixture = {
        name: {"shards": pictures(tmp_path / name / "0.tar", count), "weight": 1} for name, count in counts.items()
    }
    options = {"mixture": mixture, "buckets": AspectBuckets(4, 2.0)}
    datamodule = ImageTextDataModule(None, 16, 3, 3, **options, bucket_unit=3)
    named, (line,) = never_trained(datamodule)
    small, large = datamodule.corpus.order.sources
    assert not large.starved
    assert small.starved
    assert named == "small 12x20 (2), small 20x12 (2): fewer than data.bucket_unit"
    assert line.startswith("4 images of 2 shapes are never trained: small 12x20 (2), small 20x12 (2). A shape needs 3 ")
    assert datamodule.summary()["images waiting per epoch"] == small.waiting + large.waiting


def test_another_process_than_the_first_says_nothing(uneven, monkeypatch):
    monkeypatch.setattr("ldm_train.distributed.global_rank", lambda: 1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert uneven.corpus.order.starved


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
