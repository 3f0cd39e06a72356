import pytest
import torch

from ldm_train.callbacks.calibration import latent_sums

from .toy import autoencoder_stage, batch


@pytest.fixture
def stage(monkeypatch):
    stage = autoencoder_stage()
    monkeypatch.setattr(stage, "log", lambda *_, **__: None)
    monkeypatch.setattr(stage, "log_dict", lambda *_, **__: None)
    return stage


def test_the_loss_of_a_batch_is_the_mean_over_its_samples_whatever_their_company(stage):
    """So 1 process and many, with the same global batch, have the same loss."""
    whole = stage.training_step(batch(4), 0)
    halves = [stage.training_step({k: v[s] if k != "epoch" else v for k, v in batch(4).items()}, 0)
              for s in (slice(2), slice(2, 4))]  # fmt: skip
    torch.testing.assert_close(whole, (halves[0] + halves[1]) / 2, rtol=1e-5, atol=1e-5)


def test_latents_are_drawn_anew_each_epoch(stage):
    with torch.no_grad():
        stage.autoencoder.to_moments.bias[4:] += 3.0  # a wide posterior
    assert stage.training_step(batch(epoch=0), 0) != stage.training_step(batch(epoch=1), 0)
    assert stage.training_step(batch(epoch=1), 0) == stage.training_step(batch(epoch=1), 0)


def test_calibration_sums_give_the_moments_of_posterior_draws(stage):
    image = batch(4)["image"]
    sums, count = latent_sums(stage, image)
    mean, second, variance = sums / count
    posterior_mean, posterior_variance = stage.latent_moments(image)
    noise = torch.randn(2000, *posterior_mean.shape, generator=torch.Generator().manual_seed(0))
    draws = (posterior_mean + posterior_variance.sqrt() * noise).double()
    torch.testing.assert_close(mean, draws.mean(dim=(0, 1, 3, 4)), rtol=0.02, atol=0.01)
    torch.testing.assert_close(variance + second - mean**2, draws.var(dim=(0, 1, 3, 4)), rtol=0.02, atol=0.01)


def test_reconstructions_are_images_and_have_no_chance_in_them(stage):
    image = batch()["image"]
    first, second = stage.reconstruct(image), stage.reconstruct(image)
    assert torch.equal(first, second)
    assert first.abs().max() <= 1
