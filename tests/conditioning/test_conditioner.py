"""The contract all conditioners keep."""

import inspect
from copy import deepcopy
from functools import cache

import pytest
import torch

import ldm_train.conditioning
from ldm_train.conditioning import (
    CombinedConditioner,
    Conditioner,
    DegradedImageConditioner,
    LabelConditioner,
    MaskConditioner,
    NoConditioner,
    SemanticMapConditioner,
    SizeConditioner,
    TransformerTextConditioner,
)

from ..meta import on_meta, without_autocast
from .toy import CAPTIONS, NUM_CLASSES, batch, clip, first_stage


def text(**changes):
    return TransformerTextConditioner(**({"context_dim": 32, "context_length": 12, "num_layers": 1} | changes))


def combined():
    parts = {
        "text": text(),
        "clip": clip(),
        "label": LabelConditioner(NUM_CLASSES, vector_dim=8),
        "map": SemanticMapConditioner(NUM_CLASSES),
        "mask": MaskConditioner(0, concat_channels=5),
        "size": SizeConditioner(24),
    }
    return CombinedConditioner(parts, drop_rate=0.1)


KINDS = {
    "none": NoConditioner,
    "text": text,
    "text_factorised": lambda: text(token_dim=16),
    "clip": clip,
    "clip_vector": lambda: clip(vector_dim=32),
    "label": lambda: LabelConditioner(NUM_CLASSES, context_dim=8),
    "label_vector": lambda: LabelConditioner(NUM_CLASSES, vector_dim=8),
    "semantic_map": lambda: SemanticMapConditioner(NUM_CLASSES),
    "degraded_image": lambda: DegradedImageConditioner(0),
    "degraded_latents": lambda: DegradedImageConditioner(
        0, max_noise=0.5, concat_as="latents", concat_channels=4, vector_dim=8
    ),
    "mask": lambda: MaskConditioner(0, concat_channels=5),
    "mask_last": lambda: MaskConditioner(0, concat_channels=5, convention="latent_diffusion"),
    "size": lambda: SizeConditioner(48, drop_rate=0.2),
    "combined": combined,
}


@cache
def built(kind):
    torch.manual_seed(0)
    return KINDS[kind]().eval()


@pytest.fixture(params=KINDS)
def conditioner(request):
    return built(request.param)


@pytest.fixture(scope="module")
def stage():
    return first_stage()


def entries(conditioning):
    return [entry for entry in conditioning if entry is not None]


def test_no_conditioner_is_left_out():
    classes = [kind for _, kind in inspect.getmembers(ldm_train.conditioning, inspect.isclass)]
    concrete = {kind for kind in classes if issubclass(kind, Conditioner) and not inspect.isabstract(kind)}
    assert {type(built(kind)) for kind in KINDS} == concrete


def test_widths_are_as_declared(conditioner, stage):
    context, vector, concat = conditioner(batch(), stage)
    assert (None if context is None else context.shape[2]) == conditioner.context_dim
    assert (None if vector is None else vector.shape[1]) == conditioner.vector_dim
    assert (0 if concat is None else concat.shape[1]) == conditioner.concat_channels
    assert concat is None or concat.shape[2:] == stage.encode(batch()["image"]).shape[2:]


def test_null_equals_full_drop_and_is_the_same_for_every_example(conditioner, stage):
    null = conditioner.null(batch(), stage)
    dropped = conditioner(batch(), stage, torch.ones(4, dtype=torch.bool))
    for a, b in zip(entries(null), entries(dropped), strict=True):
        assert torch.equal(a, b)
        torch.testing.assert_close(a, a[:1].expand_as(a))


def test_drop_replaces_marked_examples_alone(conditioner, stage):
    drop = torch.tensor([True, False, True, False])
    mixed, given = conditioner(batch(), stage, drop), conditioner(batch(), stage)
    null = conditioner.null(batch(), stage)
    for m, g, n in zip(entries(mixed), entries(given), entries(null), strict=True):
        torch.testing.assert_close(m[drop], n[drop])
        torch.testing.assert_close(m[~drop], g[~drop])
        assert (g[0] - n[0]).abs().max() > 1e-3


def test_examples_do_not_mix(conditioner, stage):
    whole = entries(conditioner(batch(), stage))
    for i, caption in enumerate(CAPTIONS):
        for a, b in zip(whole, entries(conditioner(batch([caption]), stage)), strict=True):
            torch.testing.assert_close(a[i : i + 1], b, rtol=1e-4, atol=1e-5)


def test_nothing_is_read_back_from_the_device(conditioner, stage, monkeypatch):
    """Who asks the device that stands for a GPU here for a value, as `.item()` does, is refused."""
    without_autocast(monkeypatch)
    drop = conditioner.draw_drop(0, 0, batch()["sample_id"])
    found = conditioner(batch(), stage, drop)
    far = deepcopy(conditioner).to("meta")(on_meta(batch()), deepcopy(stage).to("meta"), drop.to("meta"))
    for here, there in zip(entries(found), entries(far), strict=True):
        assert (there.device.type, there.shape) == ("meta", here.shape)


def test_the_drop_rate_is_met_per_example(conditioner):
    count, ids = 100_000, torch.arange(100_000)
    parts = getattr(conditioner, "parts", {})
    own = [part.drop_rate for part in parts.values()] or [0.0]
    rates = torch.tensor([1 - (1 - conditioner.drop_rate) * (1 - rate) for rate in own])
    drops, again, other_epoch = (conditioner.draw_drop(0, epoch, ids).view(count, -1) for epoch in (0, 0, 1))
    assert torch.equal(drops, again)
    assert torch.equal(drops[::7], conditioner.draw_drop(0, 0, ids[::7]).view(-1, len(rates)))
    assert ((drops.float().mean(0) - rates).abs() <= 4 * (rates * (1 - rates) / count).sqrt()).all()
    both = (drops & other_epoch).float().mean(0)
    assert ((both - rates.square()).abs() <= 4 * (rates.square() / count).sqrt()).all()


def test_frozen_parts_are_exactly_what_is_not_trained(conditioner):
    frozen = {name for name, parameter in conditioner.named_parameters() if not parameter.requires_grad}
    prefixes = tuple(f"{part}." for part in conditioner.frozen_parts)
    assert frozen == {name for name, _ in conditioner.named_parameters() if prefixes and name.startswith(prefixes)}
    conditioner.train()
    for part in conditioner.frozen_parts:
        assert not any(module.training for module in conditioner.get_submodule(part).modules())
    conditioner.eval()


@pytest.mark.parametrize("rate", [-0.1, 1.5])
def test_a_drop_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(ValueError, match=rf"drop_rate is {rate}; allowed are 0 to 1 .* change `conditioner.drop_rate`"):
        text(drop_rate=rate)
