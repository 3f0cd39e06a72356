"""`DegradedImageConditioner`: what it takes away, and that only the sample, the epoch and the seed decide it."""

import math

import pytest
import torch
from torch.nn import functional as F

from ldm_train.conditioning import DegradedImageConditioner
from ldm_train.conditioning.degraded_image import gaussian_blur
from tests.conditioning.images import Averages, assert_contract, batch_of, rows

NOISY = {"max_noise": 0.4, "vector_dim": 8}


def wave(frequency, size=64):
    """An image that is a cosine of `frequency` radians a pixel from left to right, away from the borders."""
    return torch.cos(frequency * torch.arange(size)).expand(1, 3, size, size)


@pytest.mark.parametrize("sigma", [0.7, 1.5, 3.0])
@pytest.mark.parametrize("transposed", [False, True])
def test_blur_damps_waves_as_a_gaussian_does(sigma, transposed):
    for frequency in (0.1, 0.4, 0.8):
        image = wave(frequency).mT if transposed else wave(frequency)
        blurred = gaussian_blur(image, torch.tensor([sigma]), 3.0)
        inside = slice(20, 44)
        expected = math.exp(-0.5 * (sigma * frequency) ** 2) * image
        # Kernels that end at three deviations leave out 0.3 % of the Gaussian.
        torch.testing.assert_close(blurred[..., inside, inside], expected[..., inside, inside], atol=6e-3, rtol=0)


def test_each_image_is_blurred_by_its_own_deviation():
    images, sigma = batch_of(4)["image"], torch.tensor([0.0, 0.5, 2.0, 4.0])
    blurred = gaussian_blur(images, sigma, 4.0)
    assert torch.equal(blurred[0], images[0])
    alone = [gaussian_blur(images[i : i + 1], sigma[i : i + 1], 4.0) for i in range(4)]
    torch.testing.assert_close(blurred, torch.cat(alone))
    flat = torch.full((4, 3, 9, 9), 0.3)
    torch.testing.assert_close(gaussian_blur(flat, sigma, 4.0), flat)
    deviations = blurred.flatten(1).std(1)
    assert (deviations.diff() < 0).all()


def test_low_resolution_keeps_what_is_coarse_and_loses_what_is_fine():
    coarse, fine = wave(0.1), wave(3.0)
    conditioner = DegradedImageConditioner(0, factor=4)
    small, nothing = (conditioner.low_resolution(batch_of(1, 64) | {"image": image}) for image in (coarse, fine))
    assert small.shape == (1, 3, 16, 16)
    # Pixel i of the small image lies at 4 i + 1.5 of the large one.
    expected = torch.cos(0.1 * (4 * torch.arange(16) + 1.5)).expand_as(small)
    torch.testing.assert_close(small[..., 2:-2], expected[..., 2:-2], atol=0.02, rtol=0)
    assert nothing[..., 2:-2].abs().max() < 0.05


@pytest.mark.parametrize("options", [{}, {"blur": (0.5, 2.0)}, NOISY, {"concat_as": "latents", "concat_channels": 4}])
@pytest.mark.parametrize("factor", [1, 2, 8])
def test_the_contract(options, factor):
    assert_contract(DegradedImageConditioner(3, factor, **options), batch_of(), Averages())


def test_pixels_of_the_latents_size_are_taken_as_they_are():
    conditioner, batch = DegradedImageConditioner(0, factor=4), batch_of()
    assert torch.equal(conditioner(batch, Averages(4)).concat, conditioner.low_resolution(batch))


def test_latents_are_those_of_the_enlarged_image_without_gradient():
    conditioner = DegradedImageConditioner(0, factor=2, concat_as="latents", concat_channels=4)
    batch, first_stage = batch_of(), Averages()
    enlarged = F.interpolate(conditioner.low_resolution(batch), size=(16, 16), mode="bicubic", antialias=True)
    concat = conditioner(batch, first_stage).concat
    torch.testing.assert_close(concat, first_stage.encode(enlarged).detach())
    assert not concat.requires_grad


@pytest.mark.parametrize("options", [{"blur": (0.0, 2.0)}, {"blur": (1.0, 1.0)} | NOISY])
def test_blur_noise_and_level_belong_to_seed_epoch_and_sample(options):
    def made(seed=0, epoch=0, first=0):
        images = batch_of(6, 16, epoch, first)
        conditioner = DegradedImageConditioner(seed, 2, **options)
        return conditioner.low_resolution(images), conditioner.noise_level(images)

    (images, levels), (later, later_levels) = made(), made(first=3)
    assert torch.equal(images, made()[0])
    assert torch.equal(images[3:], later[:3])
    assert torch.equal(levels[3:], later_levels[:3])
    for other, other_levels in (made(seed=1), made(epoch=1)):
        assert (images - other).flatten(1).abs().amax(1).min() > 1e-3
        assert "max_noise" not in options or (levels != other_levels).all()


