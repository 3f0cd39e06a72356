"""A low-rank change does to a weight what two thin layers do to its output."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ldm_train.nn import LowRank

OUT, IN, RANK = 7, 5, 3


def adapter(kernel: int | None, magnitude: Tensor | None = None) -> LowRank:
    places = () if kernel is None else (kernel, kernel)
    down, up = torch.randn(RANK, IN, *places), torch.randn(OUT, RANK, *(1 for _ in places))
    return LowRank(down, up, 0.7, magnitude)


@pytest.mark.parametrize("kernel", [None, 1, 3])
def test_the_delta_acts_like_the_two_thin_layers(kernel: int | None) -> None:
    change = adapter(kernel)
    if kernel is None:
        x = torch.randn(4, IN)
        thin = F.linear(F.linear(x, change.down), change.up)
        whole = F.linear(x, change.delta())
    else:
        x = torch.randn(4, IN, 6, 6)
        thin = F.conv2d(F.conv2d(x, change.down, padding=kernel // 2), change.up)
        whole = F.conv2d(x, change.delta(), padding=kernel // 2)
    torch.testing.assert_close(whole, change.alpha * thin, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kernel", [None, 3])
def test_with_a_magnitude_each_output_has_that_length_and_the_direction_of_the_sum(kernel: int | None) -> None:
    magnitude = torch.rand(OUT) + 0.5
    change = adapter(kernel, magnitude)
    weight = torch.randn(change.weight_shape)
    merged = change.merged(weight).flatten(1)
    torch.testing.assert_close(merged.norm(dim=1), magnitude)
    cosine = F.cosine_similarity(merged, (weight + change.delta()).flatten(1))
    torch.testing.assert_close(cosine, torch.ones(OUT))


@pytest.mark.parametrize("magnitude", [None, torch.rand(OUT) + 0.5])
def test_the_multiplier_is_a_line_from_the_base_to_the_merged_weight(magnitude: Tensor | None) -> None:
    change = adapter(None, magnitude)
    weight = torch.randn(OUT, IN)
    torch.testing.assert_close(change.merged(weight, 0.0), weight)
    halfway = (weight + change.merged(weight)) / 2
    torch.testing.assert_close(change.merged(weight, 0.5), halfway)


def test_factors_that_do_not_meet_are_refused_with_their_shapes() -> None:
    with pytest.raises(ValueError, match=r"A is \(3, 5\) and its B \(7, 2\)"):
        LowRank(torch.randn(3, 5), torch.randn(7, 2))
    with pytest.raises(ValueError, match=r"A is \(3, 5\) and its B \(\)"):
        LowRank(torch.randn(3, 5), torch.tensor(1.0))
    with pytest.raises(ValueError, match="rank is 0; allowed is 1 at least"):
        LowRank(torch.randn(0, 5), torch.randn(7, 0))
    with pytest.raises(ValueError, match="magnitude"):
        LowRank(torch.randn(3, 5), torch.randn(7, 3), magnitude=torch.ones(5))
