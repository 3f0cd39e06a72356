"""Inpainting masks: the image with a hole in it, and where the hole is.

Each sample has a shape and a share s of the image that is to be filled. A shape is a field d over the pixels that says
how far each is from the shape's core, and the hole is where it is least:

    hole = {p : d(p) <= q},   q such that the hole covers the share s

so a hole of any shape has the size that was drawn for it, all on the device and without loops over samples. Shapes:

    boxes       d = distance to the nearest of up to three centres, in the maximum norm, each with its own proportions
    strokes     d = distance to a random polyline: as a brush draws it, the thicker the larger the share
    half        d = distance to a line: one side of the image is missing (outpainting)
    everything  no d; the hole is the whole image, so that the model learns to make images from nothing too

(as mixtures of wide strokes and boxes in Suvorov et al. 2022, section 2.3, and Rombach et al. 2022, section 4.5). All
is a function of (seed, epoch, sample id); in validation the epoch is 0, so holes never change. The null condition is
the hole that is everything.
Letters: B batch, C latent channels, H and W image height and width, h and w those of the latents.
"""

import itertools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.nn import FirstStage
from ldm_train.randomness import Stream, uniform

KINDS = ("boxes", "strokes", "half", "everything")
_BOXES, _STROKES, _HALF, _EVERYTHING = range(len(KINDS))
_MIXTURE = {"boxes": 0.4, "strokes": 0.4, "half": 0.1, "everything": 0.1}
_MAX_BOXES, _MAX_SEGMENTS = 3, 7


class _Convention(NamedTuple):
    """How published models want their condition.

    Attributes:
        mask_first: the mask comes before the latents, not behind them.
        known: the mask's value where the image is known; in the hole it is 1.
        hole_colour: the value of the pixels in the hole.
    """

    mask_first: bool
    known: float
    hole_colour: float


_CONVENTIONS = {
    "stable_diffusion": _Convention(mask_first=True, known=0.0, hole_colour=0.0),
    "latent_diffusion": _Convention(mask_first=False, known=-1.0, hole_colour=-1.0),
}


