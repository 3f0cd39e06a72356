"""`SemanticMapConditioner` equals the published rescaling: one-hot maps halved bilinearly, then a 1 x 1 convolution."""

import pytest
import torch
from torch.nn import functional as F

from ldm_train.conditioning import SemanticMapConditioner
from tests.conditioning.images import Averages, assert_contract, batch_of

CLASSES = 7


def mapped(count=6, size=16, classes=CLASSES, void=False):
    generator = torch.Generator().manual_seed(1)
    maps = torch.randint(-1 if void else 0, classes, (count, size, size), generator=generator)
    return batch_of(count, size, segmentation=maps)


@pytest.fixture
def conditioner():
    torch.manual_seed(0)
    return SemanticMapConditioner(CLASSES, concat_channels=3)


def one_hot(batch):
    return (batch["segmentation"][:, None] == torch.arange(CLASSES)[None, :, None, None]).float()


@pytest.mark.parametrize("void", [False, True])
@pytest.mark.parametrize("halvings", [0, 1, 2, 3])
def test_it_is_the_published_rescaler(conditioner, halvings, void):
    batch, maps = mapped(void=void), one_hot(mapped(void=void))
    for _ in range(halvings):
        maps = F.interpolate(maps, scale_factor=0.5, mode="bilinear")
    weight = conditioner.embedding.weight[:CLASSES].T[..., None, None]
    found = conditioner(batch, Averages(2**halvings))
    torch.testing.assert_close(found.concat, F.conv2d(maps, weight))
    assert found.context is None
    assert found.vector is None


@pytest.mark.parametrize("void", [False, True])
def test_the_contract(conditioner, void):
    assert_contract(conditioner, mapped(void=void), Averages())


def test_the_null_condition_is_zero_and_stays_so_in_training(conditioner):
    batch = mapped(void=True)
    optimizer = torch.optim.SGD(conditioner.parameters(), lr=1.0)
    before = conditioner.embedding.weight.detach().clone()
    conditioner(batch, Averages(), torch.tensor([True] + [False] * 5)).concat.square().sum().backward()
    optimizer.step()
    assert conditioner.null(batch, Averages()).concat.abs().max() == 0.0
    assert (conditioner.embedding.weight != before)[:CLASSES].all()


def test_pictures_tell_classes_apart(conditioner):
    classes = torch.arange(-1, 15).reshape(1, 4, 4)
    picture = SemanticMapConditioner(15).show(batch_of(1, 4, segmentation=classes), Averages())
    colours = picture.flatten(2)[0].T
    assert picture.shape == (1, 3, 4, 4)
    assert colours.min() == -1.0
    assert colours.max() <= 1.0
    assert (colours[0] == -1.0).all()
    assert torch.pdist(colours).min() > 0.1


def test_what_does_not_fit_is_refused(conditioner):
    with pytest.raises(ValueError, match=r"no `segmentation`; allowed .*; change `data.segmentation`"):
        conditioner(batch_of(), Averages())
    with pytest.raises(ValueError, match=r"class 7; allowed are 0 to 6; change `conditioner.num_classes`"):
        conditioner(mapped(classes=8, size=64), Averages())


@pytest.mark.parametrize("key", ["num_classes", "concat_channels"])
def test_impossible_arguments_are_refused(key):
    with pytest.raises(ValueError, match=f"allowed are .*; change `conditioner.{key}`"):
        SemanticMapConditioner(**({"num_classes": 3} | {key: 0}))
