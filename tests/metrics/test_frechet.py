import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

from ldm_train.metrics import (
    FeatureExtractor,
    FrechetDistance,
    GaussianStatistics,
    RandomConvFeatures,
    frechet_distance,
    load_statistics,
    save_statistics,
)
from tests.ranks import run_ranks


class TinyFeatures(FeatureExtractor):
    """Twelve features: the mean colours of four quarters, through a fixed mixing matrix."""

    name, num_features, fingerprint = "tiny", 12, "tiny"

    def __init__(self):
        super().__init__()
        self.mix = torch.randn(12, 12, generator=torch.Generator().manual_seed(0)) / 50

    def features(self, images):
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) @ self.mix


def _bytes(count, seed, top=256):
    return torch.randint(0, top, (count, 3, 8, 8), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def _distance(real, fake, extractor=None):
    metric = FrechetDistance(extractor or TinyFeatures())
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return metric.compute()


def _gaussian(mean, variances, rotation):
    covariance = rotation @ torch.diag(torch.tensor(variances, dtype=torch.float64)) @ rotation.T
    return GaussianStatistics(100, torch.tensor(mean, dtype=torch.float64), covariance)


def test_closed_form_for_covariances_that_commute():
    rotation = torch.linalg.qr(torch.randn(3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))).Q
    first = _gaussian([0.0, 0.0, 0.0], [1.0, 4.0, 9.0], rotation)
    second = _gaussian([1.0, -2.0, 2.0], [4.0, 4.0, 0.0], rotation)
    expected = 9.0 + (1 - 2) ** 2 + (2 - 2) ** 2 + (3 - 0) ** 2  # |mu|^2 + sum (sigma_1 - sigma_2)^2
    torch.testing.assert_close(frechet_distance(first, second).item(), expected)
    torch.testing.assert_close(frechet_distance(second, first).item(), expected)


def test_a_set_is_at_distance_zero_from_itself():
    images = _bytes(64, seed=0)
    assert _distance(images, images).item() == pytest.approx(0.0, abs=1e-9)


@pytest.mark.parametrize(("real", "fake"), [(300, 200), (8, 200)], ids=["full rank", "fewer images than features"])
def test_equals_torchmetrics_with_the_same_features(real, fake):
    real, fake = _bytes(real, seed=1), _bytes(fake, seed=2, top=200)
    extractor = TinyFeatures()
    other = FrechetInceptionDistance(feature=extractor, normalize=False, input_img_size=(3, 8, 8))
    other.set_dtype(torch.float64)
    other.update(real, real=True)
    other.update(fake, real=False)
    torch.testing.assert_close(_distance(real, fake, extractor), other.compute().double(), rtol=1e-6, atol=0)


def test_halves_merged_equal_the_whole():
    extractor, real, fake = RandomConvFeatures(), _bytes(40, seed=3), _bytes(30, seed=4, top=128)
    metric = FrechetDistance(extractor)
    for part in (real[:7], real[7:]):
        metric.update(part, real=True)
    for part in fake.split(11):
        metric.update(part, real=False)
    torch.testing.assert_close(metric.compute(), _distance(real, fake, extractor), rtol=1e-9, atol=0)


def test_floats_and_their_bytes_give_the_same_distance():
    real, fake = _bytes(50, seed=5), _bytes(50, seed=6, top=90)
    floats = fake.float() / 127.5 - 1
    torch.testing.assert_close(_distance(real, fake), _distance(real, floats), rtol=0, atol=0)


def test_a_kept_reference_outlasts_reset_and_a_file(tmp_path):
    real, fake = _bytes(50, seed=7), _bytes(50, seed=8, top=90)
    expected = _distance(real, fake)

    metric = FrechetDistance(TinyFeatures())
    metric.update(real, real=True)
    save_statistics(tmp_path / "new" / "real.safetensors", metric.keep_reference(), {"extractor": "tiny"})
    metric.reset()
    metric.update(fake, real=False)
    torch.testing.assert_close(metric.compute(), expected)
    with pytest.raises(RuntimeError, match="has its reference"):
        metric.update(real, real=True)

    loaded = FrechetDistance(TinyFeatures())
    loaded.set_reference(load_statistics(tmp_path / "new" / "real.safetensors", {"extractor": "tiny"}))
    loaded.update(fake, real=False)
    assert torch.equal(loaded.compute(), metric.compute())


def test_statistics_of_another_extractor_are_refused(tmp_path):
    statistics = GaussianStatistics(5, torch.zeros(3), torch.eye(3))
    save_statistics(tmp_path / "real.safetensors", statistics, {"extractor": "other"})
    with pytest.raises(ValueError, match=r"other.*real\.safetensors.*tiny.*reference_statistics"):
        load_statistics(tmp_path / "real.safetensors", {"extractor": "tiny"})
    with pytest.raises(ValueError, match="3 features; allowed are 12 of extractor tiny"):
        FrechetDistance(TinyFeatures()).set_reference(statistics)


def test_one_image_is_refused():
    with pytest.raises(ValueError, match=r"found 1 images(.|\n)*num_images"):
        _distance(_bytes(5, seed=0), _bytes(1, seed=1))


def _one_rank(rank, init_file, world):
    torch.distributed.init_process_group("gloo", init_method=f"file://{init_file}", rank=rank, world_size=world)
    real, fake = _bytes(41, seed=3), _bytes(30, seed=4, top=128)
    metric = FrechetDistance(TinyFeatures())
    metric.update(real[rank::world], real=True)
    metric.keep_reference()
    metric.update(fake[rank::world], real=False)
    torch.testing.assert_close(metric.compute(), _distance_of(real, fake), rtol=1e-9, atol=0)
    torch.distributed.destroy_process_group()


def _distance_of(real, fake):
    extractor = TinyFeatures()
    statistics = []
    for images in (real, fake):
        x = extractor(images).double()
        statistics.append(GaussianStatistics.from_sums(torch.tensor(len(x)), x.sum(0), x.T @ x))
    return frechet_distance(*statistics)


@pytest.mark.distributed
def test_two_ranks_with_half_the_images_each_equal_one_rank(tmp_path):
    run_ranks(_one_rank, tmp_path / "rendezvous", 2)
