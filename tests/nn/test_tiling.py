from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ldm_train.nn.tiling import tiled, tiles

SPLITS = [(7, 3, 1), (10, 4, 0), (64, 16, 4), (65, 16, 4), (17, 16, 12), (100, 9, 8), (33, 32, 31)]


def image(height, width):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def convolutions(*layers):
    """A network that sees a few pixels far and pads with zeros, as all of ours do."""
    torch.manual_seed(0)
    return nn.Sequential(*layers).requires_grad_(False)


@pytest.mark.parametrize(("length", "size", "overlap"), SPLITS)
@pytest.mark.parametrize("out_cell", [1, 2, 8])
def test_weights_are_a_partition_of_unity(length, size, overlap, out_cell):
    total = torch.zeros(length * out_cell, dtype=torch.float64)
    for tile in tiles(length, size, overlap, out_cell):
        assert bool((tile.weight >= 0).all())
        total[tile.start * out_cell : tile.stop * out_cell] += tile.weight
    torch.testing.assert_close(total, torch.ones_like(total))


@pytest.mark.parametrize(("length", "size", "overlap"), SPLITS)
def test_tiles_are_whole_overlap_and_end_where_the_axis_ends(length, size, overlap):
    row = tiles(length, size, overlap)
    assert {tile.stop - tile.start for tile in row} == {size}
    assert (row[0].start, row[-1].stop) == (0, length)
    assert all(first.stop - second.start >= overlap for first, second in pairwise(row))
    assert len(row) == -(-(length - overlap) // (size - overlap))  # no more than are needed


def test_weights_change_linearly_across_the_middle_half_of_an_overlap():
    first, second = tiles(24, 16, 8)
    rise = torch.tensor([0.0, 0, 1, 3, 5, 7, 8, 8], dtype=torch.float64) / 8
    torch.testing.assert_close(second.weight, torch.cat([rise, torch.ones(8, dtype=torch.float64)]))
    torch.testing.assert_close(first.weight, second.weight.flip(0))


@pytest.mark.parametrize(("size", "overlap"), [(5, 0), (5, 3), (12, 11), (13, 2)])
def test_what_needs_no_neighbours_needs_no_overlap(size, overlap):
    x = image(13, 29)
    torch.testing.assert_close(tiled(lambda part: 2 * part, x, size, overlap), 2 * x)


@pytest.mark.parametrize(
    ("in_cell", "out_cell", "network"),
    [
        (1, 1, [nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 3, 3, padding=1)]),
        (4, 1, [nn.Conv2d(3, 4, 3, stride=2, padding=1), nn.SiLU(), nn.Conv2d(4, 5, 3, stride=2, padding=1)]),
        (1, 4, [nn.Conv2d(3, 4, 3, padding=1), nn.Upsample(scale_factor=4), nn.Conv2d(4, 3, 5, padding=2)]),
    ],
    ids=["same size", "smaller", "larger"],
)
def test_a_network_that_sees_a_quarter_of_the_overlap_gives_the_same(in_cell, out_cell, network):
    """These see at most two cells far."""
    network = convolutions(*network)
    x = image(20 * in_cell, 30 * in_cell)
    whole = network(x)
    torch.testing.assert_close(tiled(network, x, 10, 8, in_cell, out_cell), whole)
    assert (tiled(network, x, 10, 0, in_cell, out_cell) - whole).abs().max() > 1e-3


def test_what_fits_into_one_tile_goes_as_it_is():
    x = image(8, 12)
    assert tiled(lambda part: part, x, 12, 4) is x
    assert tiled(lambda part: part, x, 11, 4) is not x


def test_the_type_stays_and_the_sum_is_made_in_float32():
    """Three tiles share most pixels; in bfloat16 the weighted sum of equal values would not be that value."""
    x = torch.full((1, 1, 64, 64), 0.7109375, dtype=torch.bfloat16)
    result = tiled(lambda part: part, x, 24, 16)
    assert result.dtype == torch.bfloat16
    assert torch.equal(result, x)


class LargestTensor(TorchDispatchMode):
    """Watches the largest tensor that is computed within the context."""

    bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.bytes = max(self.bytes, result.nbytes)
        return result


def test_memory_follows_the_tile_and_not_the_image():
    network = convolutions(nn.Conv2d(3, 32, 3, padding=1), nn.SiLU(), nn.Conv2d(32, 1, 3, padding=1))
    x = image(96, 96)
    with LargestTensor() as whole:
        network(x)
    with LargestTensor() as in_tiles:
        tiled(network, x, 24, 8)
    assert in_tiles.bytes <= whole.bytes / 10
