import pytest
import torch

from ldm_train.nn import (
    LPIPS,
    AdversarialLoss,
    Autoencoder,
    AutoencoderLoss,
    Clock,
    KLRegularizer,
    PatchDiscriminator,
)
from ldm_train.nn.regularizer import Regularized

CLOCK = Clock(step=0, images=0)


class Distance(torch.nn.Module):
    """Stands for LPIPS where only its place in the sum matters: the mean absolute difference of an image."""

    weight = 0.5

    def forward(self, x, y):
        return (x - y).abs().flatten(1).mean(1)


class TestSums:
    x = torch.zeros(2, 3, 4, 4)
    reconstruction = torch.full((2, 3, 4, 4), 0.5)

    def terms(self, reduction="sum", **arguments):
        regularized = Regularized(torch.zeros(2, 4, 2, 2), torch.tensor([3.0, 5.0]), reduction, {})
        return AutoencoderLoss(**arguments).without_adversary(self.x, self.reconstruction, regularized)

    @pytest.mark.parametrize(("norm", "pixel"), [(1, 24.0), (2, 12.0)])
    @pytest.mark.parametrize(("reduction", "values"), [("sum", 1), ("mean", 48)])
    def test_pixels_are_reduced_as_the_regularizer_asks(self, norm, pixel, reduction, values):
        terms = self.terms(reduction, pixel_norm=norm)
        assert float(terms.log["loss_pixel"]) == pixel / values
        assert float(terms.total) == pixel / values + 4.0

    @pytest.mark.parametrize(("reduction", "values"), [("sum", 48), ("mean", 1)])
    def test_the_perceptual_distance_is_added_to_each_pixel_value_as_published(self, reduction, values):
        terms = self.terms(reduction, perceptual=Distance())
        assert float(terms.log["loss_perceptual"]) == 0.5
        assert float(terms.total) == values * (0.5 + 0.5 * 0.5) + 4.0

    def test_an_unknown_norm_is_refused(self):
        with pytest.raises(ValueError, match=r"pixel_norm is 3; allowed are 1 and 2; change `stage.loss.pixel_norm`"):
            AutoencoderLoss(3)


def test_regularizers_agree_up_to_scale_at_the_equivalent_weight():
    """What a weight of sums means for means, shown on the gradients that reach the moments."""
    moments = torch.randn(2, 6, 4, 4, generator=torch.Generator().manual_seed(0))

    def gradient(reduction, weight):
        leaf = moments.clone().requires_grad_()
        regularized = KLRegularizer(weight, reduction)(leaf, None)
        picture = regularized.z.repeat_interleave(4, 2).repeat_interleave(4, 3)  # (2, 3, 16, 16)
        loss = AutoencoderLoss(2).without_adversary(torch.ones_like(picture), picture, regularized)
        return torch.autograd.grad(loss.total, leaf)[0]

    summed = gradient("sum", 0.3)
    equivalent = KLRegularizer(0.3, "sum").equivalent_weight(pixels=768, latents=48)
    torch.testing.assert_close(summed, 768 * gradient("mean", equivalent), rtol=1e-5, atol=1e-6)
    assert KLRegularizer(equivalent, "mean").equivalent_weight(768, 48) == pytest.approx(0.3)


class TestGradientFlow:
    """The defects of published trainers: LPIPS under `no_grad`, a discriminator that pulls at the encoder."""

    @pytest.fixture
    def autoencoder(self):
        torch.manual_seed(0)
        return Autoencoder(KLRegularizer(), 4, 16, (1, 2), num_res_blocks=1, norm_groups=8)

    @pytest.fixture
    def image(self):
        return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def loss_gradients(self, loss, autoencoder, image):
        reconstruction, regularized = autoencoder(image)
        terms = loss(image, reconstruction, regularized, autoencoder.last_weight, CLOCK)
        terms.total.backward()
        return {name: parameter.grad for name, parameter in autoencoder.named_parameters()}

    def test_perceptual_gradients_reach_the_encoder(self, autoencoder, image, vgg16_weights):
        lpips = LPIPS(backbone=str(vgg16_weights))
        alone = self.loss_gradients(AutoencoderLoss(), autoencoder, image)
        autoencoder.zero_grad()
        beside = self.loss_gradients(AutoencoderLoss(perceptual=lpips), autoencoder, image)
        assert not any(torch.equal(alone[name], beside[name]) for name in alone if name.endswith("conv_in.weight"))
        assert all(parameter.grad is None for parameter in lpips.parameters())

    def test_the_discriminator_s_term_changes_no_gradient_of_the_autoencoder(self, autoencoder, image):
        torch.manual_seed(1)
        adversary = AdversarialLoss(PatchDiscriminator(8, num_layers=1), start=0, warmup=100)
        alone = self.loss_gradients(AutoencoderLoss(), autoencoder, image)
        autoencoder.zero_grad()
        beside = self.loss_gradients(AutoencoderLoss(adversarial=adversary), autoencoder, image)
        assert all(torch.equal(alone[name], beside[name]) for name in alone)
        assert any(parameter.grad.any() for parameter in adversary.discriminator.parameters())

    def test_the_generator_s_term_reaches_the_encoder(self, autoencoder, image):
        torch.manual_seed(1)
        adversary = AdversarialLoss(PatchDiscriminator(8, num_layers=1), start=0)
        alone = self.loss_gradients(AutoencoderLoss(), autoencoder, image)
        autoencoder.zero_grad()
        beside = self.loss_gradients(AutoencoderLoss(adversarial=adversary), autoencoder, image)
        assert not torch.equal(alone["encoder.conv_in.weight"], beside["encoder.conv_in.weight"])
