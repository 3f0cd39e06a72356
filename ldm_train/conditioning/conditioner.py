"""Conditioners: from a batch to what the network is conditioned on.

The contract is one method, `forward(batch, first_stage, drop) -> Conditioning`. `drop` marks the examples whose
condition is to be replaced by the null condition, so that one network learns both p(x | c) and p(x) (Ho and Salimans
2022, algorithm 1). The null condition has no second definition: it is what `forward` gives when everything is dropped.
The first stage is lent to conditioners that are images themselves and must become as small as the latents.
"""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.nn import FirstStage
from ldm_train.randomness import Stream, uniform


class Conditioner(nn.Module, ABC):
    """What all conditioners share: the drop rate and its keyed draw.

    Args:
        drop_rate: the share of training examples whose condition is dropped.

    Attributes:
        context_dim: width of the context tokens; `None` where it gives none.
        vector_dim: width of the pooled vector; `None` where it gives none.
        concat_channels: channels of the maps that are concatenated to the latents; 0 where it gives none.
        needs_pixels: whether it looks at the pixels of images, which cached latents do not have.
        frozen_parts: names of the submodules that are loaded and never trained; checkpoints leave them out.

    Raises:
        ValueError: if the rate is no probability.
    """

    context_dim: int | None = None
    vector_dim: int | None = None
    concat_channels: int = 0
    needs_pixels: bool = False
    frozen_parts: tuple[str, ...] = ()

    def __init__(self, drop_rate: float) -> None:
        super().__init__()
        if not 0.0 <= drop_rate <= 1.0:
            raise ValueError(
                f"drop_rate is {drop_rate}; allowed are 0 to 1 (0.1 is usual); change `conditioner.drop_rate`"
            )
        self.drop_rate = drop_rate

    @abstractmethod
    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """Condition on a batch.

        Args:
            batch: B examples.
            first_stage: where the latents come from.
            drop: (B,) bool, true where the null condition is wanted, or what `draw_drop` gives; `None` drops nothing.

        Returns:
            The conditioning, whose tensors have B as first dimension.
        """

    def check(self, first_stage: FirstStage) -> None:
        """Refuse, with ValueError, a first stage whose latents do not fit; most conditioners look at none."""
        return

    def draw_drop(self, seed: int, epoch: int, sample_id: Tensor) -> Tensor:
        """Which training examples lose their condition, a function of (seed, epoch, sample id): (B,) bool.

        A conditioner of several parts gives (B, P), a column for each.
        """
        return uniform(seed, epoch, sample_id, Stream.CONDITION_DROP) < self.drop_rate

    def null(self, batch: ImageTextBatch, first_stage: FirstStage) -> Conditioning:
        """The null condition in the shapes of a batch."""
        drop = torch.ones(len(batch["sample_id"]), dtype=torch.bool, device=batch["sample_id"].device)
        return self(batch, first_stage, drop)

    def show(self, batch: ImageTextBatch, first_stage: FirstStage) -> Tensor | None:
        """The conditions as pictures (B, 3, H, W) in [-1, 1]; `None` where they are none."""
        return None

    def describe(self, batch: ImageTextBatch) -> list[str]:
        """The conditions in words, for people; the captions, unless a conditioner looks at something else."""
        return batch["caption"]


class NoConditioner(Conditioner):
    """Conditions on nothing: for unconditional models."""

    def __init__(self) -> None:
        super().__init__(drop_rate=0.0)

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """An empty conditioning."""
        return Conditioning()
