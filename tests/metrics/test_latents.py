import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ldm_train.metrics import CodebookUsage, LatentStatistics
from tests.ranks import run_ranks


def _posteriors(images, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mean = 3.0 * torch.randn(images, 4, 5, 6, generator=generator) + torch.arange(4.0).view(4, 1, 1)
    return mean, torch.rand(images, 4, 5, 6, generator=generator) + 0.1


def _summary(mean, variance):
    metric = LatentStatistics(4, with_divergence=True)
    metric.update(mean, variance)
    return metric.compute()


def _indices(count):
    return torch.randint(0, 20, (count, 3, 3), generator=torch.Generator().manual_seed(0))


def _usage(indices):
    metric = CodebookUsage(32)
    metric.update(indices)
    return metric.compute()


class TestLatentStatistics:
    def test_mean_and_std_are_those_of_draws(self):
        mean, variance = _posteriors(2)
        noise = torch.randn(4000, *mean.shape, generator=torch.Generator().manual_seed(1))
        draws = (mean + variance.sqrt() * noise).flatten(0, 1).double()
        summary = _summary(mean, variance)
        torch.testing.assert_close(summary.mean, draws.mean(dim=(0, 2, 3)), atol=0.02, rtol=0)
        torch.testing.assert_close(summary.std, draws.std(dim=(0, 2, 3)), atol=0, rtol=0.01)

    def test_without_variance_the_std_is_that_of_the_means(self):
        mean, variance = _posteriors(7)
        expected = mean.double().std(dim=(0, 2, 3), correction=0)
        torch.testing.assert_close(_summary(mean, torch.zeros_like(variance)).std, expected)

    def test_divergence_is_that_of_torch_distributions(self):
        mean, variance = _posteriors(7)
        divergence = kl_divergence(Normal(mean.double(), variance.double().sqrt()), Normal(0.0, 1.0))
        torch.testing.assert_close(_summary(mean, variance).divergence, divergence.sum(dim=(2, 3)).mean(dim=0))

    def test_a_constant_far_from_zero_has_no_deviation(self):
        constant = torch.full((3, 4, 5, 6), 123.456)  # here E[m^2] - E[m]^2 is rounded to less than zero
        assert torch.all(_summary(constant, torch.zeros_like(constant)).std < 1e-4)

    def test_parts_of_any_size_equal_the_whole(self):
        mean, variance = _posteriors(10)
        metric = LatentStatistics(4, with_divergence=True)
        for part in zip(mean.split(3), variance.split(3), strict=True):
            metric.update(*part)
        torch.testing.assert_close(metric.compute(), _summary(mean, variance))

    def test_a_posterior_without_variance_has_no_divergence(self):
        mean, variance = _posteriors(2)
        metric = LatentStatistics(4, with_divergence=False)
        metric.update(mean, torch.zeros_like(variance))
        assert metric.compute().divergence is None

    @pytest.mark.filterwarnings("ignore:The ``compute`` method")
    def test_no_images_are_refused(self):
        with pytest.raises(ValueError, match=r"0 images.*allowed.*`callbacks\.calibration\.num_images`"):
            LatentStatistics(4, with_divergence=False).compute()


class TestCodebookUsage:
    def test_equally_frequent_codes_count_themselves(self):
        usage, perplexity = _usage(torch.arange(8).repeat(5))
        assert float(usage) == 8 / 32
        assert float(perplexity) == pytest.approx(8.0)

    def test_perplexity_is_the_exponential_of_the_entropy(self):
        frequencies = [0.5, 0.25, 0.25]
        entropy = -sum(p * math.log(p) for p in frequencies)
        assert float(_usage(torch.tensor([9, 9, 3, 4])).perplexity) == pytest.approx(math.exp(entropy))

    def test_parts_equal_the_whole(self):
        indices, metric = _indices(10), CodebookUsage(32)
        for part in indices.split(3):
            metric.update(part)
        torch.testing.assert_close(metric.compute(), _usage(indices))


def _one_rank(rank, init_file, world):
    (mean, variance), indices = _posteriors(7), _indices(7)
    expected = _summary(mean, variance), _usage(indices)  # of one process: there is no group yet
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    found = _summary(mean[rank::world], variance[rank::world]), _usage(indices[rank::world])
    torch.testing.assert_close(found, expected)
    torch.distributed.destroy_process_group()


@pytest.mark.distributed
def test_two_ranks_with_a_part_of_the_images_each_equal_one_process(tmp_path):
    run_ranks(_one_rank, tmp_path / "rendezvous", 2)
