import hydra
import pytest
import torch

from ldm_train.conditioning import LabelConditioner

from ..conftest import composed
from .toy import NUM_CLASSES, batch


@pytest.mark.parametrize("way", ["context", "vector"])
def test_a_label_is_its_row_and_no_label_the_last(way):
    conditioner = LabelConditioner(NUM_CLASSES, **{f"{way}_dim": 8})
    drop = torch.tensor([False, True, False, False])
    given = conditioner(batch(), None, drop)
    rows = conditioner.embedding.weight[[3, NUM_CLASSES, 4, 3]]
    assert torch.equal(getattr(given, way), rows[:, None] if way == "context" else rows)
    assert [entry is None for entry in given] == [name != way for name in given._fields]


def test_every_row_learns_from_its_own_examples():
    conditioner = LabelConditioner(NUM_CLASSES, vector_dim=8)
    drop = torch.tensor([False, True, False, False])
    conditioner(batch(), None, drop).vector.sum().backward()
    assert conditioner.embedding.weight.grad[:, 0].tolist() == [0, 0, 0, 2, 1, 1]


def test_people_read_the_class():
    said = LabelConditioner(NUM_CLASSES, vector_dim=8).describe(batch())
    assert [len(set(said)), said[0] == said[3], "4" in said[2]] == [3, True, True]


def test_the_published_one_has_its_published_shape():
    with torch.device("meta"):
        conditioner = hydra.utils.instantiate(composed("conditioner=label").conditioner)
    assert conditioner.embedding.weight.shape == (1001, 512)


def test_a_batch_without_labels_is_refused():
    unlabelled = {name: value for name, value in batch().items() if name != "label"}
    with pytest.raises(ValueError, match=r"has no `label`; allowed is data .*; change `data.label`"):
        LabelConditioner(NUM_CLASSES, vector_dim=8)(unlabelled, None)


@pytest.mark.parametrize("label", [-1, NUM_CLASSES, 99])
def test_a_label_that_is_no_class_is_refused(label):
    strange = batch() | {"label": torch.tensor([0, 1, label, 0])}
    message = rf"a label is {label}; allowed are 0 to 4; change `conditioner.num_classes` or `data.label`"
    with pytest.raises(ValueError, match=message):
        LabelConditioner(NUM_CLASSES, vector_dim=8)(strange, None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "context_dim is None and vector_dim is None; .* change `conditioner.context_dim` or"),
        ({"context_dim": 8, "vector_dim": 4}, "context_dim is 8 and vector_dim is 4; .*`conditioner.vector_dim`"),
        ({"num_classes": 0, "vector_dim": 4}, "num_classes is 0; allowed are .*; change `conditioner.num_classes`"),
    ],
)
def test_impossible_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        LabelConditioner(**({"num_classes": NUM_CLASSES} | arguments))
