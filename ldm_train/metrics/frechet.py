r"""The Frechet distance between two sets of images, seen as Gaussians in a feature space.

    d^2 = |mu_1 - mu_2|^2 + Tr S_1 + Tr S_2 - 2 Tr (S_1 S_2)^{1/2}

with the mean mu and the covariance S of each set's features (Heusel et al., "GANs Trained by a Two Time-Scale Update
Rule Converge to a Local Nash Equilibrium", 2017). Both come from three sums over the images,

    n,   sum x,   sum x x^T        in float64,

so parts of a set can be summed by different processes. The last trace is computed in the symmetric form

    Tr (S_1 S_2)^{1/2} = sum_i lambda_i^{1/2},      lambda = eigenvalues of S_1^{1/2} S_2 S_1^{1/2} >= 0,

which is exact where the general eigenvalue problem of S_1 S_2 is not, and five times faster at 2048 features.
The distance depends on n (it is biased upwards for few images): compare figures of equal n only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torchmetrics import Metric

from ldm_train.distributed import all_reduce_sum
from ldm_train.metrics.features import FeatureExtractor


@dataclass(frozen=True)
class GaussianStatistics:
    """The Gaussian of a set of feature vectors: their number, mean (D,) and covariance (D, D) in float64."""

    count: int
    mean: Tensor
    covariance: Tensor

    @classmethod
    def from_sums(cls, count: Tensor, total: Tensor, outer: Tensor) -> "GaussianStatistics":
        """The unbiased estimate from n, sum x (D,) and sum x x^T (D, D)."""
        if count < 2:
            raise ValueError(
                f"a Frechet distance found {int(count)} images in one of its two sets; allowed are 2 or more: "
                "change `callbacks.samples.num_images` or `callbacks.samples.num_real`."
            )
        mean = total / count
        return cls(int(count), mean, (outer - count * torch.outer(mean, mean)) / (count - 1))


def frechet_distance(first: GaussianStatistics, second: GaussianStatistics) -> Tensor:
    """The squared Frechet distance of two Gaussians, a float64 scalar >= 0."""
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    product = root @ second.covariance @ root
    cross = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    means = (first.mean - second.mean).square().sum()
    return (means + first.covariance.trace() + second.covariance.trace() - 2 * cross).clamp(min=0)


def save_statistics(path: str | Path, statistics: GaussianStatistics, identity: Mapping[str, str]) -> None:
    """Writes statistics as safetensors; `identity` says of which images and by which extractor, for the check."""
    count = torch.tensor(statistics.count)
    tensors = {"count": count, "mean": statistics.mean.cpu(), "covariance": statistics.covariance.cpu()}
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, str(path), metadata=dict(identity))


def load_statistics(path: str | Path, identity: Mapping[str, str]) -> GaussianStatistics:
    """Reads what `save_statistics` wrote.

    Raises:
        ValueError: the file's identity differs from the one asked for.
    """
    with safe_open(str(path), framework="pt") as file:
        found = file.metadata() or {}
        if found != dict(identity):
            raise ValueError(
                f"found reference statistics of {found} in {path}; allowed are those of {dict(identity)}: delete the "
                "file to have it made anew, or change `callbacks.samples.reference_statistics`."
            )
        return GaussianStatistics(int(file.get_tensor("count")), file.get_tensor("mean"), file.get_tensor("covariance"))


class FrechetDistance(Metric):
    """The Frechet distance between real and generated images in the feature space of an extractor.

    Args:
        extractor: maps images to features; its name decides the figure's key, see `fid_key`.

    Real images can be summed once (`update(real=True)`, then `keep_reference()`), or their statistics given to
    `set_reference`; both outlast `reset()`, which then starts the next set of generated images.
    """

    higher_is_better = False
    is_differentiable = False
    full_state_update = False

    real_count: Tensor
    real_sum: Tensor
    real_outer: Tensor
    fake_count: Tensor
    fake_sum: Tensor
    fake_outer: Tensor

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__(dist_sync_fn=_sum_over_ranks)
        self.extractor = extractor
        self.reference: GaussianStatistics | None = None
        d = extractor.num_features
        for side in ("real", "fake"):
            self.add_state(f"{side}_count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")
            self.add_state(f"{side}_sum", torch.zeros(d, dtype=torch.float64), dist_reduce_fx="sum")
            self.add_state(f"{side}_outer", torch.zeros(d, d, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, images: Tensor, real: bool) -> None:
        """Adds this rank's (B, 3, H, W) images, uint8 or float in [-1, 1], to the real or the generated set."""
        if real and self.reference is not None:
            raise RuntimeError("real images were given to a FrechetDistance that has its reference already")
        features = self.extractor(images).double()
        side = "real" if real else "fake"
        for name, value in (("count", len(features)), ("sum", features.sum(0)), ("outer", features.T @ features)):
            setattr(self, f"{side}_{name}", getattr(self, f"{side}_{name}") + value)

    def compute(self) -> Tensor:
        """The distance over all ranks' images, a float64 scalar."""
        real = self.reference or GaussianStatistics.from_sums(self.real_count, self.real_sum, self.real_outer)
        fake = GaussianStatistics.from_sums(self.fake_count, self.fake_sum, self.fake_outer)
        return frechet_distance(real, fake)

    def keep_reference(self) -> GaussianStatistics:
        """Makes the real images seen so far, on all ranks, the reference; every rank must call it."""
        sums = (self.real_count, self.real_sum, self.real_outer)
        self.set_reference(GaussianStatistics.from_sums(*map(all_reduce_sum, sums)))
        assert self.reference is not None
        return self.reference

    def set_reference(self, statistics: GaussianStatistics) -> None:
        """Takes the statistics of all real images, the same on every rank."""
        if len(statistics.mean) != self.extractor.num_features:
            raise ValueError(
                f"found reference statistics of {len(statistics.mean)} features; allowed are "
                f"{self.extractor.num_features} of extractor {self.extractor.name}: change "
                "`callbacks.samples.reference_statistics`."
            )
        mean, covariance = (v.to(self.device, torch.float64) for v in (statistics.mean, statistics.covariance))
        self.reference = GaussianStatistics(statistics.count, mean, covariance)


def _sum_over_ranks(state: Tensor, group: object = None) -> list[Tensor]:
    """In place of a gather of all ranks' states, 33 MB each for Inception, to add them up: an all-reduce needs one."""
    return [all_reduce_sum(state)]
