"""Class labels: one learned row of numbers for each class, and one for no class.

    condition(y) = E[y],   y = 0 ... K-1,   null = E[K]

It enters by cross-attention as the one token of the context (Rombach et al. 2022, section 4.3.2, ImageNet: K = 1000,
D = 512), or as the vector that is added to the time embedding (Dhariwal and Nichol 2021).
Letters: B batch, D width, K classes.
"""

import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.nn import FirstStage


class LabelConditioner(Conditioner):
    """A learned embedding of the classes; give the width of the way it is to enter.

    Args:
        num_classes: K.
        context_dim: width D of the one context token; `None` if the label enters as a vector.
        vector_dim: width D of the vector; `None` if the label enters as context.
        drop_rate: the share of training labels replaced by the null row.

    Raises:
        ValueError: if there is no class, or not exactly one width.
    """

    def __init__(
        self, num_classes: int, context_dim: int | None = None, vector_dim: int | None = None, drop_rate: float = 0.1
    ) -> None:
        super().__init__(drop_rate)
        if num_classes < 1:
            raise ValueError(
                f"num_classes is {num_classes}; allowed are numbers from 1; change `conditioner.num_classes`"
            )
        widths = [width for width in (context_dim, vector_dim) if width is not None]
        if len(widths) != 1:
            raise ValueError(
                f"context_dim is {context_dim} and vector_dim is {vector_dim}; allowed is a width for one of them and "
                "null for the other; change `conditioner.context_dim` or `conditioner.vector_dim`"
            )
        self.num_classes = num_classes
        self.context_dim, self.vector_dim = context_dim, vector_dim
        self.embedding = nn.Embedding(num_classes + 1, widths[0])

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """Look up B labels; `drop` (B,) bool marks those replaced by the null row.

        Raises:
            ValueError: if the batch has no labels, or one that is no class.
        """
        label = self._labels(batch)
        if drop is not None:
            label = torch.where(drop, self.num_classes, label)
        embedded = self.embedding(label)  # (B, D)
        return Conditioning(vector=embedded) if self.context_dim is None else Conditioning(context=embedded[:, None])

    def describe(self, batch: ImageTextBatch) -> list[str]:
        """The numbers of the classes."""
        return [f"class {label}" for label in self._labels(batch).tolist()]

    def _labels(self, batch: ImageTextBatch) -> Tensor:
        if "label" not in batch:
            raise ValueError(
                "the batch has no `label`; allowed is data whose samples have a class; change `data.label`, which says "
                "where it is found, or take another `conditioner`"
            )
        label = batch["label"]
        # The null row would answer to the number K as well, unnoticed. To look on a GPU would hold up every step.
        is_known = label.device.type != "cpu" or bool(((label >= 0) & (label < self.num_classes)).all())
        if not is_known:
            strangers = label[(label < 0) | (label >= self.num_classes)].tolist()
            raise ValueError(
                f"a label is {strangers[0]}; allowed are 0 to {self.num_classes - 1}; change `conditioner.num_classes` "
                "or `data.label`"
            )
        return label
