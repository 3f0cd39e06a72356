"""A large image through a convolutional network in tiles, so that memory depends on the tile and not on the image.

Input and output share a grid of cells; a cell is `in_cell` pixels of the input and `out_cell` of the output on a side.
Along each axis, tiles of S cells start at evenly spread positions, and neighbours overlap by L >= the overlap asked
for. The output is the weighted mean of the tiles,

    y(p) = sum_i w_i(p) y_i(p),      sum_i w_i(p) = 1,

with weights that change linearly across an overlap: for the tile that begins there, at distance d from its edge,

    w = clamp((d - L/4) / (L/2), 0, 1).

The outer quarter of an overlap has weight zero because a tile is wrong next to its edges: the network pads there where
the image goes on. So a network that sees no further than r cells gives the same as without tiles if L >= 4r. Group
normalisation and attention see the whole tile, and the result is then near to that without tiles and free of seams.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """The part of one axis that a tile covers, in cells, and its weight for each of its pixels of the output."""

    start: int
    stop: int
    weight: Tensor


def tiled(
    function: Callable[[Tensor], Tensor], x: Tensor, size: int, overlap: int, in_cell: int = 1, out_cell: int = 1
) -> Tensor:
    """Apply a function to tiles of its input and blend the results; an input that fits into one tile goes as it is.

    Args:
        function: (B, C, a `in_cell`, b `in_cell`) to (B, D, a `out_cell`, b `out_cell`) for all a, b <= `size`.
        x: (B, C, H, W); H and W are multiples of `in_cell`.
        size: cells on a side of a tile.
        overlap: cells that neighbours share at least; less than `size`.
        in_cell: pixels of the input on a side of a cell.
        out_cell: pixels of the output on a side of a cell.

    Returns:
        (B, D, H / `in_cell` * `out_cell`, W / `in_cell` * `out_cell`) of the function's type; blended in float32.
    """
    height, width = (length // in_cell for length in x.shape[-2:])
    rows, columns = (tiles(length, size, overlap, out_cell) for length in (height, width))
    if len(rows) == len(columns) == 1:
        return function(x)
    blended, dtype = None, x.dtype
    for row in rows:
        for column in columns:
            y = function(x[..., _pixels(row, in_cell), _pixels(column, in_cell)])
            if blended is None:
                dtype = y.dtype
                wide = torch.promote_types(dtype, torch.float32)
                blended = y.new_zeros(*y.shape[:2], height * out_cell, width * out_cell, dtype=wide)
            weight = torch.outer(row.weight, column.weight).to(blended)
            blended[..., _pixels(row, out_cell), _pixels(column, out_cell)] += weight * y
    assert blended is not None
    return blended.to(dtype)


def tiles(length: int, size: int, overlap: int, out_cell: int = 1) -> list[Tile]:
    """The tiles of one axis of `length` cells; their weights add up to one at every pixel of the output."""
    if length <= size:
        return [Tile(0, length, torch.ones(length * out_cell, dtype=torch.float64))]
    steps = -(-(length - size) // (size - overlap))
    starts = [i * (length - size) // steps for i in range(steps + 1)]
    weights = torch.zeros(len(starts), length * out_cell, dtype=torch.float64)
    centre = (torch.arange(size * out_cell, dtype=torch.float64) + 0.5) / out_cell  # of a pixel, in cells from the edge
    for i, start in enumerate(starts):
        ramp = torch.ones_like(centre)
        if i > 0:
            ramp = torch.minimum(ramp, _ramp(centre, starts[i - 1] + size - start))
        if i < steps:
            ramp = torch.minimum(ramp, _ramp(size - centre, start + size - starts[i + 1]))
        weights[i, start * out_cell : (start + size) * out_cell] = ramp
    # Where an overlap is wider than half a tile, three tiles meet and their ramps add up to more than one.
    weights /= weights.sum(0)
    return [
        Tile(start, start + size, weight[start * out_cell : (start + size) * out_cell])
        for start, weight in zip(starts, weights, strict=True)
    ]


def _ramp(distance: Tensor, overlap: int) -> Tensor:
    """The weight at some distance, in cells, from the edge of a tile that shares so many cells with its neighbour."""
    if overlap == 0:
        return torch.ones_like(distance)
    return ((distance - overlap / 4) / (overlap / 2)).clamp(0, 1)


def _pixels(tile: Tile, cell: int) -> slice:
    return slice(tile.start * cell, tile.stop * cell)
