import pytest
import torch
from torch import nn
from torchmetrics.image.fid import NoTrainInceptionV3

from ldm_train.metrics import InceptionFeatures, RandomConvFeatures, feature_extractor, fid_key


def _bytes(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def test_random_filters_are_the_same_on_every_machine():
    # Written down once; Philox draws integers, so only the last bits of cos and log may differ.
    torch.manual_seed(1)
    extractor = RandomConvFeatures()
    expected = torch.tensor([-0.011149, -0.084113, 0.079019, 0.058296, 0.039804])
    torch.testing.assert_close(extractor.textures[0, 0, 0, 0], expected, rtol=1e-4, atol=1e-6)
    torch.manual_seed(2)
    assert torch.equal(RandomConvFeatures().textures, extractor.textures)
    assert extractor.state_dict() == {}  # they are never saved: they are drawn


def test_random_filters_have_no_mean_and_unit_norm():
    extractor = RandomConvFeatures()
    for filters in (*extractor.textures, extractor.shapes):
        torch.testing.assert_close(filters.flatten(1).norm(dim=1), torch.ones(len(filters)))
        torch.testing.assert_close(filters.flatten(1).sum(dim=1), torch.zeros(len(filters)), atol=1e-5, rtol=0)


def test_the_first_features_are_the_colours_and_flat_grey_has_no_others():
    extractor = RandomConvFeatures()
    colour = torch.tensor([255, 0, 51], dtype=torch.uint8)[None, :, None, None].expand(2, 3, 48, 48)
    expected = torch.tensor([1.0, -1.0, -0.6])[:, None].expand(3, 16).flatten()
    torch.testing.assert_close(extractor(colour)[:, :48], expected.expand(2, 48))

    grey = extractor(torch.full((1, 3, 48, 48), 51, dtype=torch.uint8))
    torch.testing.assert_close(grey, torch.tensor([-0.6] * 48 + [0.0] * 160)[None], atol=1e-4, rtol=1e-4)


def test_features_of_an_image_do_not_depend_on_its_batch_and_not_on_autocast():
    extractor, images = RandomConvFeatures(), _bytes(5, 3, 32, 32)
    together = extractor(images)
    torch.testing.assert_close(torch.cat([extractor(image[None]) for image in images]), together)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(extractor(images), together)


def test_keys_say_which_features_were_used():
    class Inception(RandomConvFeatures):
        name = "inception"

    assert fid_key(RandomConvFeatures()) == "val/fid_randomconv"
    assert fid_key(Inception()) == "val/fid"
    assert feature_extractor().name == "randomconv"


def test_missing_inception_weights_name_the_file_the_page_and_the_key(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        feature_extractor(str(tmp_path / "inception.pth"))
    for part in (
        str(tmp_path / "inception.pth"),
        "weights-inception-2015-12-05-6726825d.pth",
        "https://github.com/toshas/torch-fidelity/releases",
        "`inception_weights`",
        "`callbacks.samples.extractor` or `callbacks.reconstruction_distance.extractor`",
    ):
        assert part in str(error.value)


@pytest.mark.slow
def test_inception_is_the_network_of_torchmetrics_with_the_given_weights(tmp_path, monkeypatch):
    torch.manual_seed(0)
    with monkeypatch.context() as patch:  # the class insists on loading weights: it keeps its own first ones
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.load_state_dict_from_url", lambda *_, **__: {})
        patch.setattr(NoTrainInceptionV3, "load_state_dict", lambda *_: None)
        reference = NoTrainInceptionV3("inception-v3-compat", ["2048"], None, antialias=False)
    for name, parameter in reference.named_parameters():
        if name.endswith("conv.weight"):
            nn.init.kaiming_normal_(parameter)  # so that the signal reaches the last layer
    torch.save(reference.state_dict(), tmp_path / "weights.pth")

    extractor, images = InceptionFeatures(tmp_path / "weights.pth"), _bytes(2, 3, 40, 40)
    assert fid_key(extractor) == "val/fid"
    torch.testing.assert_close(extractor(images), reference(images))
    antialiased = InceptionFeatures(tmp_path / "weights.pth", antialias=True)
    assert antialiased.fingerprint != extractor.fingerprint
    assert not torch.allclose(antialiased(images), extractor(images))


def test_inception_weights_that_would_run_code_are_refused(tmp_path):
    torch.save({"payload": print}, tmp_path / "weights.pth")
    with pytest.raises(Exception, match=r"[Ww]eights.only"):
        InceptionFeatures(tmp_path / "weights.pth")
