from itertools import pairwise

import pytest
import torch

from ldm_train.nn import codebook
from ldm_train.nn.codebook import code_counts, code_sums, draw_over_ranks, k_means, nearest_codes, perplexity


def _points(count, channels=4, seed=0):
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(seed))


def _distortion(z, centres):
    return torch.cdist(z, centres).min(dim=1).values.square().mean()


def test_no_code_is_nearer_than_the_nearest():
    z, codes = _points(200), _points(30, seed=1)
    distances = (z[:, None] - codes).norm(dim=2)
    chosen = distances.gather(1, nearest_codes(z, codes)[:, None])
    assert torch.all(chosen <= distances + 1e-6)


def test_blocks_of_any_size_give_the_same_codes(monkeypatch):
    z, codes = _points(200), _points(30, seed=1)
    whole = nearest_codes(z, codes)
    monkeypatch.setattr(codebook, "_LARGEST_BLOCK", 7 * len(codes))
    assert torch.equal(nearest_codes(z, codes), whole)


def test_codes_far_from_the_origin_keep_their_digits():
    codes = 1000.0 + torch.arange(4.0).view(-1, 1) * 1e-3
    assert nearest_codes(codes.clone(), codes).tolist() == [0, 1, 2, 3]


def test_counts_and_sums_are_those_of_the_groups():
    z, indices = _points(50), torch.randint(0, 5, (50,), generator=torch.Generator().manual_seed(1))
    indices[indices == 3] = 2
    groups = [z[indices == k].double() for k in range(5)]
    assert code_counts(indices, 5).tolist() == [len(group) for group in groups]
    torch.testing.assert_close(code_sums(z, indices, 5), torch.stack([group.sum(0) for group in groups]))


@pytest.mark.parametrize(
    ("counts", "expected"), [([5, 5, 5, 5], 4.0), ([9, 0, 0], 1.0), ([2, 1, 1], 2**1.5), ([0, 0], 1.0)]
)
def test_perplexity_in_closed_form(counts, expected):
    assert float(perplexity(torch.tensor(counts))) == pytest.approx(expected)


def test_the_highest_scores_are_drawn_in_order():
    z, scores = _points(6), torch.tensor([0.3, 0.9, -1.0, 2.0, 0.0, 0.5])
    assert torch.equal(draw_over_ranks(z, scores, 3), z[[3, 1, 5]])
    assert len(draw_over_ranks(z, scores, 10)) == 6


class TestKMeans:
    def test_no_step_raises_the_distortion(self):
        z = _points(300)
        distortions = [_distortion(z, k_means(z, z[:12], steps, on_sphere=False)) for steps in range(8)]
        assert all(later <= earlier for earlier, later in pairwise(distortions))
        assert distortions[-1] < 0.8 * distortions[0]

    def test_centres_end_as_means_of_their_latents(self):
        z = _points(100)
        centres = k_means(z, z[:5], 100, on_sphere=False)
        indices = nearest_codes(z, centres)
        torch.testing.assert_close(centres, torch.stack([z[indices == k].mean(0) for k in range(5)]))

    def test_a_centre_without_latents_stays(self):
        z, far = _points(20), torch.full((1, 4), 100.0)
        assert torch.equal(k_means(z, torch.cat([z[:2], far]), 5, on_sphere=False)[2:], far)

    def test_on_the_sphere_centres_are_mean_directions(self):
        z = torch.nn.functional.normalize(_points(100), dim=1)
        centres = k_means(z, z[:5], 100, on_sphere=True)
        torch.testing.assert_close(centres.norm(dim=1), torch.ones(5))
        sums = torch.stack([z[nearest_codes(z, centres) == k].sum(0) for k in range(5)])
        torch.testing.assert_close(centres, sums / sums.norm(dim=1, keepdim=True))
