import pytest
import torch

from ldm_train.stages import EncodedMoments, RememberedMoments

from .toy import autoencoder, batch


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
