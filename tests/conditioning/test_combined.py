import hydra
import pytest
import torch

from ldm_train.batch import Conditioning
from ldm_train.conditioning import (
    CombinedConditioner,
    Conditioner,
    DegradedImageConditioner,
    LabelConditioner,
    NoConditioner,
    SemanticMapConditioner,
    TransformerTextConditioner,
)

from ..conftest import composed
from .toy import CAPTIONS, NUM_CLASSES, batch, clip, first_stage


class Shrunk(Conditioner):
    """The image at the size of the latents."""

    concat_channels = 3

    def forward(self, batch, first_stage, drop=None):
        image = torch.nn.functional.avg_pool2d(batch["image"], first_stage.downsampling_factor)
        return Conditioning(concat=image if drop is None else image * ~drop[:, None, None, None])


def parts():
    torch.manual_seed(0)
    return {
        "text": TransformerTextConditioner(32, 12, num_layers=1, num_heads=2, drop_rate=0.2),
        "clip": clip(),
        "label": LabelConditioner(NUM_CLASSES, vector_dim=8, drop_rate=0.3),
        "small": Shrunk(0.0),
        "smaller": Shrunk(0.5),
    }


@pytest.fixture
def conditioner():
    return CombinedConditioner(parts(), drop_rate=0.1).eval()


def test_each_part_enters_in_its_own_way(conditioner):
    stage, given = first_stage(), conditioner(batch(), first_stage())
    text, clip, label, small, smaller = (part(batch(), stage) for part in conditioner.parts.values())
    assert torch.equal(given.context, torch.cat([text.context, clip.context], 1))
    assert torch.equal(given.vector, torch.cat([text.vector, label.vector], 1))
    assert torch.equal(given.concat, torch.cat([small.concat, smaller.concat], 1))
    assert (conditioner.context_dim, conditioner.vector_dim, conditioner.concat_channels) == (32, 40, 6)


def test_what_no_part_gives_is_not_there():
    conditioner = CombinedConditioner({"none": NoConditioner(), "label": LabelConditioner(NUM_CLASSES, 8)})
    context, vector, concat = conditioner(batch(), None)
    assert context.shape == (4, 1, 8)
    assert vector is concat is conditioner.vector_dim is None
    assert conditioner.concat_channels == 0


def test_each_part_is_dropped_by_its_own_column(conditioner):
    stage, drop = first_stage(), torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    given = conditioner(batch(), stage, drop)
    each = [part(batch(), stage, mask) for part, mask in zip(conditioner.parts.values(), drop.unbind(1), strict=True)]
    assert torch.equal(given.context, torch.cat([each[0].context, each[1].context], 1))
    assert torch.equal(given.vector, torch.cat([each[0].vector, each[2].vector], 1))
    assert torch.equal(given.concat, torch.cat([each[3].concat, each[4].concat], 1))


def test_parts_are_dropped_independently_but_for_the_joint_drop(conditioner):
    drop = conditioner.draw_drop(0, 0, torch.arange(100_000)).double()
    joint, rates = 0.1, torch.tensor([0.2, 0.1, 0.3, 0.0, 0.5], dtype=torch.float64)
    expected = joint + (1 - joint) * rates[:, None] * rates
    expected.fill_diagonal_(0.0).diagonal().copy_(joint + (1 - joint) * rates)
    torch.testing.assert_close(drop.T @ drop / len(drop), expected, rtol=0.0, atol=4 * 0.5 / 100_000**0.5)


def test_people_see_the_first_picture_and_read_everything_once(conditioner):
    stage, label = first_stage(), conditioner.parts["label"]
    assert conditioner.show(batch(), stage) is None
    captions = zip(CAPTIONS, label.describe(batch()), strict=True)
    assert conditioner.describe(batch()) == [", ".join(filter(None, said)) for said in captions]
    maps, other = SemanticMapConditioner(NUM_CLASSES), DegradedImageConditioner(0)
    both = CombinedConditioner({"label": label, "map": maps, "small": other})
    assert torch.equal(both.show(batch(), stage), maps.show(batch(), stage))


def test_frozen_parts_are_found_inside(conditioner):
    assert conditioner.frozen_parts == ("parts.clip.encoder",)


def test_the_options_of_the_group_are_parts_by_their_names():
    cfg = composed("conditioner=text_and_label", "conditioner.parts.label.num_classes=7")
    conditioner = hydra.utils.instantiate(cfg.conditioner, _convert_="all")
    assert conditioner.parts["label"].num_classes == 7
    assert (conditioner.context_dim, conditioner.vector_dim) == (192, 192 + 512)
    assert (cfg.conditioner.context_dim, cfg.conditioner.vector_dim) == (192, 192 + 512)


@pytest.mark.parametrize(
    ("key", "stated", "made"), [("context_dim", 64, 32), ("vector_dim", 41, 40), ("concat_channels", 3, 6)]
)
def test_a_stated_width_must_be_what_the_parts_make(key, stated, made):
    CombinedConditioner(parts(), **{key: made})
    message = rf"{key} is {stated}, the parts together make {made}; allowed is .*; change `conditioner.{key}` or"
    with pytest.raises(ValueError, match=message):
        CombinedConditioner(parts(), **{key: stated})


@pytest.mark.parametrize(
    ("strange", "message"),
    [
        ({}, "has no parts; allowed is at least one plain conditioner; change `conditioner.parts`"),
        ({"both": CombinedConditioner({"none": NoConditioner()})}, "has parts of its own in 'both'; .*; change"),
        (
            {"a": LabelConditioner(NUM_CLASSES, context_dim=8), "b": LabelConditioner(NUM_CLASSES, context_dim=16)},
            r"context of the widths {'a': 8, 'b': 16}; allowed is one and the same; change the `context_dim`",
        ),
    ],
)
def test_parts_that_do_not_fit_together_are_refused(strange, message):
    with pytest.raises(ValueError, match=message):
        CombinedConditioner(strange)