class MaskConditioner(Conditioner):
    """Latents of the image with a hole, and the hole, beside the noisy latents: C + 1 channels.

    Args:
        seed: the run's seed.
        concat_channels: C + 1; checked against the latents.
        hole_share: least and largest share of the image that the hole covers, except where it is everything.
        kinds: how often each of `KINDS` is drawn, in proportion; those that are left out never are. `None`: boxes and
            strokes 0.4 each, half and everything 0.1 each.
        convention: `stable_diffusion`: the mask (hole 1, known 0), then the latents of the image with a grey hole;
            `latent_diffusion`: the latents of the image with a black hole, then the mask (hole 1, known -1).
        drop_rate: the share of training images whose hole becomes everything.

    Raises:
        ValueError: if an argument is out of its range.
    """

    needs_pixels = True

    def __init__(
        self,
        seed: int,
        concat_channels: int,
        hole_share: Sequence[float] = (0.1, 0.6),
        kinds: Mapping[str, float] | None = None,
        convention: Literal["stable_diffusion", "latent_diffusion"] = "stable_diffusion",
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(drop_rate)
        kinds = dict(_MIXTURE if kinds is None else kinds)
        in_order = len(hole_share) == 2 and 0.0 < hole_share[0] <= hole_share[-1] < 1.0
        _check(in_order, "hole_share", list(hole_share), "two shares above 0 and below 1, the smaller first")
        is_mixture = set(kinds) <= set(KINDS) and min(kinds.values(), default=-1.0) >= 0.0 and sum(kinds.values()) > 0.0
        _check(is_mixture, "kinds", kinds, f"proportions from 0, not all 0, of {', '.join(KINDS)}")
        _check(convention in _CONVENTIONS, "convention", convention, f"{' and '.join(_CONVENTIONS)}")
        self.seed, self.concat_channels = seed, concat_channels
        self.hole_share = (float(hole_share[0]), float(hole_share[1]))
        self.convention = _CONVENTIONS[convention]
        *ends, total = itertools.accumulate(kinds.get(kind, 0.0) for kind in KINDS)
        self._edges = [end / total for end in ends]  # a draw belongs to the kind whose edges it lies between

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """Condition on the drawn holes; `drop` (B,) bool marks the images of which nothing is known.

        Raises:
            ValueError: if the latents have other channels than stated.
        """
        return self.condition_on(batch["image"], self.masks(batch), first_stage, drop)

    def check(self, first_stage: FirstStage) -> None:
        """Compare the channels that are made with those that were stated."""
        made = first_stage.latent_channels + 1
        _check(made == self.concat_channels, "concat_channels", self.concat_channels, f"{made}: the latents' and one")

    def condition_on(
        self, image: Tensor, mask: Tensor, first_stage: FirstStage, drop: Tensor | None = None
    ) -> Conditioning:
        """Condition on given holes.

        Args:
            image: (B, 3, H, W) in [-1, 1].
            mask: (B, 1, H, W), 1 in the hole and 0 where the image is known.
            first_stage: where the latents come from.
            drop: (B,) bool, true where the hole is to be everything.

        Raises:
            ValueError: if the latents have other channels than stated.
        """
        self.check(first_stage)
        if drop is not None:
            mask = mask.masked_fill(drop[:, None, None, None], 1.0)
        with torch.no_grad():
            latents = first_stage.encode(self._filled(image, mask)).to(image.dtype)  # (B, C, h, w)
        # A latent of which any pixel is missing says nothing for sure: it is in the hole.
        cells = F.max_pool2d(mask, first_stage.downsampling_factor)  # (B, 1, h, w)
        cells = self.convention.known + (1.0 - self.convention.known) * cells
        maps = [cells, latents] if self.convention.mask_first else [latents, cells]
        return Conditioning(concat=torch.cat(maps, dim=1))

    def masks(self, batch: ImageTextBatch) -> Tensor:
        """The samples' holes, or those that the batch has: (B, 1, H, W) float32, 1 in the hole, 0 where it is known."""
        if "hole" in batch:
            return batch["hole"]
        height, width = batch["image"].shape[-2:]
        counts = (1, 1, 1 + 4 * _MAX_BOXES, 4 + 2 * _MAX_SEGMENTS, 1)
        draws = uniform(self.seed, batch["epoch"], batch["sample_id"], Stream.MASK, (sum(counts),))
        kind, share, boxes, strokes, half = draws.split(counts, dim=1)
        y = (torch.arange(height, device=draws.device) + 0.5) / height
        x = (torch.arange(width, device=draws.device) + 0.5) / width
        grid = torch.stack(torch.meshgrid(y, x, indexing="ij"))  # (2, H, W)
        chosen = torch.stack([kind >= edge for edge in self._edges]).sum(0)[..., None]  # (B, 1, 1) numbers of `KINDS`
        field = torch.where(chosen == _BOXES, _box_field(boxes, grid), _stroke_field(strokes, grid))
        field = torch.where(chosen == _HALF, _half_field(half, grid), field)
        low, high = self.hole_share
        return _least(field, torch.where(chosen[:, 0] == _EVERYTHING, 1.0, low + (high - low) * share))[:, None]

    def masked_image(self, batch: ImageTextBatch) -> Tensor:
        """The images with their holes: (B, 3, H, W) in [-1, 1]."""
        return self._filled(batch["image"], self.masks(batch))

    def show(self, batch: ImageTextBatch, first_stage: FirstStage) -> Tensor:
        """The images with their holes: (B, 3, H, W) in [-1, 1]."""
        return self.masked_image(batch)

    def _filled(self, image: Tensor, mask: Tensor) -> Tensor:
        return torch.where(mask > 0.0, self.convention.hole_colour, image)


def _box_field(draws: Tensor, grid: Tensor) -> Tensor:
    """Distance to the nearest of one to three boxes' centres: (B, 1 + 4 boxes) uniform draws to (B, H, W)."""
    used = 1 + (_MAX_BOXES * draws[:, 0]).floor()  # (B,)
    field = torch.full((len(draws), *grid.shape[1:]), torch.inf, device=draws.device)
    for i, box in enumerate(draws[:, 1:].split(4, dim=1)):
        centre, size, aspect = box.split((2, 1, 1), dim=1)
        # Boxes are half as large as the largest or more, and up to four times as long as wide.
        extent = (0.5 + 0.5 * size) * torch.exp2(torch.cat((2.0 * aspect - 1.0, 1.0 - 2.0 * aspect), dim=1))
        distance = ((grid - centre[..., None, None]).abs() / extent[..., None, None]).amax(1)
        field = torch.where((i < used)[:, None, None], torch.minimum(field, distance), field)
    return field


def _stroke_field(draws: Tensor, grid: Tensor) -> Tensor:
    """Distance to a polyline of two to seven segments: (B, 4 + 2 segments) uniform draws to (B, H, W)."""
    steps = draws[:, 4:].unflatten(1, (_MAX_SEGMENTS, 2))
    turns = torch.pi * (steps[..., 0] - 0.5)  # up to a right angle at each vertex
    angle = 2.0 * torch.pi * draws[:, 3:4] + turns.cumsum(1)
    length = 0.1 + 0.3 * steps[..., 1]
    moves = torch.stack((length * torch.sin(angle), length * torch.cos(angle)), dim=-1)
    vertices = draws[:, None, 1:3] + F.pad(moves.cumsum(1), (0, 0, 1, 0))  # (B, segments + 1, 2)
    # At the image's border a stroke is reflected.
    vertices = 1.0 - (1.0 - vertices.remainder(2.0)).abs()
    used = 2 + ((_MAX_SEGMENTS - 1) * draws[:, 0]).floor()  # (B,) segments
    field = torch.full((len(draws), *grid.shape[1:]), torch.inf, device=draws.device)
    for i in range(_MAX_SEGMENTS):
        distance = _distance_to_segment(grid, vertices[:, i], vertices[:, i + 1])
        field = torch.where((i < used)[:, None, None], torch.minimum(field, distance), field)
    return field


def _distance_to_segment(grid: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Distance of the points (2, H, W) to the segments from a (B, 2) to b (B, 2): (B, H, W)."""
    to_point, along = grid - a[..., None, None], (b - a)[..., None, None]
    place = ((to_point * along).sum(1) / along.square().sum(1).clamp_min(1e-12)).clamp(0.0, 1.0)
    return (to_point - place[:, None] * along).square().sum(1).sqrt()


def _half_field(draws: Tensor, grid: Tensor) -> Tensor:
    """Distance along a direction: (B, 1) uniform draws to (B, H, W)."""
    angle = 2.0 * torch.pi * draws[..., None]
    return grid[0] * torch.sin(angle) + grid[1] * torch.cos(angle)


def _least(field: Tensor, share: Tensor) -> Tensor:
    """1 where a field (B, H, W) has its least values, a share (B, 1) of all pixels (or one pixel), and 0 elsewhere."""
    values = field.flatten(1)
    count = (share * values.shape[1]).round().long().clamp(1, values.shape[1])
    threshold = values.sort(dim=1).values.gather(1, count - 1)
    return (values <= threshold).to(field.dtype).reshape(field.shape)


def _check(is_allowed: bool, key: str, found: object, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{key} is {found}; allowed are {allowed}; change `conditioner.{key}`")
