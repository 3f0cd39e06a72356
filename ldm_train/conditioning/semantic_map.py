"""Semantic maps: a class for each pixel, as small as the latents and beside them.

    concat = W m,   m(k, i, j) = share of the pixels under latent (i, j) that are of class k

(Rombach et al. 2022, section 4.3.2 and appendix D.1: K = 182 classes, C = 3 channels.) W, a convolution of size 1
without bias, and the average commute, and W times a one-hot vector is a column of W: so each pixel looks up C numbers
and these are averaged, which takes C maps of the image's size where the one-hot maps are K. Pixels of no class count
as zeros, and the null condition is an image of such pixels.
Letters: B batch, K classes, C channels, H and W image height and width, h and w those of the latents.
"""

import colorsys

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.nn import FirstStage

_GOLDEN_RATIO = (5.0**0.5 - 1.0) / 2.0


class SemanticMapConditioner(Conditioner):
    """Learned colours of the classes, averaged to the size of the latents.

    Args:
        num_classes: K.
        concat_channels: C.
        drop_rate: the share of training maps replaced by the null one.

    Raises:
        ValueError: if there are no classes or no channels.
    """

    def __init__(self, num_classes: int, concat_channels: int = 3, drop_rate: float = 0.1) -> None:
        super().__init__(drop_rate)
        for key, value in (("num_classes", num_classes), ("concat_channels", concat_channels)):
            if value < 1:
                raise ValueError(f"{key} is {value}; allowed are numbers from 1; change `conditioner.{key}`")
        self.num_classes, self.concat_channels = num_classes, concat_channels
        # Row K stays zero: pixels of no class. The others start at the scale of the latents they lie beside.
        self.embedding = nn.Embedding(num_classes + 1, concat_channels, padding_idx=num_classes)

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """The maps (B, C, h, w); `drop` (B,) bool marks those replaced by zeros.

        Raises:
            ValueError: if the batch has no maps.
        """
        classes = self._classes(batch)  # (B, H, W)
        if drop is not None:
            classes = torch.where(drop[:, None, None], self.num_classes, classes)
        pixels = self.embedding(classes).permute(0, 3, 1, 2)  # (B, C, H, W)
        return Conditioning(concat=F.avg_pool2d(pixels, first_stage.downsampling_factor))

    def show(self, batch: ImageTextBatch, first_stage: FirstStage) -> Tensor:
        """The maps as pictures, a colour for each class and black for none: (B, 3, H, W) in [-1, 1]."""
        classes = self._classes(batch)
        # Hues in golden-ratio steps: however many classes there are, neighbours in number differ.
        colours = [
            colorsys.hsv_to_rgb(k * _GOLDEN_RATIO % 1.0, 0.85, 1.0 - 0.4 * (k % 2)) for k in range(self.num_classes)
        ]
        palette = torch.tensor([*colours, (0.0, 0.0, 0.0)], device=classes.device)
        return palette[classes].permute(0, 3, 1, 2) * 2.0 - 1.0

    def _classes(self, batch: ImageTextBatch) -> Tensor:
        if "segmentation" not in batch:
            raise ValueError(
                "the batch has no `segmentation`; allowed is data that gives a class for each pixel; change "
                "`data.segmentation`, which says where maps come from, or take another `conditioner`"
            )
        classes = batch["segmentation"]
        # On a GPU the question would make the processor wait; there the look-up itself refuses.
        if classes.device.type == "cpu" and (largest := int(classes.max())) >= self.num_classes:
            raise ValueError(
                f"a map holds class {largest}; allowed are 0 to {self.num_classes - 1}; change "
                "`conditioner.num_classes` to that of `data.segmentation`"
            )
        return torch.where(classes < 0, self.num_classes, classes)
