from collections import Counter

import pytest
import torch

from ldm_train.batch import Conditioning
from ldm_train.nn import UNet
from ldm_train.nn.resnet import ResidualBlock

SMALL = {
    "in_channels": 4, "out_channels": 4, "channels": 32, "channel_multipliers": (1, 2), "num_res_blocks": 1,
    "attention_factors": (1, 2), "context_dim": 16, "vector_dim": 12, "num_heads": 2, "norm_groups": 16,
}  # fmt: skip


# What the published networks differ in; see `conf/unet`.
PLAIN = {"attention": "plain", "context_dim": None, "num_heads": None, "head_channels": 8}
VARIANTS = {
    "transformer": {},
    "deep": {"transformer_depth": (1, 2), "linear_projection": True},
    "plain": PLAIN,
    "residual": PLAIN | {"time_modulation": "scale_shift", "resample": "residual", "concat_channels": 2},
}


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


def variant(name, seed=0, **change):
    return randomised(UNet(**(SMALL | VARIANTS[name] | change)), seed)


def inputs_of(unet, batch=3):
    """Inputs that a network takes."""
    x, t, conditioning = inputs(batch, channels=4 + unet.concat_channels)
    context = None if unet.context_dim is None else conditioning.context
    concat = x[:, 4:] if unet.concat_channels else None
    return x[:, :4], t, Conditioning(context, conditioning.vector, concat)


def part(conditioning, rows):
    return Conditioning(*(None if entry is None else entry[rows] for entry in conditioning))


