from collections import Counter

import pytest
import torch
from torch import nn

from ldm_train.checkpoint import strict_load
from ldm_train.nn import Autoencoder, KLRegularizer
from ldm_train.nn.attention import SpatialSelfAttention
from ldm_train.nn.resnet import ResidualBlock

SMALL = {"latent_channels": 3, "channels": 16, "channel_multipliers": (1, 2, 2), "num_res_blocks": 1, "norm_groups": 8}


@pytest.fixture
def autoencoder():
    torch.manual_seed(0)
    return Autoencoder(KLRegularizer(), **SMALL).eval()


@pytest.fixture
def image():
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


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
    with pytest.raises(ValueError, match=r"collapsed: lower `autoencoder.regularizer.weight`"):
        autoencoder.calibrate(torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (torch.zeros(1, 3, 18, 16), r"images are 18 x 16; allowed are multiples of 4, .* change `image_size`"),
        (torch.zeros(1, 4, 16, 16), r"shape \(1, 4, 16, 16\); allowed is \(B, 3, H, W\); .*`autoencoder.in_channels`"),
        (torch.zeros(3, 16, 16), r"shape \(3, 16, 16\); allowed is \(B, 3, H, W\)"),
        (torch.zeros(1, 3, 16, 16, dtype=torch.uint8), r"torch.uint8; allowed are floating-point .* change `data`"),
    ],
)
def test_what_is_no_image_is_refused(autoencoder, image, message):
    for method in (autoencoder, autoencoder.moments, autoencoder.encode):
        with pytest.raises(ValueError, match=message):
            method(image)


def test_latents_of_another_autoencoder_are_refused(autoencoder):
    autoencoder.calibrate(torch.zeros(3), torch.ones(3))
    with pytest.raises(ValueError, match=r"\(1, 4, 4, 4\); allowed is \(B, 3, h, w\); .*`autoencoder.latent_channels`"):
        autoencoder.decode(torch.zeros(1, 4, 4, 4))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"channels": 20}, "channels"),
        ({"channel_multipliers": ()}, "channel_multipliers"),
        ({"channel_multipliers": (1, 0)}, "channel_multipliers"),
        ({"num_res_blocks": 0}, "num_res_blocks"),
        ({"attention_factors": (4, 8)}, "attention_factors"),
        ({"checkpoint_factors": (3,)}, "checkpoint_factors"),
        ({"latent_channels": 0}, "latent_channels"),
        ({"memory_format": "nhwc"}, "memory_format"),
        ({"tile_size": 18}, "tile_size"),
        ({"tile_size": 16, "tile_overlap": 16}, "tile_overlap"),
        ({"tile_size": 16, "tile_overlap": 6}, "tile_overlap"),
    ],
)
def test_arguments_that_describe_no_network_are_refused(change, key):
    with pytest.raises(ValueError, match=rf"{key} (is|are) .*; allowed .*; change\s`autoencoder\.{key}`"):
        Autoencoder(KLRegularizer(), **(SMALL | change))


@pytest.mark.parametrize("multipliers", [(2,), (1, 3), (3, 1, 2, 1)])
@pytest.mark.parametrize("latent_channels", [1, 5])
def test_any_pyramid_divides_by_two_a_level(multipliers, latent_channels):
    factor = 2 ** (len(multipliers) - 1)
    shape = SMALL | {"channel_multipliers": multipliers, "latent_channels": latent_channels}
    model = Autoencoder(KLRegularizer(), **shape, attention_factors=(factor,))
    x = torch.rand(1, 3, 3 * factor, 2 * factor)
    assert model.downsampling_factor == factor
    assert model.moments(x).shape == (1, 2 * latent_channels, 3, 2)
    assert model(x)[0].shape == x.shape


def _attentions(model):
    return [name for name, module in model.named_modules() if isinstance(module, SpatialSelfAttention)]


def test_attention_stands_at_the_factors_named_and_nowhere_else():
    shape = SMALL | {"middle_attention": False}
    assert _attentions(Autoencoder(KLRegularizer(), **shape)) == []
    model = Autoencoder(KLRegularizer(), **shape, attention_factors=(2,))
    assert _attentions(model) == ["encoder.down.1.layers.1", "decoder.up.1.layers.1", "decoder.up.1.layers.3"]


def test_every_gradient_of_an_image_loss_passes_the_last_weight(autoencoder, image):
    """Half the weight and its bias, half the image: nothing comes after it."""
    before = autoencoder(image)[0]
    with torch.no_grad():
        autoencoder.last_weight.mul_(0.5)
        autoencoder.decoder.conv_out.bias.mul_(0.5)
    torch.testing.assert_close(autoencoder(image)[0], before / 2)


def _gradients(model, image):
    """The gradients, and the bytes of all activations that are kept for the backward pass."""
    weights, saved = {weight.data_ptr() for weight in model.parameters()}, 0

    def count(tensor):
        nonlocal saved
        saved += tensor.nbytes if tensor.data_ptr() not in weights else 0
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        reconstruction, regularized = model(image, torch.ones(2, 3, 4, 4))
        loss = reconstruction.square().mean() + regularized.loss.mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}, saved


