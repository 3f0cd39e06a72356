r"""Do generated images show what their captions say? Find each one's own reference among all of them.

For N captions with one reference image each, image i is generated from caption i. In a feature space phi standardised
over the references (per feature: minus the mean, divided by the standard deviation),

    retrieval@1 = 1/N sum_i [ argmin_j |phi(generated_i) - phi(reference_j)| = i ].

A model that ignores captions scores 1/N, chance; the figure times N says how many times better a model is. Equal
distances share the point, so that N equal images score chance too. The feature space is that of the Frechet distance's
extractor; with `RandomConvFeatures` the figure asks for the right colours, layout and texture, not for meaning.
"""

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from ldm_train.metrics.features import FeatureExtractor


def retrieval_at_1(generated: Tensor, references: Tensor) -> Tensor:
    """The share of rows (N, D) whose nearest reference row (N, D) is their own; a float64 scalar."""
    deviation, mean = torch.std_mean(references.double(), dim=0, correction=0)
    scale = torch.where(deviation > 0, deviation, 1.0)
    x, y = (generated.double() - mean) / scale, (references.double() - mean) / scale
    # Without matrix products equal references get equal distances, to the last bit.
    distances = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances == distances.min(dim=1, keepdim=True).values
    return (nearest.diagonal().double() / nearest.sum(dim=1)).mean()


class CaptionRetrieval(Metric):
    """Caption-to-image retrieval at 1 over all pairs given to `update`, on all ranks.

    Args:
        extractor: the feature space, see the module's text.
    """

    higher_is_better = True
    is_differentiable = False
    full_state_update = False

    generated: list[Tensor]
    references: list[Tensor]

    def __init__(self, extractor: FeatureExtractor) -> None:
        super().__init__()
        self.extractor = extractor
        self.add_state("generated", [], dist_reduce_fx="cat")
        self.add_state("references", [], dist_reduce_fx="cat")

    def update(self, generated: Tensor, references: Tensor) -> None:
        """Adds pairs: (B, 3, H, W) images generated from B captions and the images that have these captions."""
        self.generated.append(self.extractor(generated))
        self.references.append(self.extractor(references))

    def compute(self) -> dict[str, Tensor]:
        """`retrieval_at_1`, the share, and `retrieval_times_chance`, its ratio to 1/N; float64 scalars."""
        references = dim_zero_cat(self.references)
        share = retrieval_at_1(dim_zero_cat(self.generated), references)
        return {"retrieval_at_1": share, "retrieval_times_chance": share * len(references)}