def gradients(unet, *given):
    """The gradients of a loss, and the bytes of all activations that are kept for the backward pass."""
    weights, saved = {weight.data_ptr() for weight in unet.parameters()}, {}

    def count(tensor):
        if tensor.data_ptr() not in weights:
            saved[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        loss = unet(*given).square().mean()
    loss.backward()
    return {name: parameter.grad for name, parameter in unet.named_parameters()}, sum(saved.values())


@pytest.mark.parametrize("name", VARIANTS)
def test_it_starts_as_zero(name):
    unet = UNet(**(SMALL | VARIANTS[name]))
    x, t, conditioning = inputs_of(unet)
    assert torch.equal(unet(x, t, conditioning), torch.zeros_like(x))


@pytest.mark.parametrize("name", VARIANTS)
def test_examples_do_not_mix(name):
    unet = variant(name).eval()
    x, t, conditioning = inputs_of(unet)
    rows = [slice(i, i + 1) for i in range(3)]
    alone = torch.cat([unet(x[row], t[row], part(conditioning, row)) for row in rows])
    torch.testing.assert_close(unet(x, t, conditioning), alone, rtol=1e-4, atol=1e-5)


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


@pytest.mark.parametrize("name", VARIANTS)
def test_every_parameter_receives_a_gradient(name):
    unet = variant(name)
    unet(*inputs_of(unet)).square().mean().backward()
    dead = {key for key, parameter in unet.named_parameters() if not (parameter.grad.abs() > 1e-6).any()}
    # What is added to all keys adds the same to all scores of a query, which the softmax does not see.
    assert dead == {key for key, _ in unet.named_parameters() if key.endswith("to_k.bias")}


def test_cross_attention_does_not_know_the_order_of_tokens():
    unet = randomised(UNet(**SMALL)).eval()
    x, t, conditioning = inputs()
    permuted = conditioning._replace(context=conditioning.context[:, torch.tensor([3, 0, 4, 1, 2])])
    torch.testing.assert_close(unet(x, t, conditioning), unet(x, t, permuted), rtol=1e-4, atol=1e-5)


def test_concatenated_maps_are_further_channels_of_the_latents():
    """The same weights, told the two ways."""
    unet, wide = variant("transformer", concat_channels=2).eval(), variant("transformer", in_channels=6).eval()
    x, t, conditioning = inputs(channels=6)
    split = conditioning._replace(concat=x[:, 4:])
    assert torch.equal(unet(x[:, :4], t, split), wide(x, t, conditioning))


def test_times_need_not_be_whole():
    unet = variant("transformer").eval()
    x, t, conditioning = inputs()
    whole = unet(x, t, conditioning)
    assert torch.equal(unet(x, t.to(torch.float64), conditioning), whole)
    between = unet(x, t + 0.5, conditioning)
    later = unet(x, t + 1, conditioning)
    assert (between - whole).abs().max() > 1e-3
    assert (between - whole).norm() < (later - whole).norm()


@pytest.mark.parametrize("name", VARIANTS)
def test_recomputed_levels_have_equal_gradients_and_keep_less(name):
    unet = variant(name)
    expected, most = gradients(unet, *inputs_of(unet))
    kept = [most]
    for factors in ((1,), (1, 2)):
        grads, saved = gradients(variant(name, checkpoint_factors=factors), *inputs_of(unet))
        assert all(torch.equal(expected[key], gradient) for key, gradient in grads.items())
        kept.append(saved)
    assert kept[1] < 0.8 * kept[0]
    assert kept[2] < 0.6 * kept[1]


def test_the_levels_named_run_twice_and_the_middle_with_the_coarsest():
    unet, runs = variant("residual", checkpoint_factors=(2,)), Counter()
    for name, module in unet.named_modules():
        if isinstance(module, ResidualBlock):
            module.register_forward_pre_hook(lambda *_, name=name: runs.update([name]))
    unet(*inputs_of(unet)).sum().backward()
    fine = ("down.0", "up.1")
    assert dict(runs) == {name: 1 if name.startswith(fine) else 2 for name in runs}
    assert any(name.startswith(fine) for name in runs)


def test_recomputed_dropout_drops_the_same():
    grads = []
    for factors in ((), (1, 2)):
        unet = variant("transformer", dropout=0.5, checkpoint_factors=factors)
        torch.manual_seed(7)
        grads.append(gradients(unet, *inputs())[0])
    assert all(torch.equal(grads[0][key], gradient) for key, gradient in grads[1].items())


@pytest.mark.parametrize("name", VARIANTS)
def test_the_memory_format_changes_no_value_and_reaches_the_end(name):
    unet, last = variant(name), variant(name, memory_format="channels_last")
    assert all(torch.equal(a, b) for a, b in zip(unet.parameters(), last.parameters(), strict=True))
    layouts = []
    last.conv_out.register_forward_pre_hook(lambda _, given: layouts.append(given[0]))
    torch.testing.assert_close(last(*inputs_of(last)), unet(*inputs_of(unet)), rtol=1e-4, atol=1e-5)
    assert layouts[0].is_contiguous(memory_format=torch.channels_last)
    expected, found = gradients(unet, *inputs_of(unet))[0], gradients(last, *inputs_of(last))[0]
    for key, gradient in found.items():
        torch.testing.assert_close(gradient, expected[key], rtol=1e-3, atol=1e-5)


def compiled(unet, backend):
    torch.compiler.reset()
    unet.compile(backend=backend, fullgraph=True)
    return unet


@pytest.mark.parametrize("name", ["transformer", "residual"])
def test_compiled_it_is_one_graph_and_keeps_its_keys(name):
    unet = variant(name, num_res_blocks=1, channel_multipliers=(1,), attention_factors=()).eval()
    given, keys = inputs_of(unet), list(unet.state_dict())
    expected = unet(*given)
    torch.testing.assert_close(compiled(unet, "eager")(*given), expected)
    assert list(unet.state_dict()) == keys


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["plain", *(pytest.param(name, marks=pytest.mark.thorough) for name in VARIANTS if name != "plain")]
)
def test_compiled_with_its_backward_pass_it_has_equal_gradients(name):
    unet = variant(name, checkpoint_factors=(1,), memory_format="channels_last")
    given = inputs_of(unet)
    expected = gradients(unet, *given)[0]
    unet.zero_grad()
    compiled(unet, "aot_eager")(*given).square().mean().backward()
    for key, parameter in unet.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[key], rtol=1e-3, atol=1e-5)


