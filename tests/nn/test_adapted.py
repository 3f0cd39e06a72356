"""A layer with adapters computes what the layer with the merged weight would."""

import copy
import re
from dataclasses import replace

import pytest
import torch
from torch import nn

from ldm_train.conditioning import CLIPTextEncoder
from ldm_train.nn import (
    LowRank,
    adaptable_layers,
    adapted_layers,
    attach_adapters,
    detach_adapters,
    merge_adapters,
    unmerge_adapters,
)
from ldm_train.nn.linear import Conv2d, Linear
from ldm_train.nn.low_rank import lengths

IN, OUT = 8, 6
LAYERS = {
    "linear": lambda: nn.Linear(IN, OUT),
    "linear without a bias": lambda: Linear(IN, OUT, bias=False),
    "convolution 1x1": lambda: Conv2d(IN, OUT, 1),
    "convolution 3x3": lambda: Conv2d(IN, OUT, 3, padding=1),
    "convolution of stride 2": lambda: Conv2d(IN, OUT, 3, stride=2, padding=1),
    "oblong, dilated convolution": lambda: nn.Conv2d(IN, OUT, (3, 1), padding=(2, 0), dilation=2),
}


def network(kind, dtype=torch.float32, channels_last=False):
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return nn.ModuleDict({"layer": LAYERS[kind]()}).to(dtype).to(memory_format=layout)


