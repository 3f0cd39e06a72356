import pytest
import torch
from torch import nn

from ldm_train.distributed import all_reduce_mean
from ldm_train.nn import HINGE, AdversarialLoss, Clock, PatchDiscriminator
from tests.ranks import run_ranks

NOW = Clock(step=0, images=0)


class Linear(nn.Module):
    """One logit for an image: its scalar product with a constant image."""

    def __init__(self, size=4):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 2, 3 * size * size).view(1, 3, size, size))

    def forward(self, x):
        return (x * self.weight).sum((1, 2, 3)).view(-1, 1, 1, 1)


def _images(count, size=16, seed=0):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def _decoder():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))


def _loss(norm="batch", **arguments):
    torch.manual_seed(2)
    return AdversarialLoss(PatchDiscriminator(8, 2, norm), **({"start": 0} | arguments))


def _terms(loss, decoder, x, clock=NOW):
    reconstruction = decoder(x)
    difference = (x - reconstruction).abs().mean()
    return loss(x, reconstruction, difference, decoder[-1].weight, clock), reconstruction, difference


@pytest.mark.parametrize("norm", ["batch", "spectral", "none"])
def test_each_term_reaches_its_own_network_only(norm):
    # The hinge loss gives the last bias no gradient at first: all logits are inside the margin.
    loss = _loss(norm, form="non_saturating", r1_weight=1.0, lecam_weight=1.0)
    decoder, x = _decoder(), _images(4)
    terms, reconstruction, _ = _terms(loss, decoder, x)

    assert torch.autograd.grad(terms.discriminator, reconstruction, allow_unused=True, retain_graph=True) == (None,)
    terms.generator.backward(retain_graph=True)
    assert all(p.grad is None for p in loss.discriminator.parameters())
    assert all(p.grad.any() for p in decoder.parameters())

    decoder.zero_grad(set_to_none=True)
    terms.discriminator.backward()
    assert all(p.grad.any() for p in loss.discriminator.parameters())
    assert all(p.grad is None for p in decoder.parameters())
    assert x.grad is None


@pytest.mark.parametrize("norm", ["batch", "spectral"])
def test_the_generator_term_leaves_no_trace_in_the_discriminator(norm):
    states = []
    for warmup in (0, 1):  # with the generator term, and without
        loss = _loss(norm, warmup=warmup)
        _terms(loss, _decoder(), _images(4))
        states.append(loss.state_dict())
    torch.testing.assert_close(*states, rtol=0, atol=0)


def test_one_backward_equals_two_losses_with_a_backward_each():
    loss, decoder, x = _loss(weight=0.7), _decoder(), _images(4)
    terms, _, difference = _terms(loss, decoder, x)
    (difference + terms.generator + terms.discriminator).backward()

    other, again = _loss().discriminator, _decoder()
    y = again(x)
    HINGE.discriminator(other(x), other(y.detach())).backward()
    of_discriminator = [p.grad.clone() for p in other.parameters()]
    scale = 0.7 * float(terms.log["adaptive_weight"])
    ((x - y).abs().mean() + scale * HINGE.generator(other(y))).backward()

    torch.testing.assert_close([p.grad for p in loss.discriminator.parameters()], of_discriminator)
    torch.testing.assert_close([p.grad for p in decoder.parameters()], [p.grad for p in again.parameters()])


def test_the_adaptive_weight_is_the_ratio_of_two_gradients():
    loss, decoder, x = _loss(weight=0.5), _decoder(), _images(4)
    terms, reconstruction, difference = _terms(loss, decoder, x)
    generator = -loss.discriminator(reconstruction).mean()
    (ours,) = torch.autograd.grad(difference, decoder[-1].weight, retain_graph=True)
    (theirs,) = torch.autograd.grad(generator, decoder[-1].weight)
    expected = ours.norm() / (theirs.norm() + 1e-4)
    torch.testing.assert_close(terms.log["adaptive_weight"], expected)
    torch.testing.assert_close(terms.log["loss_generator"], generator.detach())
    torch.testing.assert_close(terms.generator.detach(), 0.5 * expected * generator.detach())

    cap = float(expected) / 2
    assert float(_terms(_loss(max_adaptive_weight=cap), decoder, x)[0].log["adaptive_weight"]) == pytest.approx(cap)