def test_the_noise_itself_changes_with_seed_epoch_and_sample():
    def noise(seed=0, epoch=0, first=0):
        images = batch_of(1, 32, epoch, first)
        clean = DegradedImageConditioner(seed, 2).low_resolution(images)
        conditioner = DegradedImageConditioner(seed, 2, **NOISY)
        level = conditioner.noise_level(images)[:, None, None, None]
        return ((conditioner.low_resolution(images) - torch.sqrt(1 - level.square()) * clean) / level).flatten()

    draws = torch.stack([noise(), noise(seed=1), noise(epoch=1), noise(first=1)])
    correlation = torch.corrcoef(draws) - torch.eye(4)
    assert correlation.abs().max() < 5 / draws.shape[1] ** 0.5
    torch.testing.assert_close(noise(), draws[0])


def test_noise_has_the_level_that_the_model_is_told():
    conditioner = DegradedImageConditioner(5, factor=1, max_noise=0.8, vector_dim=16)
    batch = batch_of(24, 64)
    batch["image"] = torch.full_like(batch["image"], 0.5)
    level = conditioner.noise_level(batch)
    noisy = conditioner.low_resolution(batch)
    torch.testing.assert_close(noisy.flatten(1).std(1), level, rtol=0.04, atol=0.004)
    kept = 0.5 * torch.sqrt(1 - level.square())
    torch.testing.assert_close(noisy.mean((1, 2, 3)), kept, atol=5 * 0.8 / (3 * 64 * 64) ** 0.5, rtol=0)
    assert 0.0 <= level.min() < 0.15
    assert 0.65 < level.max() < 0.8
    vectors = conditioner(batch, Averages()).vector
    order = level.argsort()
    assert torch.pdist(vectors[order]).min() > 0
    again = rows(batch, [3])
    torch.testing.assert_close(conditioner(again, Averages()).vector, vectors[3:4])


def test_the_level_in_evaluation_can_be_fixed():
    conditioner = DegradedImageConditioner(5, sampling_noise=0.1, **NOISY)
    batch = batch_of()
    assert conditioner.noise_level(batch).unique().numel() > 1
    assert conditioner.eval().noise_level(batch).tolist() == pytest.approx([0.1] * 6)
    drawn = DegradedImageConditioner(5, **NOISY)
    assert torch.equal(drawn.noise_level(batch), drawn.eval().noise_level(batch))


def test_degradation_is_as_exact_under_autocast():
    conditioner, batch = DegradedImageConditioner(5, blur=(1.0, 2.0)), batch_of()
    expected = conditioner.low_resolution(batch)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(conditioner.low_resolution(batch), expected)


def test_pictures_are_of_the_images_size():
    conditioner, batch = DegradedImageConditioner(5, **NOISY), batch_of()
    picture = conditioner.show(batch, Averages())
    assert torch.equal(picture[..., ::4, ::4], conditioner.low_resolution(batch).clamp(-1, 1))
    assert torch.equal(picture[..., 3::4, 1::4], picture[..., ::4, ::4])


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"factor": 0}, "factor"),
        ({"blur": (2.0, 1.0)}, "blur"),
        ({"blur": (-1.0, 1.0)}, "blur"),
        ({"blur": (1.0,)}, "blur"),
        ({"max_noise": 1.0, "vector_dim": 8}, "max_noise"),
        ({"max_noise": 0.3}, "vector_dim"),
        ({"max_noise": 0.3, "vector_dim": 7}, "vector_dim"),
        ({"vector_dim": 8}, "vector_dim"),
        ({"sampling_noise": 0.1}, "sampling_noise"),
        ({"concat_as": "both"}, "concat_as"),
        ({"concat_channels": 4}, "concat_channels"),
    ],
)
def test_impossible_arguments_are_refused(change, key):
    with pytest.raises(ValueError, match=f"{key} is .*; allowed are .*; change `conditioner.{key}`"):
        DegradedImageConditioner(0, **change)


def test_images_and_latents_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"factor is 3; allowed are divisors .*; change `conditioner.factor`"):
        DegradedImageConditioner(0, factor=3).low_resolution(batch_of())
    conditioner = DegradedImageConditioner(0, concat_as="latents", concat_channels=3)
    with pytest.raises(ValueError, match=r"concat_channels is 3; allowed are 4, those of the latents"):
        conditioner(batch_of(), Averages())