def test_in_half_precision_it_predicts_the_same():
    unet = variant("transformer").eval()
    x, t, conditioning = inputs()
    expected = unet(x, t, conditioning)
    with torch.autocast("cpu", torch.bfloat16):
        half = unet(x, t, conditioning)
    assert half.dtype == torch.bfloat16
    assert (half - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_heads": None}, r"exactly one of them .* `unet.num_heads`"),
        ({"head_channels": 8}, r"exactly one of them"),
        ({"num_heads": 3}, r"32 channels cannot be split into 3 heads; allowed .*`unet.num_heads`"),
        ({"num_heads": None, "head_channels": 24}, r"head_channels is 24, of which level 1 is 32 wide; allowed .*"),
        (PLAIN | {"head_channels": None, "num_heads": 3}, r"32 channels cannot be split into 3 heads"),
        (PLAIN | {"context_dim": 16}, r"context_dim is 16, .* allowed is null, .*`unet.context_dim`"),
        ({"channels": 24}, r"channels are 24; allowed are .*`unet.channels`"),
        ({"channels": 0}, r"channels is 0; allowed are .*`unet.channels`"),
        ({"channels": 33, "norm_groups": 33}, r"channels are 33; allowed are even .*`unet.channels`"),
        ({"num_res_blocks": 0}, r"num_res_blocks is 0; allowed are .*`unet.num_res_blocks`"),
        ({"channel_multipliers": ()}, r"channel_multipliers are \[\]; allowed .*`unet.channel_multipliers`"),
        ({"channel_multipliers": (1, 0)}, r"channel_multipliers are \[1, 0\]; allowed .*`unet.channel_multipliers`"),
        ({"attention_factors": (4,)}, r"attention_factors are \[4\]; allowed .* \[1, 2\]; .*`unet.attention_factors`"),
        ({"checkpoint_factors": (3,)}, r"checkpoint_factors are \[3\]; allowed .*`unet.checkpoint_factors`"),
        ({"transformer_depth": (1, 2, 3)}, r"transformer_depth is \(1, 2, 3\); allowed .*`unet.transformer_depth`"),
        ({"transformer_depth": ()}, r"transformer_depth is \(\); allowed .*`unet.transformer_depth`"),
        ({"transformer_depth": 0}, r"transformer_depth is 0; allowed .*`unet.transformer_depth`"),
        ({"attention": "linear"}, r"attention is 'linear'; allowed are transformer and plain; .*`unet.attention`"),
        ({"time_modulation": "film"}, r"time_modulation is 'film'; allowed are .*`unet.time_modulation`"),
        ({"resample": "pool"}, r"resample is 'pool'; allowed are .*`unet.resample`"),
        ({"concat_channels": -1}, r"concat_channels is -1; allowed are .*`unet.concat_channels`"),
        ({"in_channels": 0}, r"in_channels is 0; allowed are .*`unet.in_channels`"),
        ({"out_channels": 0}, r"out_channels is 0; allowed are .*`unet.out_channels`"),
        ({"memory_format": "nhwc"}, r"memory_format is 'nhwc'; allowed are .*`unet.memory_format`"),
    ],
)
def test_arguments_that_describe_no_network_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        UNet(**(SMALL | change))


def test_impossible_inputs_are_refused():
    unet = UNet(**SMALL)
    x, t, conditioning = inputs()
    with pytest.raises(ValueError, match=r"latents are 7 x 8; .* change `image_size`"):
        unet(x[:, :, :7], t, conditioning)
    with pytest.raises(ValueError, match=r"latents have 3 channels; the U-Net takes 4; change `unet.in_channels`"):
        unet(x[:, :3], t, conditioning)
    with pytest.raises(ValueError, match=r"width 16; the U-Net takes 8; change `unet.context_dim`"):
        UNet(**(SMALL | {"context_dim": 8}))(x, t, conditioning)
    with pytest.raises(ValueError, match=r"context of width 16; the U-Net takes None; change `unet.context_dim`"):
        UNet(**(SMALL | PLAIN))(x, t, conditioning)
    with pytest.raises(ValueError, match=r"context of width None; the U-Net takes 16"):
        unet(x, t, Conditioning())
    with pytest.raises(ValueError, match=r"vector of width None; .* change `unet.vector_dim`"):
        unet(x, t, Conditioning(conditioning.context))
    with pytest.raises(ValueError, match=r"4 channels to concatenate; the U-Net takes 0; .*`unet.concat_channels`"):
        unet(x, t, conditioning._replace(concat=x))
    with pytest.raises(ValueError, match=r"gives 0 channels to concatenate; the U-Net takes 2"):
        UNet(**(SMALL | {"concat_channels": 2}))(x, t, conditioning)
