"""`MaskConditioner`: holes of the drawn size and kind, and nothing of the image that lies in them."""

import pytest
import torch

from ldm_train.conditioning import MaskConditioner
from ldm_train.conditioning.mask import KINDS
from tests.conditioning.images import Averages, assert_contract, batch_of

SIZE = 32


def conditioner_of(seed=0, **options):
    return MaskConditioner(seed, **{"concat_channels": 5} | options)


def many(count=200, size=SIZE, **entries):
    ids = torch.arange(count)
    return {"image": torch.zeros(count, 3, size, size), "sample_id": ids, "epoch": 0} | entries


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.05, 0.3, 0.8])
def test_holes_of_every_kind_cover_the_drawn_share(kind, share):
    masks = conditioner_of(kinds={kind: 1.0}, hole_share=(share, share)).masks(many())
    covered = masks.mean((1, 2, 3))
    assert set(masks.unique().tolist()) <= {0.0, 1.0}
    if kind == "everything":
        assert (covered == 1.0).all()
    else:  # equal distances come in or stay out together: an edge or two of a box
        assert (covered - share).abs().max() < 2.5 / SIZE
        assert (covered - share).abs().mean() < 0.5 / SIZE


def test_shares_fill_their_range():
    covered = conditioner_of(kinds={"strokes": 1.0}, hole_share=(0.2, 0.5)).masks(many(1000)).mean((1, 2, 3))
    quantiles = torch.quantile(covered, torch.tensor([0.02, 0.25, 0.5, 0.75, 0.98]))
    torch.testing.assert_close(quantiles, torch.tensor([0.206, 0.275, 0.35, 0.425, 0.494]), atol=0.03, rtol=0)


def is_half_plane(mask):
    """Whether a line parts the hole from the rest: along some direction all of the hole comes first."""
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    angles = torch.linspace(0, 2 * torch.pi, 360)[:, None, None]
    place = torch.sin(angles) * y + torch.cos(angles) * x
    last = place.masked_fill(mask == 0, -torch.inf).amax((1, 2))
    first = place.masked_fill(mask == 1, torch.inf).amin((1, 2))
    return bool((last <= first + 0.3).any())


def test_kinds_come_in_their_proportions_and_look_their_part():
    proportions = {"boxes": 3.0, "half": 1.0, "everything": 1.0}
    masks = conditioner_of(kinds=proportions, hole_share=(0.1, 0.4)).masks(many(500))[:, 0]
    everything = (masks == 1).all(2).all(1)
    half = torch.tensor([is_half_plane(mask) for mask in masks[:200]]) & ~everything[:200]
    assert everything.float().mean() == pytest.approx(0.2, abs=4 * 0.4 / 500**0.5)
    # A box in a corner may be a half plane by chance.
    assert half.float().mean() == pytest.approx(0.2, abs=4 * 0.4 / 200**0.5)
    planes = conditioner_of(kinds={"half": 1.0}).masks(many(20))[:, 0]
    assert all(is_half_plane(mask) for mask in planes)


def test_a_box_is_a_rectangle_and_a_stroke_is_none():
    def is_rectangle(mask):
        return torch.equal(mask.amax(0)[None] * mask.amax(1)[:, None], mask)

    boxes = conditioner_of(kinds={"boxes": 1.0}).masks(many())[:, 0]
    strokes = conditioner_of(kinds={"strokes": 1.0}).masks(many())[:, 0]
    # One of three numbers of boxes is 1; several may still fill a rectangle.
    assert 0.25 < sum(map(is_rectangle, boxes)) / 200 < 0.7
    assert not any(map(is_rectangle, strokes))
    assert len(strokes.flatten(1).unique(dim=0)) == len(strokes)


def test_strokes_are_connected():
    for mask in conditioner_of(kinds={"strokes": 1.0}, hole_share=(0.1, 0.3)).masks(many(40))[:, 0]:
        reached = torch.zeros_like(mask)
        reached.view(-1)[mask.flatten().argmax()] = 1.0
        for _ in range(SIZE * 4):
            reached = torch.nn.functional.max_pool2d(reached[None], 3, 1, 1)[0] * mask
        assert torch.equal(reached, mask)