def inputs(kind, dtype=torch.float32):
    shape = (2, 5, IN) if "linear" in kind else (2, IN, 8, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def change_of(layer, rank, alpha=0.7, dora=False, zero=False, seed=2):
    weight, generator = layer.weight.detach(), torch.Generator().manual_seed(seed)
    down = torch.randn(rank, *weight.shape[1:], generator=generator) / 4
    up = torch.randn(len(weight), rank, *(1 for _ in weight.shape[2:]), generator=generator) / 4
    magnitude = lengths(weight)
    if not zero:
        magnitude = magnitude * (1 + torch.rand(len(weight), generator=generator))
    return LowRank(down, up * 0 if zero else up, alpha, magnitude if dora else None)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("kind", LAYERS)
def test_an_adapter_with_b_zero_changes_nothing_bit_for_bit(kind, channels_last, dtype, dora):
    module = network(kind, dtype, channels_last)
    x = inputs(kind, dtype)
    base = module["layer"](x)
    attach_adapters(module, "new", {"layer": change_of(module["layer"], 2, dora=dora, zero=True)})
    assert torch.equal(module["layer"](x), base)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize(("rank", "alpha"), [(1, 1.0), (3, -0.4), (6, 2.5)])
@pytest.mark.parametrize("kind", LAYERS)
def test_the_adapted_layer_is_the_layer_of_the_merged_weight(kind, rank, alpha, dora):
    module, x = network(kind), inputs(kind)
    merged = copy.deepcopy(module["layer"])
    change = change_of(merged, rank, alpha, dora)
    merged.weight.data = change.merged(merged.weight.detach(), multiplier=0.6)
    attach_adapters(module, "one", {"layer": change}, multiplier=0.6)
    adapted = module["layer"](x)
    torch.testing.assert_close(adapted, merged(x), rtol=1e-5, atol=1e-5)
    merge_adapters(module)
    torch.testing.assert_close(module["layer"](x), adapted, rtol=1e-5, atol=1e-5)
    assert torch.equal(module["layer"].weight, merged.weight)


@pytest.mark.parametrize("kind", ["linear without a bias", "convolution 3x3"])
def test_a_small_change_of_length_is_not_rounded_away_in_bfloat16(kind):
    module, x = network(kind, torch.bfloat16), inputs(kind, torch.bfloat16)
    layer, zero = module["layer"], change_of(module["layer"], 2, dora=True, zero=True)
    attach_adapters(module, "one", {"layer": replace(zero, magnitude=1.002 * lengths(layer.weight.detach()))})
    weight = module["layer"].weight
    y = module["layer"].product(x, weight)
    (adapter,) = module["layer"].of_adapters()
    found, expected = adapter(x, module["layer"].product, y, weight).float().detach(), 0.002 * y.float().detach()
    assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_a_base_of_another_type_keeps_it(dtype, tolerance):
    module, x = network("linear", dtype), inputs("linear", dtype)
    change = change_of(module["layer"], 2)
    wanted = change.merged(module["layer"].weight.detach())
    attach_adapters(module, "one", {"layer": change})
    y = module["layer"](x)
    assert y.dtype == dtype
    assert module["layer"].adapters["one"].down.dtype == torch.float32
    torch.testing.assert_close(y, x @ wanted.T + module["layer"].bias, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kind", ["linear", "convolution 3x3"])
def test_several_adapters_add_their_changes_of_the_base_weight(kind):
    module, x = network(kind), inputs(kind)
    wanted = copy.deepcopy(module["layer"])
    changes = [change_of(wanted, rank, seed=rank, dora=rank == 3) for rank in (1, 2, 3)]
    weight = wanted.weight.detach()
    wanted.weight.data = weight + sum(m * c.change(weight) for m, c in zip((1.0, -0.5, 0.25), changes, strict=True))
    for name, m, change in zip("abc", (1.0, -0.5, 0.25), changes, strict=True):
        attach_adapters(module, name, {"layer": change}, multiplier=m)
    torch.testing.assert_close(module["layer"](x), wanted(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear", "convolution 3x3"])
def test_merged_weights_come_back_bit_for_bit(kind, dtype, dora):
    module = network(kind, dtype)
    original = module["layer"].weight.detach().clone()
    change = change_of(module["layer"], 2, dora=dora)
    attach_adapters(module, "one", {"layer": change})
    merge_adapters(module)
    merge_adapters(module)  # a second time adds nothing
    assert torch.equal(module["layer"].weight, change.merged(original))
    assert not torch.equal(module["layer"].weight, original)
    unmerge_adapters(module)
    assert torch.equal(module["layer"].weight, original)


@pytest.mark.parametrize("kind", LAYERS)
def test_the_gradients_are_those_of_the_merged_weight(kind):
    module, x = network(kind), inputs(kind).requires_grad_()
    weight, bias = module["layer"].weight.detach(), module["layer"].bias
    attach_adapters(module, "one", {"layer": change_of(module["layer"], 2)})
    layer = module["layer"]
    adapter = layer.adapters["one"]
    found = torch.autograd.grad(layer(x).square().sum(), [x, adapter.down, adapter.up])
    change = LowRank(adapter.down, adapter.up, adapter.alpha)
    y = layer.product(x, weight + change.delta())
    if bias is not None:
        y = y + bias.reshape(-1, *(1 for _ in weight.shape[2:]))
    wanted = torch.autograd.grad(y.square().sum(), [x, adapter.down, adapter.up])
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_the_gradient_of_dora_takes_the_length_below_for_a_constant():
    module, x = network("linear"), inputs("linear")
    attach_adapters(module, "one", {"layer": change_of(module["layer"], 2, dora=True)})
    layer = module["layer"]
    adapter = layer.adapters["one"]
    parameters = [adapter.down, adapter.up, adapter.length_change]
    found = torch.autograd.grad(layer(x).square().sum(), parameters)
    turned = layer.weight + adapter.alpha * adapter.up @ adapter.down
    magnitude = lengths(layer.weight) + adapter.length_change
    merged = turned * (magnitude / lengths(turned).detach())[:, None]
    wanted = torch.autograd.grad((x @ merged.T + layer.bias).square().sum(), parameters)
    for own, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-4)


def test_dora_leaves_outputs_that_are_always_zero_at_zero():
    module = nn.ModuleDict({"layer": nn.Linear(IN, OUT)})
    nn.init.zeros_(module["layer"].weight[:2].data)
    change = change_of(module["layer"], 2, dora=True, zero=True)
    before = module["layer"](inputs("linear"))
    attach_adapters(module, "one", {"layer": change})
    assert torch.equal(module["layer"](inputs("linear")), before)
    merge_adapters(module)
    torch.testing.assert_close(module["layer"](inputs("linear")), before)


def test_no_matrix_of_the_weight_s_size_is_kept_for_the_gradient():
    module = nn.ModuleDict({"layer": nn.Linear(64, 64)})
    attach_adapters(module, "one", {"layer": LowRank(torch.randn(2, 64), torch.randn(64, 2))})
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        module["layer"](torch.randn(3, 64, requires_grad=True))
    own = [t for t in kept if t.numel() >= 64 * 64 and t.data_ptr() != module["layer"].weight.data_ptr()]
    assert own == []


def test_dropout_hides_inputs_from_the_adapter_alone_and_only_in_training():
    module, x = network("linear"), torch.ones(1, 4000, IN)
    change = change_of(module["layer"], 2)
    base = module["layer"](x)
    attach_adapters(module.eval(), "one", {"layer": change}, dropout=0.25)
    layer = module["layer"]
    without = layer(x) - base
    torch.manual_seed(0)
    with_dropout = layer.train()(x) - base
    assert not torch.allclose(without, with_dropout)
    torch.testing.assert_close(with_dropout.mean(1), without.mean(1), rtol=0.1, atol=0.02)  # in the mean it is the same
    layer.adapters["one"].multiplier = 0.0
    assert torch.equal(layer(x), base)


@pytest.mark.parametrize("kind", ["linear", "convolution 3x3"])
@pytest.mark.parametrize("dora", [False, True])
def test_autocast_computes_in_its_own_type_and_starts_at_the_base(kind, dora):
    module, x = network(kind), inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        base = module["layer"](x)
        attach_adapters(module, "new", {"layer": change_of(module["layer"], 2, dora=dora, zero=True)})
        assert torch.equal(module["layer"](x), base)
    detach_adapters(module)
    attach_adapters(module, "one", {"layer": change_of(module["layer"], 2, dora=dora)})
    whole = module["layer"](x)
    with torch.autocast("cpu", torch.bfloat16):
        y = module["layer"](x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), whole, rtol=0.05, atol=0.05)


# CLIP's text tower keeps q, k and v in one matrix.


def tower(width=32, heads=2, dtype="float32"):
    torch.manual_seed(0)
    return CLIPTextEncoder(width, 2, heads, context_length=12, precision=dtype).tower


def of_tower(module, zero=False, dora=False, only=".*"):
    return {
        name: change_of(nn.ParameterDict({"weight": weight}), 2, zero=zero, dora=dora, seed=i)
        for i, (name, weight) in enumerate(adaptable_layers(module).items())
        if re.fullmatch(only, name)
    }


TOKENS = torch.arange(48).view(4, 12) * 7


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(32, "float32"), (256, "float32"), (256, "bfloat16")])
def test_a_fresh_adapter_of_the_text_tower_changes_nothing_bit_for_bit(width, dtype, grad, dora):
    module = tower(width, width // 16, dtype)
    with torch.set_grad_enabled(grad):
        base = module(TOKENS)
        attach_adapters(module, "new", of_tower(module, zero=True, dora=dora))
        assert torch.equal(module(TOKENS), base)


@pytest.mark.parametrize("only", [".*", r".*\.k_proj", r".*\.out_proj", r".*mlp.*"])
@pytest.mark.parametrize("dora", [False, True])
def test_the_adapted_text_tower_is_the_one_of_merged_weights(only, dora):
    module, plain = tower(), tower()
    before, state = module(TOKENS), module.state_dict().keys()
    changes = of_tower(module, dora=dora, only=only)
    attach_adapters(module, "one", changes)
    adapted = module(TOKENS)
    assert (adapted - before).abs().max() > 1e-2
    for name, change in changes.items():
        parent, _, part = name.rpartition(".")
        owner = plain.get_submodule(parent)
        if part in ("q_proj", "k_proj", "v_proj"):
            weight = owner.in_proj_weight.data.chunk(3)["qkv".index(part[0])]
        else:
            weight = plain.get_submodule(name).weight.data
        weight.copy_(change.merged(weight))
    torch.testing.assert_close(adapted, plain(TOKENS), rtol=1e-4, atol=1e-5)
    merge_adapters(module)
    assert torch.equal(module(TOKENS), plain(TOKENS))
    unmerge_adapters(module)
    assert torch.equal(module(TOKENS), adapted)
    detach_adapters(module)
    assert torch.equal(module(TOKENS), before)
    assert module.state_dict().keys() == state


def test_the_names_inside_a_fused_attention_are_the_published_ones_cut_in_four():
    names = [name for name in of_tower(tower()) if name.startswith("transformer.resblocks.1.")]
    parts = ["attn.q_proj", "attn.k_proj", "attn.v_proj", "attn.out_proj", "mlp.c_fc", "mlp.c_proj"]
    assert names == [f"transformer.resblocks.1.{part}" for part in parts]


def test_a_copy_of_an_adapted_tower_owns_its_weights():
    module = tower()
    attach_adapters(module, "one", of_tower(module))
    other = copy.deepcopy(module)
    before = module(TOKENS)
    merge_adapters(other)
    assert torch.equal(module(TOKENS), before)
    assert list(adapted_layers(other)) == list(adapted_layers(module))
