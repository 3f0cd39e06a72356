import pytest
import torch

from ldm_train.nn import Autoencoder, AutoencoderLoss, KLRegularizer, Regularized

SMALL = {"latent_channels": 3, "channels": 16, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "norm_groups": 8}


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(KLRegularizer(), **SMALL).eval()


@pytest.fixture
def image():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.mark.parametrize(
    ("latent_channels", "multipliers", "attention", "parameters"),
    [
        (3, (1, 2, 4), (), 55_312_063),
        (4, (1, 2, 4, 4), (), 83_653_863),
        (16, (1, 1, 2, 2, 4), (16,), 69_610_963),
        (64, (1, 1, 2, 2, 4, 4), (16, 32), 103_880_131),
    ],
    ids=["kl_f4", "kl_f8", "kl_f16", "kl_f32"],
)
def test_published_parameter_counts(latent_channels, multipliers, attention, parameters):
    with torch.device("meta"):
        model = Autoencoder(KLRegularizer(), latent_channels, 128, multipliers, attention_factors=attention)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.downsampling_factor == 2 ** (len(multipliers) - 1)


def test_latents_are_normalised_and_the_decoder_undoes_it(autoencoder, image):
    mean, std = torch.tensor([1.0, -2.0, 0.5]), torch.tensor([2.0, 0.5, 3.0])
    autoencoder.calibrate(mean, std)
    raw = autoencoder.regularizer.mode(autoencoder.moments(image))
    latents = autoencoder.encode(image)
    torch.testing.assert_close(latents * std.view(1, 3, 1, 1) + mean.view(1, 3, 1, 1), raw)
    torch.testing.assert_close(autoencoder.decode(latents), autoencoder(image)[0])


def test_an_uncalibrated_autoencoder_refuses_to_give_latents(autoencoder, image):
    assert not autoencoder.is_calibrated
    with pytest.raises(RuntimeError, match=r"not calibrated .* set `stage.autoencoder.checkpoint`"):
        autoencoder.encode(image)
    with pytest.raises(RuntimeError, match="not calibrated"):
        autoencoder.decode(torch.zeros(1, 3, 4, 4))


def test_calibration_travels_in_the_state_dict(autoencoder):
    autoencoder.calibrate(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([4.0, 5.0, 6.0]))
    copy = Autoencoder(KLRegularizer(), **SMALL)
    copy.load_state_dict(autoencoder.state_dict())
    assert copy.is_calibrated
    assert torch.equal(copy.latent_std, autoencoder.latent_std)


def test_a_collapsed_channel_is_refused(autoencoder):
    with pytest.raises(ValueError, match=r"collapsed: lower `stage.loss.kl_weight`"):
        autoencoder.calibrate(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))


def test_sizes_that_do_not_divide_are_refused(autoencoder):
    with pytest.raises(ValueError, match=r"images are 18 x 16; allowed are multiples of 4, .* change `image_size`"):
        autoencoder.encode(torch.zeros(1, 3, 18, 16))


def test_groups_must_divide_the_channels():
    with pytest.raises(ValueError, match=r"change `autoencoder\.channels`"):
        Autoencoder(KLRegularizer(), **(SMALL | {"channels": 20}))


def test_every_parameter_receives_a_gradient(autoencoder, image):
    reconstruction, regularized = autoencoder(image, torch.randn(2, 3, 4, 4))
    (reconstruction.square().mean() + regularized.loss.mean()).backward()
    assert [n for n, p in autoencoder.named_parameters() if p.grad is None or not p.grad.any()] == []


class TestKLRegularizer:
    def test_divergence_is_that_of_torch_distributions(self):
        moments = torch.randn(4, 6, 2, 2, generator=torch.Generator().manual_seed(0))
        mean, log_variance = moments.chunk(2, 1)
        posterior = torch.distributions.Normal(mean, (0.5 * log_variance).exp())
        prior = torch.distributions.Normal(torch.zeros_like(mean), torch.ones_like(mean))
        expected = torch.distributions.kl_divergence(posterior, prior).flatten(1).sum(1)
        torch.testing.assert_close(KLRegularizer()(moments, None).loss, expected)

    def test_draws_have_the_posterior_s_moments(self):
        moments = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand(50_000, 2, 1, 1)
        z = KLRegularizer()(moments, torch.randn(50_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))).z
        assert float(z.mean()) == pytest.approx(0.5, abs=0.015)
        assert float(z.var()) == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.03)

    def test_log_variance_is_clamped(self):
        moments = torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1)
        assert float(KLRegularizer().variance(moments)) == pytest.approx(torch.tensor(20.0).exp().item())


class TestAutoencoderLoss:
    x = torch.zeros(2, 3, 4, 4)
    reconstruction = torch.full((2, 3, 4, 4), 0.5)
    regularized = Regularized(torch.zeros(2, 4, 2, 2), torch.tensor([3.0, 5.0]), {})

    @pytest.mark.parametrize(("norm", "pixel"), [(1, 24.0), (2, 12.0)])
    def test_sum_over_pixels_as_published(self, norm, pixel):
        terms = AutoencoderLoss(norm, kl_weight=0.1)(self.x, self.reconstruction, self.regularized)
        assert float(terms.pixel) == pixel
        assert float(terms.total) == pytest.approx(pixel + 0.1 * 4.0)

    def test_reductions_agree_up_to_scale_at_the_equivalent_weight(self):
        summed = AutoencoderLoss(1, 0.1, "sum")
        mean = AutoencoderLoss(1, summed.equivalent_kl_weight(48, 16), "mean")
        totals = [loss(self.x, self.reconstruction, self.regularized).total for loss in (summed, mean)]
        assert float(totals[0]) == pytest.approx(48 * float(totals[1]))
        assert mean.equivalent_kl_weight(48, 16) == pytest.approx(0.1)

    @pytest.mark.parametrize(
        ("change", "key"), [({"pixel_norm": 3}, "pixel_norm"), ({"reduction": "none"}, "reduction")]
    )
    def test_unknown_choices_are_refused(self, change, key):
        with pytest.raises(ValueError, match=f"change `stage.loss.{key}`"):
            AutoencoderLoss(**change)