def test_without_the_adaptive_weight_the_weight_alone_counts():
    terms, _, _ = _terms(_loss(weight=0.3, adaptive=False), _decoder(), _images(4))
    torch.testing.assert_close(terms.generator.detach(), 0.3 * terms.log["loss_generator"])
    assert "adaptive_weight" not in terms.log


@pytest.mark.parametrize(
    ("unit", "clock", "active", "reaches"),
    [
        ("steps", Clock(9, 9999), False, False),
        ("steps", Clock(10, 0), True, False),
        ("steps", Clock(14, 0), True, False),
        ("steps", Clock(15, 0), True, True),
        ("images", Clock(9999, 9), False, False),
        ("images", Clock(0, 10), True, False),
        ("images", Clock(0, 15), True, True),
    ],
)
def test_phases(unit, clock, active, reaches):
    loss, decoder = _loss(start=10, warmup=5, unit=unit), _decoder()
    assert loss.is_active(clock) == active
    assert loss.reaches_generator(clock) == reaches
    terms, _, difference = _terms(loss, decoder, _images(4), clock)
    assert ("loss_discriminator" in terms.log) == active
    assert ("loss_generator" in terms.log) == reaches
    assert (terms.generator.item() != 0) == reaches
    assert (terms.discriminator.item() != 0) == active
    (difference + terms.generator + terms.discriminator).backward()
    # A gradient for each parameter in every phase: DDP waits for all of them.
    assert all(p.grad is not None for p in loss.discriminator.parameters())
    assert any(p.grad.any() for p in loss.discriminator.parameters()) == active


def test_before_the_start_nothing_of_the_discriminator_changes():
    loss = _loss(start=1, lecam_weight=1.0)
    before = {name: value.clone() for name, value in loss.state_dict().items()}
    terms, _, _ = _terms(loss, _decoder(), _images(4))
    torch.testing.assert_close(dict(loss.state_dict()), before, rtol=0, atol=0)
    assert terms.log == {}


def _linear(x, clock=NOW, **arguments):
    """A linear discriminator's weight, and the terms it gives for the same images as their reconstructions."""
    loss = AdversarialLoss(Linear(), start=0, warmup=100, **arguments)
    return loss, loss(x, x, x.new_zeros(()), nn.Parameter(torch.zeros(1)), clock)


def test_r1_of_a_linear_discriminator():
    x, arguments = _images(5, size=4), {"r1_weight": 3.0, "r1_every": 4}
    plain = _linear(x)[1].discriminator
    loss, terms = _linear(x, Clock(8, 0), **arguments)
    norm = loss.discriminator.weight.detach().square().sum()  # the same at every image
    torch.testing.assert_close(terms.log["r1"], norm)
    torch.testing.assert_close(terms.discriminator - plain, 0.5 * 3.0 * 4 * norm)

    _, between = _linear(x, Clock(9, 0), **arguments)
    assert "r1" not in between.log
    torch.testing.assert_close(between.discriminator, plain)


def test_r1_s_gradient_pulls_a_linear_discriminator_to_zero():
    x = torch.zeros(2, 3, 4, 4)
    loss, terms = _linear(x, r1_weight=3.0, r1_every=4)
    terms.discriminator.backward()
    torch.testing.assert_close(loss.discriminator.weight.grad, 3.0 * 4 * loss.discriminator.weight.detach())


def test_r1_is_computed_in_float32_under_autocast():
    x = _images(4)
    plain = _terms(_loss(r1_weight=1.0), _decoder(), x)[0].log["r1"]
    with torch.autocast("cpu", torch.bfloat16):
        terms, _, _ = _terms(_loss(r1_weight=1.0), _decoder(), x)
    assert torch.equal(terms.log["r1"], plain)
    assert terms.generator.dtype == terms.discriminator.dtype == torch.float32


