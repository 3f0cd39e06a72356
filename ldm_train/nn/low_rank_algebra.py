"""Arithmetic of low-rank adapters: sums, other ranks, and adapters out of two sets of weights.

A sum of products of two matrices is one product over the ranks together, exactly (the factors must not be added:
(B_1 + B_2)(A_1 + A_2) has the cross terms B_1 A_2 and B_2 A_1):

    sum_i c_i alpha_i B_i A_i = [c_1 alpha_1 B_1, c_2 alpha_2 B_2, ...] [A_1; A_2; ...]

The best approximation of a matrix by one of rank r keeps its r largest singular values, and what is lost is the rest
(Eckart and Young 1936):

    M = U diag(s) V^T,   |M - M_r|_F^2 = sum_{i > r} s_i^2

Of a product alpha B A they are found without the dense matrix: with B = Q_B R_B and A^T = Q_A R_A they are those of the
small alpha R_B R_A^T (r, r). Of a difference of dense weights the leading ones are found by a random projection (Halko
et al. 2011, algorithms 4.3 and 5.1) where few of them are wanted.

Results have alpha = 1 and the singular values shared out evenly, A = diag(s)^1/2 V^T and B = U diag(s)^1/2, so that
neither factor leaves the range of half precision before the other. Letters: r rank, c weight of an adapter in a sum.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_train.nn.low_rank import LowRank

_OVERSAMPLED = 10  # directions of a random projection beyond those that are wanted
_POWERS = 4  # how often it is multiplied by M M^T, which tells close singular values apart
_SMALL_SHARE = 8  # a full decomposition is no slower for ranks of more than one part in this many


def singular_values(adapter: LowRank) -> Tensor:
    """Those of alpha B A, descending, (r,) or fewer where a side is shorter, in float64, whatever the magnitude."""
    return torch.linalg.svdvals(_core(adapter)[1])


def frobenius_norm(adapter: LowRank) -> float:
    """|alpha B A|_F, whatever the magnitude."""
    return float(singular_values(adapter).norm())


def concatenated(adapters: Sequence[LowRank], weights: Sequence[float]) -> LowRank:
    """The weighted sum of changes, exactly, of the sum of ranks.

    Args:
        adapters: of the same layer, without magnitudes.
        weights: one each.

    Raises:
        ValueError: if one has a magnitude, whose change is no product, or the layers differ.
    """
    if len({adapter.weight_shape for adapter in adapters}) != 1 or len(adapters) != len(weights):
        raise ValueError(
            f"{len(weights)} weights for adapters of {[adapter.weight_shape for adapter in adapters]}; allowed is one "
            "for each of several adapters of one layer; name adapters of one architecture, with a weight each"
        )
    if any(adapter.magnitude is not None for adapter in adapters):
        raise ValueError(
            "an adapter has a magnitude (DoRA), so its change depends on the base weights and adds to no other; "
            "allowed are adapters without; merge such ones into the base model instead"
        )
    down = torch.cat([adapter.down.float() for adapter in adapters])
    pairs = zip(weights, adapters, strict=True)
    up = torch.cat([weight * adapter.alpha * adapter.up.float() for weight, adapter in pairs], dim=1)
    return LowRank(down, up)


def summed_svd(
    adapters: Sequence[LowRank], weights: Sequence[float], rank: int | None = None, energy: float | None = None
) -> LowRank:
    """The best approximation of the weighted sum, see `concatenated` and `resized`."""
    return resized(concatenated(adapters, weights), rank, energy)


def resized(adapter: LowRank, rank: int | None = None, energy: float | None = None) -> LowRank:
    """The best approximation of alpha B A by a smaller rank; one that is not smaller keeps it exactly.

    Args:
        adapter: of one layer; its magnitude stays as it is, and the lengths of the new weights with it.
        rank: the largest rank allowed; `None` for any.
        energy: the share of |alpha B A|_F^2 that must be kept; `None` for all that the rank allows.

    Returns:
        The approximation, of rank 1 at least.

    Raises:
        ValueError: for an impossible rank or share.
    """
    basis_up, core, basis_down = _core(adapter)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    kept = _kept(s, rank, energy)
    return _product(basis_up @ u[:, :kept], s[:kept], vh[:kept] @ basis_down.T, adapter)


def extracted(
    base: Tensor,
    tuned: Tensor,
    rank: int | None = None,
    energy: float | None = None,
    clamp_quantile: float | None = None,
) -> LowRank:
    """The best adapter that turns one layer's base weights into tuned ones.

    Args:
        base: W (out, in) or (out, in, h, w).
        tuned: W' of the same shape.
        rank: the largest rank allowed; `None` for any.
        energy: the share of |W' - W|_F^2 that must be kept; `None` for all that the rank allows.
        clamp_quantile: values of the factors beyond this quantile of their sizes are cut off there; `None` for none.

    Raises:
        ValueError: if shapes differ, or for an impossible rank, share or quantile.
    """
    if base.shape != tuned.shape:
        raise ValueError(
            f"the base weight is {tuple(base.shape)} and the tuned one {tuple(tuned.shape)}; allowed are equal shapes; "
            "name two models of one architecture"
        )
    difference = tuned.float() - base.float()
    matrix = difference.flatten(1)
    is_few = rank is not None and energy is None and _SMALL_SHARE * (rank + _OVERSAMPLED) <= min(matrix.shape)
    u, s, vh = _leading(matrix, rank) if is_few and rank is not None else torch.linalg.svd(matrix, full_matrices=False)
    kept = _kept(s, rank, energy)
    shape = LowRank(difference[:1], difference.new_zeros(len(base), 1, *(1,) * (base.ndim - 2)))
    result = _product(u[:, :kept], s[:kept], vh[:kept], shape)
    return result if clamp_quantile is None else _clamped(result, clamp_quantile)


def _core(adapter: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """Orthonormal Q_B (out, k), the core alpha R_B R_A^T (k, l), and Q_A (in, l), in float64."""
    basis_up, right = torch.linalg.qr(adapter.up.double().flatten(1))
    basis_down, left = torch.linalg.qr(adapter.down.double().flatten(1).T)
    return basis_up, adapter.alpha * right @ left.T, basis_down


def _kept(values: Tensor, rank: int | None, energy: float | None) -> int:
    if rank is not None and rank < 1:
        raise ValueError(f"the rank is {rank}; allowed are whole numbers from 1; change the rank")
    if energy is not None and not 0 < energy <= 1:
        raise ValueError(f"the energy is {energy}; allowed are shares above 0 up to 1; change the energy")
    kept = len(values) if rank is None else min(rank, len(values))
    if energy is not None:
        shares = values.double().square().cumsum(0)
        needed = int((shares < energy * shares[-1]).sum()) + 1
        kept = min(kept, needed)
    return kept


def _product(u: Tensor, s: Tensor, vh: Tensor, like: LowRank) -> LowRank:
    """U diag(s) V^T in two factors of the shapes and types of another adapter's."""
    root = s.sqrt()
    kernel = (1,) * (like.up.ndim - 2)
    down = (root[:, None] * vh).view(-1, *like.down.shape[1:]).to(like.down.dtype)
    up = (u * root).view(-1, len(s), *kernel).to(like.up.dtype)
    return LowRank(down.contiguous(), up.contiguous(), 1.0, like.magnitude)


def _leading(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The leading singular values and vectors by a random projection, always the same one."""
    generator = torch.Generator().manual_seed(0)
    random = torch.randn(matrix.shape[1], rank + _OVERSAMPLED, generator=generator).to(matrix)
    basis, _ = torch.linalg.qr(matrix @ random)
    for _ in range(_POWERS):
        basis, _ = torch.linalg.qr(matrix.T @ basis)
        basis, _ = torch.linalg.qr(matrix @ basis)
    u, s, vh = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
    return basis @ u, s, vh


def _clamped(adapter: LowRank, quantile: float) -> LowRank:
    if not 0 < quantile <= 1:
        raise ValueError(f"the quantile is {quantile}; allowed are shares above 0 up to 1; change the quantile")
    sizes = torch.cat([adapter.down.abs().flatten(), adapter.up.abs().flatten()])
    limit = float(sizes.kthvalue(max(1, math.ceil(quantile * len(sizes)))).values)
    return LowRank(adapter.down.clamp(-limit, limit), adapter.up.clamp(-limit, limit), adapter.alpha, adapter.magnitude)