def test_holes_belong_to_seed_epoch_and_sample():
    def masks(seed=0, epoch=0, first=0):
        return conditioner_of(seed).masks(many(8, epoch=epoch, sample_id=torch.arange(first, first + 8)))

    assert torch.equal(masks(), masks())
    assert torch.equal(masks()[3:], masks(first=3)[:5])
    assert not torch.equal(masks(), masks(seed=1))
    assert not torch.equal(masks(), masks(epoch=1))


@pytest.mark.parametrize("convention", ["stable_diffusion", "latent_diffusion"])
def test_the_contract(convention):
    assert_contract(conditioner_of(convention=convention, kinds={"boxes": 1.0}), batch_of(), Averages())


@pytest.mark.parametrize(
    ("convention", "mask_channel", "known", "colour"),
    [("stable_diffusion", 0, 0.0, 0.0), ("latent_diffusion", 4, -1.0, -1.0)],
)
def test_conventions_are_those_of_the_published_models(convention, mask_channel, known, colour):
    conditioner, batch, first_stage = conditioner_of(convention=convention), batch_of(), Averages()
    masks = conditioner.masks(batch)
    concat = conditioner(batch, first_stage).concat
    cells, latents = concat[:, mask_channel], concat[:, [i for i in range(5) if i != mask_channel]]
    assert set(cells.unique().tolist()) <= {known, 1.0}
    touched = masks[:, 0].unflatten(1, (-1, 4)).unflatten(3, (-1, 4)).amax((2, 4)) == 1.0
    assert torch.equal(cells == 1.0, touched)
    image = torch.where(masks == 1.0, colour, batch["image"])
    torch.testing.assert_close(latents, first_stage.encode(image).detach())
    assert torch.equal(conditioner.masked_image(batch), image)
    assert torch.equal(conditioner.show(batch, first_stage), image)
    assert not concat.requires_grad


def test_what_lies_in_the_hole_is_not_seen():
    conditioner, batch = conditioner_of(), batch_of()
    other = batch_of() | {"image": torch.where(conditioner.masks(batch) == 1.0, 0.77, batch["image"])}
    assert torch.equal(conditioner(batch, Averages()).concat, conditioner(other, Averages()).concat)


def test_given_holes_are_taken_and_null_is_the_hole_that_is_everything():
    conditioner, batch, first_stage = conditioner_of(), batch_of(), Averages()
    drawn = conditioner.condition_on(batch["image"], conditioner.masks(batch), first_stage)
    assert torch.equal(drawn.concat, conditioner(batch, first_stage).concat)
    everything = conditioner.condition_on(batch["image"], torch.ones(6, 1, 16, 16), first_stage)
    assert torch.equal(everything.concat, conditioner.null(batch, first_stage).concat)
    nothing = conditioner.condition_on(batch["image"], torch.zeros(6, 1, 16, 16), first_stage).concat
    assert (nothing[:, 0] == 0.0).all()
    assert torch.equal(nothing[:, 1:], first_stage.encode(batch["image"]).detach())


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"hole_share": (0.5, 0.2)}, "hole_share"),
        ({"hole_share": (0.0, 0.2)}, "hole_share"),
        ({"hole_share": (0.2, 1.0)}, "hole_share"),
        ({"hole_share": (0.2,)}, "hole_share"),
        ({"kinds": {"box": 1.0}}, "kinds"),
        ({"kinds": {"boxes": -1.0}}, "kinds"),
        ({"kinds": {"boxes": 0.0}}, "kinds"),
        ({"kinds": {}}, "kinds"),
        ({"convention": "none"}, "convention"),
    ],
)
def test_impossible_arguments_are_refused(change, key):
    with pytest.raises(ValueError, match=f"{key} is .*; allowed are .*; change `conditioner.{key}`"):
        conditioner_of(**change)


def test_latents_of_other_channels_are_refused():
    with pytest.raises(ValueError, match=r"concat_channels is 4; allowed are 5: the latents' and one"):
        conditioner_of(concat_channels=4)(batch_of(), Averages())


def test_a_hole_that_the_batch_has_takes_the_place_of_the_drawn_one():
    conditioner, first_stage = conditioner_of(), Averages()
    hole = torch.zeros(6, 1, 16, 16)
    hole[:, :, :8] = 1.0
    batch = batch_of() | {"hole": hole}
    assert torch.equal(conditioner.masks(batch), hole)
    expected = conditioner.condition_on(batch["image"], hole, first_stage)
    assert torch.equal(conditioner(batch, first_stage).concat, expected.concat)