def test_lecam_measures_from_unbiased_averages():
    loss = AdversarialLoss(Linear(), start=0, warmup=100, lecam_weight=0.1, lecam_decay=0.75)
    plain = AdversarialLoss(Linear(), start=0, warmup=100)
    nothing, weight = torch.zeros(()), nn.Parameter(torch.zeros(1))
    pairs = [(_images(3, 4, seed), _images(3, 4, seed + 10)) for seed in range(3)]
    logits = [[loss.discriminator(images).detach() for images in pair] for pair in pairs]
    for step, (x, y) in enumerate(pairs):
        weights = torch.tensor([0.75 ** (step - i) for i in range(step + 1)])
        a_x, a_y = (
            sum(w * seen[kind].mean() for w, seen in zip(weights, logits, strict=False)) / weights.sum()
            for kind in (0, 1)
        )
        real, fake = logits[step]
        expected = (real - a_y).square().mean() + (fake - a_x).square().mean()
        terms = loss(x, y, nothing, weight, NOW)
        torch.testing.assert_close(terms.log["lecam"], expected)
        added = terms.discriminator - plain(x, y, nothing, weight, NOW).discriminator
        torch.testing.assert_close(added, 0.1 * expected)


def test_lecam_resumes_from_a_checkpoint():
    first, second = _loss(lecam_weight=1.0), _loss(lecam_weight=1.0)
    _terms(first, _decoder(), _images(4))
    second.load_state_dict(first.state_dict())
    logs = [_terms(loss, _decoder(), _images(4, seed=1))[0].log["lecam"] for loss in (first, second)]
    assert torch.equal(*logs)
    assert not torch.equal(_terms(_loss(lecam_weight=1.0), _decoder(), _images(4, seed=1))[0].log["lecam"], logs[0])


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("form", "wasserstein"),
        ("weight", -1.0),
        ("max_adaptive_weight", 0.0),
        ("start", -1),
        ("warmup", -1),
        ("unit", "epochs"),
        ("r1_weight", -1.0),
        ("r1_every", 0),
        ("lecam_weight", -1.0),
        ("lecam_decay", 1.0),
    ],
)
def test_impossible_settings_are_refused(key, value):
    with pytest.raises(ValueError, match=rf"{key} is '?{value}'?; allowed are .*; change `adversarial\.{key}`"):
        _loss(**{key: value})


def _one_rank(rank, init_file, world):
    x, arguments = _images(6), {"r1_weight": 0.1, "lecam_weight": 0.1, "form": "non_saturating"}
    expected = _results(x, arguments)
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    found = _results(x[rank::world], arguments)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = value.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(found[name] / scale, value / scale, rtol=0, atol=1e-5, msg=lambda m, n=name: n + m)
    torch.distributed.destroy_process_group()


def _results(x, arguments):
    """The gradients of two steps, R1 in the second one alone, the logged scalars and the buffers, as rank means."""
    loss, decoder = _loss(**arguments), _decoder()
    for step in (1, 16):
        terms, _, difference = _terms(loss, decoder, x, Clock(step, 0))
        (difference + terms.generator + terms.discriminator).backward()
    parameters = [*loss.discriminator.named_parameters("discriminator"), *decoder.named_parameters("decoder")]
    results = {name: all_reduce_mean(parameter.grad) for name, parameter in parameters}
    results |= {name: all_reduce_mean(value) for name, value in terms.log.items()}
    # Equal on every rank without a mean: the weight, and all buffers.
    return results | {"adaptive_weight": terms.log["adaptive_weight"]} | dict(loss.named_buffers())


@pytest.mark.distributed
def test_two_ranks_equal_one_process_with_the_joined_batch(tmp_path):
    run_ranks(_one_rank, tmp_path / "rendezvous", 2)