def test_the_levels_named_run_twice_and_the_middle_with_the_coarsest(image):
    model = Autoencoder(KLRegularizer(), **SMALL, checkpoint_factors=(2, 4))
    runs = Counter()
    for name, module in model.named_modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    model(image)[0].sum().backward()
    fine = ("encoder.down.0", "decoder.up.2")  # factor 1; the decoder begins with the coarsest
    assert dict(runs) == {name: 1 if name.startswith(fine) else 2 for name in runs}
    assert any(name.startswith(fine) for name in runs)


def test_recomputed_levels_have_equal_gradients_and_keep_less(autoencoder, image):
    expected, most = _gradients(autoencoder, image)
    kept = [most]
    for factors in ((1,), (1, 2), (1, 2, 4)):
        model = Autoencoder(KLRegularizer(), **SMALL, checkpoint_factors=factors)
        model.load_state_dict(autoencoder.state_dict())
        gradients, saved = _gradients(model, image)
        kept.append(saved)
        assert all(torch.equal(gradients[name], gradient) for name, gradient in expected.items())
    assert kept == sorted(kept, reverse=True)
    assert kept[1] < 0.6 * kept[0]
    assert kept[2] < kept[1]
    assert kept[3] < kept[2]


def test_the_memory_format_changes_no_value_and_outlasts_loading(autoencoder, image):
    model = Autoencoder(KLRegularizer(), **SMALL, memory_format="channels_last")
    strict_load(model, autoencoder.state_dict())
    assert all(torch.equal(value, autoencoder.state_dict()[name]) for name, value in model.named_parameters())
    kernels = [weight for weight in model.parameters() if weight.dim() == 4 and weight.shape[-1] > 1]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in kernels)
    layouts = []
    model.decoder.conv_out.register_forward_hook(lambda *call: layouts.append(call[2]))
    torch.testing.assert_close(model(image)[0], autoencoder(image)[0])
    assert layouts[0].is_contiguous(memory_format=torch.channels_last)


class TestTiles:
    """The networks are the real ones; only with tiles smaller than the image does a tile's edge matter."""

    @pytest.fixture
    def build(self):
        def build(near_sighted=False, **tiles):
            torch.manual_seed(0)
            shape = SMALL | {"channel_multipliers": (1, 2), "middle_attention": not near_sighted}
            model = Autoencoder(KLRegularizer(), **shape, **tiles).requires_grad_(False)
            for module in list(model.modules()) if near_sighted else []:
                for name, child in module.named_children():
                    if isinstance(child, nn.GroupNorm):
                        setattr(module, name, nn.Identity())
            model.calibrate(torch.tensor([0.3, -0.2, 0.1]), torch.tensor([0.5, 1.0, 2.0]))
            return model

        return build

    @pytest.fixture
    def large(self):
        return torch.rand(1, 3, 128, 192, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def test_an_image_that_fits_into_a_tile_is_not_touched(self, build, image):
        whole, tiles = build(), build(tile_size=16, tile_overlap=4)
        latents = whole.encode(image)
        assert torch.equal(tiles.encode(image), latents)
        assert torch.equal(tiles.decode(latents), whole.decode(latents))

    @pytest.mark.parametrize("noise", [None, torch.ones(1, 3, 64, 96)], ids=["mode", "draw"])
    def test_a_near_sighted_network_gives_the_same_in_tiles(self, build, large, noise):
        """The encoder sees 18 pixels far, the decoder 24: overlaps of four times as many are enough."""
        whole, tiles = build(near_sighted=True), build(near_sighted=True, tile_size=112, tile_overlap=96)
        latents = whole.encode(large, noise)
        torch.testing.assert_close(tiles.encode(large, noise), latents, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(tiles.decode(latents), whole.decode(latents), rtol=1e-4, atol=1e-5)
        narrow = build(near_sighted=True, tile_size=64, tile_overlap=0)
        assert (narrow.decode(latents) - whole.decode(latents)).abs().max() > 1e-3

    def test_trained_weights_see_the_whole_image(self, build, large):
        whole, tiles = build(), build(tile_size=64, tile_overlap=16)
        latents, in_tiles = whole.encode(large), tiles.encode(large)
        assert not torch.equal(in_tiles, latents)
        tiles.requires_grad_(True)
        assert torch.equal(tiles.encode(large).detach(), latents)
        with torch.no_grad():
            assert torch.equal(tiles.encode(large), in_tiles)


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
        torch.testing.assert_close(KLRegularizer(weight=1.0)(moments, None).loss, expected)

    def test_draws_have_the_posterior_s_moments(self):
        moments = torch.tensor([0.5, -1.0]).view(1, 2, 1, 1).expand(50_000, 2, 1, 1)
        z = KLRegularizer()(moments, torch.randn(50_000, 1, 1, 1, generator=torch.Generator().manual_seed(0))).z
        assert float(z.mean()) == pytest.approx(0.5, abs=0.015)
        assert float(z.var()) == pytest.approx(torch.tensor(-1.0).exp().item(), rel=0.03)

    def test_log_variance_is_clamped(self):
        moments = torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1)
        assert float(KLRegularizer().variance(moments)) == pytest.approx(torch.tensor(20.0).exp().item())
