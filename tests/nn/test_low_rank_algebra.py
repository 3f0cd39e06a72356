"""Arithmetic of adapters: exact where it says so, and as good as any approximation can be elsewhere."""

import pytest
import torch

from ldm_train.nn.low_rank import LowRank
from ldm_train.nn.low_rank_algebra import (
    concatenated,
    extracted,
    frobenius_norm,
    resized,
    singular_values,
    summed_svd,
)

SHAPES = {"linear": (24, 18), "tall": (40, 6), "convolution": (20, 7, 3, 3), "1x1": (20, 12, 1, 1)}
by_shape = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def draw(shape, rank=4, alpha=0.7, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *shape[1:], generator=generator)
    up = torch.randn(shape[0], rank, *(1,) * (len(shape) - 2), generator=generator)
    return LowRank(down.to(dtype), up.to(dtype), alpha)


def relative(found, expected):
    return float((found - expected).norm() / expected.norm())


@by_shape
def test_concatenation_is_the_sum_of_changes(shape):
    adapters = [draw(shape, rank, alpha, seed) for seed, (rank, alpha) in enumerate([(4, 0.7), (2, -1.5), (1, 8.0)])]
    weights = [1.0, 0.3, -2.0]
    expected = sum(weight * adapter.delta() for weight, adapter in zip(weights, adapters, strict=True))
    result = concatenated(adapters, weights)
    assert result.rank == 7
    assert relative(result.delta(), expected) < 1e-6


@by_shape
def test_the_sum_of_full_rank_by_singular_values_is_the_sum(shape):
    adapters, weights = [draw(shape, 2), draw(shape, 3, seed=1)], [0.5, 2.0]
    assert relative(summed_svd(adapters, weights).delta(), concatenated(adapters, weights).delta()) < 1e-5


@by_shape
@pytest.mark.parametrize("rank", [4, 5, 100])
def test_a_rank_that_is_no_smaller_changes_nothing(shape, rank):
    adapter = draw(shape)
    result = resized(adapter, rank)
    assert result.rank == 4
    assert relative(result.delta(), adapter.delta()) < 1e-6


@by_shape
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_what_a_smaller_rank_loses_are_the_dropped_singular_values(shape, rank):
    adapter = draw(shape)
    dense = torch.linalg.svdvals(adapter.delta().double().flatten(1))
    assert torch.allclose(singular_values(adapter), dense[:4], rtol=1e-5)
    lost = (resized(adapter, rank).delta() - adapter.delta()).norm()
    assert float(lost) == pytest.approx(float(dense[rank:].norm()), rel=1e-4)


@by_shape
@pytest.mark.parametrize("energy", [0.5, 0.9, 0.999, 1.0])
def test_the_energy_is_kept_by_the_smallest_rank_that_keeps_it(shape, energy):
    adapter = draw(shape)
    kept = resized(adapter, energy=energy)
    squares = singular_values(adapter).square()
    assert float(squares[: kept.rank].sum() / squares.sum()) >= energy - 1e-9
    assert kept.rank == 1 or float(squares[: kept.rank - 1].sum() / squares.sum()) < energy


@by_shape
def test_the_norm_is_that_of_the_dense_change(shape):
    adapter = draw(shape)
    assert frobenius_norm(adapter) == pytest.approx(float(adapter.delta().norm()), rel=1e-5)


@pytest.mark.parametrize("shape", [*SHAPES.values(), (240, 200), (160, 20, 3, 3)], ids=[*SHAPES, "large", "large conv"])
def test_extraction_recovers_an_adapter(shape):
    """By a full decomposition, and by a random projection for the large ones."""
    base = torch.randn(shape, generator=torch.Generator().manual_seed(5))
    adapter = draw(shape)
    result = extracted(base, base + adapter.delta(), rank=4)
    assert relative(result.delta(), adapter.delta()) < 1e-5
    assert relative(result.merged(base), adapter.merged(base)) < 1e-6


def test_the_random_projection_finds_what_the_full_decomposition_does():
    matrix = torch.randn(200, 150, generator=torch.Generator().manual_seed(2))
    spectrum = torch.logspace(0, -3, 150)
    u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
    tuned = u * spectrum @ vh
    zero = torch.zeros_like(tuned)
    lost = (extracted(zero, tuned, rank=6).delta() - tuned).norm()
    assert float(lost) == pytest.approx(float(spectrum[6:].norm()), rel=1e-4)


def test_clamping_cuts_off_the_largest_values_alone():
    base, tuned = torch.zeros(24, 18), draw((24, 18)).delta()
    whole, cut = extracted(base, tuned, 4), extracted(base, tuned, 4, clamp_quantile=0.9)
    sizes = torch.cat([whole.down.abs().flatten(), whole.up.abs().flatten()])
    limit = max(cut.down.abs().max(), cut.up.abs().max())
    assert float((sizes <= limit).float().mean()) == pytest.approx(0.9, abs=0.01)
    assert torch.equal(cut.down, whole.down.clamp(-limit, limit))
    assert torch.equal(extracted(base, tuned, 4, clamp_quantile=1.0).up, whole.up)


def test_types_and_magnitudes_are_kept():
    adapter = LowRank(draw((8, 6)).down.half(), draw((8, 6)).up.half(), 1.0, torch.ones(8))
    result = resized(adapter, 2)
    assert (result.down.dtype, result.up.dtype, result.magnitude is adapter.magnitude) == (torch.half,) * 2 + (True,)


def test_no_change_has_an_adapter_of_rank_1():
    result = extracted(torch.ones(5, 4), torch.ones(5, 4), energy=0.9)
    assert result.rank == 1
    assert torch.equal(result.delta(), torch.zeros(5, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda a: resized(a, 0), "rank is 0"),
        (lambda a: resized(a, energy=1.5), "energy is 1.5"),
        (lambda a: extracted(a.delta(), a.delta()[:3]), "allowed are equal shapes"),
        (lambda a: extracted(a.delta(), a.delta(), 2, clamp_quantile=0.0), "quantile is 0.0"),
        (lambda a: concatenated([a, draw((9, 9))], [1, 1]), "of one layer"),
        (lambda a: concatenated([a, a], [1]), "1 weights"),
        (lambda a: concatenated([a, LowRank(a.down, a.up, 1.0, torch.ones(24))], [1, 1]), "DoRA"),
    ],
)
def test_the_impossible_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(draw((24, 18)))
