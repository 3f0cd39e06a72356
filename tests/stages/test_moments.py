import pytest
import torch

from ldm_train.batch import LatentFacts
from ldm_train.checkpoint import encoder_digest
from ldm_train.conditioning import CombinedConditioner, MaskConditioner
from ldm_train.diffusion import Denoiser, cosine_schedule
from ldm_train.nn import UNet
from ldm_train.stages import CachedMoments, EncodedMoments, LatentDiffusion, RememberedMoments

from .toy import autoencoder, autoencoder_stage, batch, latent_diffusion


def test_remembered_and_encoded_moments_are_the_same_and_the_encoder_runs_once_an_image(monkeypatch):
    model, remembered = autoencoder(), RememberedMoments()
    expected = EncodedMoments()(model, batch(4))
    encoded = []
    moments = model.moments
    monkeypatch.setattr(model, "moments", lambda image: encoded.append(len(image)) or moments(image))
    for _ in range(2):
        torch.testing.assert_close(remembered(model, batch(4)), expected, rtol=1e-5, atol=1e-5)
    reversed_batch = {k: v[::-1] if isinstance(v, list) else v.flip(0) for k, v in batch(4).items() if k != "epoch"}
    torch.testing.assert_close(remembered(model, reversed_batch), expected.flip(0), rtol=1e-5, atol=1e-5)
    remembered(model, batch(4, first=100))
    assert encoded == [1] * 8


def test_remembered_moments_do_not_depend_on_the_batch_an_image_was_first_met_in():
    """A resumed run meets an image again in another batch than the unbroken run did."""
    model, together, apart = autoencoder(), RememberedMoments(), RememberedMoments()
    whole = batch(9)
    expected = together(model, whole)
    for begin, end in ((5, 9), (0, 1), (1, 5)):
        part = {k: v[begin:end] for k, v in whole.items() if k != "epoch"} | {"epoch": 0}
        assert torch.equal(apart(model, part), expected[begin:end])


def test_more_images_than_may_be_remembered_are_refused():
    model, remembered = autoencoder(), RememberedMoments(max_images=4)
    remembered(model, batch(4))
    changed = batch(4)
    changed["image"] = changed["image"].flip(3)
    with pytest.raises(ValueError, match=r"more than 4 different images .* `data.flip=false`"):
        remembered(model, changed)


def facts(model, **changes):
    return LatentFacts("latents/", encoder_digest(model), 2, 4, 2)._replace(**changes)


def test_cached_moments_are_taken_for_those_of_the_encoder_that_made_them_alone():
    model = autoencoder()
    CachedMoments().check(model, facts(model))
    model.calibrate(torch.zeros(4), torch.ones(4))
    with torch.no_grad():
        model.decoder.conv_out.weight.mul_(2)
    CachedMoments().check(model, facts(autoencoder()))  # another decoder and calibration make no other moments
    with torch.no_grad():
        model.encoder.conv_in.weight.mul_(1.0001)
    with pytest.raises(ValueError, match=r"another encoder.*`stage.autoencoder.checkpoint`.*tools/cache_latents.py"):
        CachedMoments().check(model, facts(autoencoder()))
    with pytest.raises(ValueError, match=r"\(f, C, k\) = \(8, 4, 2\)"):
        CachedMoments().check(model, facts(model, factor=8))


def test_data_and_moments_must_be_of_one_kind():
    model = autoencoder()
    for kind in (EncodedMoments(), RememberedMoments()):
        kind.check(model, None)
        with pytest.raises(ValueError, match=r"`stage.moments._target_` to ldm_train.stages.CachedMoments"):
            kind.check(model, facts(model))
    with pytest.raises(ValueError, match=r"the data are images; allowed are `data=latents`"):
        CachedMoments().check(model, None)
    autoencoder_stage().check_data(None)
    with pytest.raises(ValueError, match=r"images are needed"):
        autoencoder_stage().check_data(facts(model))


def test_conditioners_that_look_at_pixels_are_refused():
    torch.manual_seed(0)
    unet = UNet(4, 4, 16, (1, 2), 1, (2,), concat_channels=5, num_heads=2, norm_groups=8)
    parts = {"denoiser": Denoiser(unet, cosine_schedule(100), "v"), "moments": CachedMoments()}
    for conditioner in (MaskConditioner(0, 5), CombinedConditioner({"hole": MaskConditioner(0, 5)})):
        stage = latent_diffusion(**parts, conditioner=conditioner)
        with pytest.raises(ValueError, match=r"looks at the pixels of images.*change `conditioner`"):
            stage.check_data(facts(stage.autoencoder))
    stage = latent_diffusion(moments=CachedMoments())
    stage.check_data(facts(stage.autoencoder))


def test_the_loss_of_cached_moments_is_that_of_the_images(monkeypatch):
    monkeypatch.setattr(LatentDiffusion, "log", lambda *_, **__: None)
    encoded, cached = latent_diffusion(), latent_diffusion(moments=CachedMoments())
    whole = batch(4)
    with torch.no_grad():
        moments = encoded.autoencoder.moments(whole["image"])
    without = {key: value for key, value in whole.items() if key != "image"} | {"moments": moments}
    for method in ("training_step", "validation_step"):
        assert torch.equal(getattr(encoded, method)(whole, 0)["loss"], getattr(cached, method)(without, 0)["loss"])
