import pytest
import torch

from ldm_train.batch import Conditioning
from ldm_train.nn import UNet

SMALL = {
    "in_channels": 4, "out_channels": 4, "channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1,
    "attention_factors": (1, 2), "context_dim": 16, "vector_dim": 12, "num_heads": 2, "norm_groups": 16,
}  # fmt: skip


def randomised(unet, seed=0):
    """Weights that are the same for the same seed and zero nowhere, so that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in unet.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 100
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5 + (parameter.ndim == 1))
    return unet


def inputs(batch=3, channels=4, size=8, tokens=5):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, channels, size, size, generator=generator)
    context, vector = torch.randn(batch, tokens, 16, generator=generator), torch.randn(batch, 12, generator=generator)
    return x, torch.tensor([0, 10, 900])[:batch], Conditioning(context, vector)


@pytest.mark.parametrize(
    ("context_dim", "heads", "linear", "parameters"),
    [(768, {"num_heads": 8}, False, 859_520_964), (1024, {"head_channels": 64}, True, 865_910_724)],
    ids=["sd1", "sd2"],
)
def test_published_parameter_counts(context_dim, heads, linear, parameters):
    with torch.device("meta"):
        unet = UNet(4, 4, context_dim=context_dim, linear_projection=linear, **heads)
    assert sum(p.numel() for p in unet.parameters()) == parameters
    assert len(list(unet.parameters())) == 686


def test_it_starts_as_zero():
    x, t, conditioning = inputs()
    assert torch.equal(UNet(**SMALL)(x, t, conditioning), torch.zeros_like(x))


def test_examples_do_not_mix():
    unet = randomised(UNet(**SMALL)).eval()
    x, t, conditioning = inputs()
    whole = unet(x, t, conditioning)
    single = torch.cat(
        [unet(x[i : i + 1], t[i : i + 1], Conditioning(*(c[i : i + 1] for c in conditioning[:2]))) for i in range(3)]
    )
    torch.testing.assert_close(whole, single, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("changed", ["x", "t", "context", "vector"])
def test_every_input_reaches_the_output(changed):
    unet = randomised(UNet(**SMALL)).eval()
    x, t, conditioning = inputs()
    before = unet(x, t, conditioning)
    if changed == "x":
        x = x.flip(0)
    elif changed == "t":
        t = t.flip(0)
    else:
        conditioning = conditioning._replace(**{changed: getattr(conditioning, changed).flip(0)})
    assert (unet(x, t, conditioning) - before)[0].abs().max() > 1e-3


def test_every_parameter_receives_a_gradient():
    unet = randomised(UNet(**SMALL))
    unet(*inputs()).square().mean().backward()
    assert [name for name, p in unet.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_cross_attention_does_not_know_the_order_of_tokens():
    unet = randomised(UNet(**SMALL)).eval()
    x, t, conditioning = inputs()
    permuted = conditioning._replace(context=conditioning.context[:, torch.tensor([3, 0, 4, 1, 2])])
    torch.testing.assert_close(unet(x, t, conditioning), unet(x, t, permuted), rtol=1e-4, atol=1e-5)


def test_concatenated_maps_join_the_latents():
    unet = randomised(UNet(**(SMALL | {"in_channels": 6}))).eval()
    x, t, conditioning = inputs(channels=6)
    split = conditioning._replace(concat=x[:, 4:])
    assert torch.equal(unet(x, t, conditioning), unet(x[:, :4], t, split))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": None}, r"exactly one of them .* `unet.num_heads`"),
        ({"head_channels": 8}, r"exactly one of them"),
        ({"num_heads": 3}, r"32 channels cannot be split into 3 heads"),
        ({"channels": 24}, r"channels are 24, .* change `unet.channels`"),
    ],
)
def test_impossible_shapes_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**(SMALL | change))


def test_impossible_inputs_are_refused():
    unet = UNet(**SMALL)
    x, t, conditioning = inputs()
    with pytest.raises(ValueError, match=r"latents are 7 x 8; .* change `image_size`"):
        unet(x[:, :, :7], t, conditioning)
    with pytest.raises(ValueError, match=r"width 16; the U-Net takes 8; change `unet.context_dim`"):
        UNet(**(SMALL | {"context_dim": 8}))(x, t, conditioning)
    with pytest.raises(ValueError, match=r"context of width None; the U-Net takes 16"):
        unet(x, t, Conditioning())
    with pytest.raises(ValueError, match=r"vector of width None; .* change `unet.vector_dim`"):
        unet(x, t, Conditioning(conditioning.context))
