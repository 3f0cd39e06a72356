"""Class labels: each sample has its own, and an unknown one is a bad sample that says what to do."""

import json

import pytest
import torch

from ldm_train.data import FieldLabel, ImageTextDataModule, TooManyBadSamplesError
from tests.data.conftest import sample, write_tar

OPTIONS = {"image_size": 8, "batch_size": 2, "seed": 3}


def test_classes_are_numbered_in_the_order_they_are_named():
    label = FieldLabel("kind", ["cat", "dog", 7])
    assert [label({"kind": kind}) for kind in ("cat", "dog", 7)] == [0, 1, 2]
    assert label.num_classes == 3
    counted = FieldLabel("kind", 5)
    assert [counted({"kind": kind}) for kind in range(5)] == list(range(counted.num_classes))


@pytest.mark.parametrize("value", ["bird", 5, -1, 1.0, True, None, [1]])
@pytest.mark.parametrize("classes", [["cat", "dog"], 5])
def test_other_values_are_no_classes(classes, value):
    with pytest.raises(ValueError, match=r"kind is .*, which is no class; .*`data.label.classes`.*`data.filters`"):
        FieldLabel("kind", classes)({"kind": value})


@pytest.mark.parametrize("classes", [[], 0, -3, ["cat", "cat"]])
def test_impossible_classes_are_refused(classes):
    with pytest.raises(ValueError, match=r"classes is .*; allowed are .*; change `data.label.classes`"):
        FieldLabel("kind", classes)


@pytest.mark.parametrize("options", [{}, {"cache_decoded": True}, {"num_workers": 1}])
def test_every_sample_has_its_own_label_and_the_same_order_as_without(write_shards, options):
    shards = write_shards(4, 5)
    plain = ImageTextDataModule(shards, **OPTIONS)
    labelled = ImageTextDataModule(shards, **OPTIONS, **options, label=FieldLabel("parity", [1, 0]))
    assert labelled.train_index.fingerprint == plain.train_index.fingerprint
    for _ in range(2):  # the second time from the cache
        for a, b in zip(labelled.train_dataloader(), plain.train_dataloader(), strict=True):
            assert torch.equal(a["sample_id"], b["sample_id"])
            assert torch.equal(a["label"], 1 - a["sample_id"] % 2)
            assert a["label"].dtype == torch.int64
            assert "label" not in b
            assert "segmentation" not in b


def test_an_unknown_label_is_a_bad_sample_and_a_misspelt_field_ends_the_run(tmp_path):
    members = [member for number in range(40) for member in sample(number, kind="dog" if number == 5 else "cat")]
    path = write_tar(tmp_path / "a.tar", members)
    options = OPTIONS | {"quarantine_dir": str(tmp_path / "quarantine"), "num_workers": 0}
    datamodule = ImageTextDataModule(str(path), **options, label=FieldLabel("kind", ["cat"]))
    batches = list(datamodule.train_dataloader())
    assert 5 not in torch.cat([batch["sample_id"] for batch in batches])
    (entry,) = map(json.loads, (tmp_path / "quarantine" / "training-rank0-worker0.jsonl").read_text().splitlines())
    assert entry["key"] == "a/000005"
    assert "kind is 'dog'" in entry["error"]
    misspelt = ImageTextDataModule(str(path), **options, label=FieldLabel("knid", ["cat"]))
    with pytest.raises(TooManyBadSamplesError, match=r"no metadata field 'knid', which `data.label.field` names"):
        next(iter(misspelt.train_dataloader()))


def test_samples_without_metadata_are_incomplete_where_labels_are_asked_for(tmp_path):
    image, _, caption = sample(1)
    path = write_tar(tmp_path / "a.tar", [*sample(0), image, caption])
    assert len(ImageTextDataModule(str(path), **OPTIONS).train_index) == 2
    labelled = ImageTextDataModule(str(path), **OPTIONS, label=FieldLabel("parity", 2)).train_index
    assert labelled.sample_id.tolist() == [0]
    assert "000001: no metadata" in labelled.damage[0].reason
