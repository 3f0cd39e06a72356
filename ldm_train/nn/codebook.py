r"""The arithmetic of a codebook that many ranks share: nearest codes, their counts and sums, k-means, random draws.

For N latents z_n and K codes e_k, each of C channels,

    q(n) = argmin_k |z_n - e_k|,    n_k = #{n : q(n) = k},    s_k = sum_{n : q(n) = k} z_n

(van den Oord et al., "Neural Discrete Representation Learning", 2017, eq. 1). Each rank finds, counts and sums the
codes of its own latents; counts and sums are then added over ranks. Sums are float64, so they hardly depend on their
order, and a codebook learned by two ranks is that learned by one process from the joined batch.

Letters: N latents of this rank, C channels, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_train.distributed import all_gather_cat, all_reduce_sum

_LARGEST_BLOCK = 2**24  # distances held at a time: 64 MB
_FEW_CHANNELS = 16  # up to which distances are summed channel by channel


@torch.no_grad()
def nearest_codes(z: Tensor, codes: Tensor) -> Tensor:
    """The code nearest to each latent.

    Args:
        z: (N, C) float32.
        codes: (K, C) float32.

    Returns:
        (N,) int64; the memory for it does not grow with N K.
    """
    rows = max(1, _LARGEST_BLOCK // len(codes))
    return torch.cat([_distances(part, codes).argmin(dim=1) for part in z.split(rows)])


def _distances(z: Tensor, codes: Tensor) -> Tensor:
    """Of each latent (N, C) to each code (K, C), squared or not: (N, K) float32."""
    if z.shape[1] > _FEW_CHANNELS:
        return torch.cdist(z, codes)
    # A matrix product would do it in one call, but there |z - e|^2 cancels, loses digits to TF32, and depends on how
    # many latents it is for. `cdist` without one is slow on a GPU, where it starts a block for each pair.
    distances = (z[:, :1] - codes[:, 0]).square_()
    for channel in range(1, z.shape[1]):
        difference = z[:, channel : channel + 1] - codes[:, channel]
        distances.addcmul_(difference, difference)
    return distances


def code_counts(indices: Tensor, codebook_size: int) -> Tensor:
    """n_k (K,) int64 of the codes (N,) of this rank's latents; unlike `bincount` it does not wait for the GPU."""
    counts = torch.zeros(codebook_size, dtype=torch.int64, device=indices.device)
    return counts.index_add_(0, indices, torch.ones_like(indices))


def code_sums(z: Tensor, indices: Tensor, codebook_size: int) -> Tensor:
    """s_k (K, C) float64 of this rank's latents (N, C) and their codes (N,)."""
    sums = torch.zeros(codebook_size, z.shape[1], dtype=torch.float64, device=z.device)
    return sums.index_add_(0, indices, z.detach().double())


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy) of the frequencies behind counts (K,): a float64 scalar, 1 where all counts are zero."""
    frequencies = counts.double() / counts.sum().clamp(min=1)
    return torch.special.entr(frequencies).sum().exp()


@torch.no_grad()
def draw_over_ranks(z: Tensor, scores: Tensor, count: int) -> Tensor:
    """Latents drawn from all ranks without replacement: those of the highest scores.

    With independent scores of one distribution every choice is equally likely; with scores that belong to the samples
    the choice does not depend on how the samples are spread over ranks.

    Args:
        z: (N, C) this rank's latents; N is the same on every rank.
        scores: (N,) their scores.
        count: latents wanted.

    Returns:
        (n, C), by falling score, the same on every rank; n is `count`, or the latents there are if they are fewer.
    """
    best, rows = scores.topk(min(count, len(scores)))
    best, candidates = all_gather_cat(best), all_gather_cat(z[rows])
    return candidates[best.topk(min(count, len(best))).indices]


@torch.no_grad()
def k_means(z: Tensor, centres: Tensor, iterations: int, on_sphere: bool) -> Tensor:
    """Lloyd's algorithm over the latents of all ranks.

    Args:
        z: (N, C) this rank's latents, of length 1 if `on_sphere`.
        centres: (K, C) to start from, the same on every rank.
        iterations: steps; none raises the mean squared distance of the latents from their centres.
        on_sphere: centres have length 1 (spherical k-means).

    Returns:
        (K, C) centres; one without latents stays where it was.
    """
    for _ in range(iterations):
        indices = nearest_codes(z, centres)
        counts = all_reduce_sum(code_counts(indices, len(centres)))
        sums = all_reduce_sum(code_sums(z, indices, len(centres)))
        # A sum and its mean have one direction: on the sphere there is nothing to divide by.
        means = F.normalize(sums, dim=1) if on_sphere else sums / counts[:, None]
        centres = torch.where(counts[:, None] > 0, means.to(centres.dtype), centres)
    return centres
