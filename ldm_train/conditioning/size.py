"""Micro-conditioning: how large an image was and what was cut off it, told to the network as a vector.

    c = [e(H_0), e(W_0), e(top), e(left), e(H), e(W)],   e: sinusoids of D / 6 channels

(Podell et al. 2023, "SDXL: Improving latent diffusion models for high-resolution image synthesis", section 2.2.)
H_0 and W_0 are the image's size as it was found: small ones are blurred when enlarged, and a network that knows which
were need not blur the others, nor leave them out. `top` and `left` are the pixels cut off above and to the left, in the
resized image: a network that knows what was cut does not cut off heads when it is told that nothing was. H and W are
the size of what is shown, which differs between aspect buckets (section 2.3). The numbers enter as they are, in pixels.

Mirroring: the published recipe mirrors nothing. Here `left` counts what is missing on the side that is left *after* the
mirroring, for that is what is to be seen in the image. It is the data set that fills it in.

Without such facts, when images are generated from prompts, the best is assumed: H_0, W_0 = H, W, and nothing cut off.
The null condition is zeros. Letters: B batch, D width of the vector.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.nn import FirstStage
from ldm_train.nn.embedding import sinusoidal_embedding

_NUMBERS = 6


class SizeConditioner(Conditioner):
    """The original size, the crop and the target size as sinusoids, side by side.

    Args:
        vector_dim: width D of all six together; each has D / 6 channels, an even number.
        drop_rate: the share of training examples that are told nothing.

    Raises:
        ValueError: if six even numbers of channels do not fill the width.
    """

    def __init__(self, vector_dim: int = 1536, drop_rate: float = 0.0) -> None:
        super().__init__(drop_rate)
        if vector_dim < 1 or vector_dim % (2 * _NUMBERS):
            raise ValueError(
                f"vector_dim is {vector_dim}; allowed are multiples of {2 * _NUMBERS}, for six numbers have an even "
                "count of channels each (published: 6 x 256 = 1536); change `conditioner.vector_dim`"
            )
        self.vector_dim: int = vector_dim

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """Embed B triples of sizes; `drop` (B,) bool marks those replaced by zeros.

        Raises:
            ValueError: if sizes are missing in training.
        """
        numbers = self._numbers(batch, _shown(batch, first_stage))  # (B, 6)
        vector = sinusoidal_embedding(numbers.flatten(), self.vector_dim // _NUMBERS).view(len(numbers), -1)  # (B, D)
        if drop is not None:
            vector = vector.masked_fill(drop[:, None], 0.0)
        return Conditioning(vector=vector)

    def describe(self, batch: ImageTextBatch) -> list[str]:
        """The sizes, widths first, and where the crop begins."""
        return [
            f"{w0} x {h0} px, cut at left {left} and top {top}, shown at {w} x {h}"
            for h0, w0, top, left, h, w in self._numbers(batch, batch["image"].shape[-2:]).tolist()
        ]

    def _numbers(self, batch: ImageTextBatch, size: Sequence[int]) -> Tensor:
        """(B, 6) int64: original height and width, top and left, height and width shown, which `size` gives."""
        count, ids = len(batch["sample_id"]), batch["sample_id"]
        shown = torch.stack([ids.new_full((count,), side) for side in size], 1)  # a tensor of numbers would be sent
        has_sizes = "original_size" in batch and "crop" in batch
        if self.training and not has_sizes:
            raise ValueError(
                "the batch has no `original_size` or no `crop`; allowed are data that keep them, as shards of images "
                "do; change `data`, or take another `conditioner`"
            )
        original = batch.get("original_size", shown)
        crop = batch.get("crop", torch.zeros_like(shown))
        return torch.cat((original, crop, shown), dim=1)


def _shown(batch: ImageTextBatch, first_stage: FirstStage) -> Sequence[int]:
    """Height and width in pixels of what a batch shows, be it images or cached latents."""
    if "image" in batch:
        return batch["image"].shape[-2:]
    return [side * first_stage.downsampling_factor for side in batch["moments"].shape[-2:]]
