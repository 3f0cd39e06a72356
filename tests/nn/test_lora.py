"""Adapters on whole networks: several by name, on and off, merged and restored; only they are trained."""

import copy
from io import BytesIO

import pytest
import torch
from torch import nn

from ldm_train.nn import (
    PRESETS,
    Adaptation,
    LowRank,
    UNet,
    adapted_layers,
    adapter_names,
    adapters_of,
    attach_adapters,
    bake_adapters,
    detach_adapters,
    inject_adapters,
    lora_disabled,
    merge_adapters,
    set_multiplier,
    unmerge_adapters,
)
from ldm_train.nn.attention import SpatialTransformer

from .test_unet import SMALL, gradients, inputs, inputs_of, randomised, variant

EVERYTHING = "transformers_and_residual_blocks"


def learn(module):
    """Adapters that change something."""
    with torch.no_grad():
        for i, layer in enumerate(adapted_layers(module).values()):
            for adapter in layer.of_adapters():
                adapter.up.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
                if adapter.length_change is not None:
                    adapter.length_change.normal_(std=0.2, generator=torch.Generator().manual_seed(i))
    return module


def adapted(targets=EVERYTHING, rank=2, alpha=0.5, random=True, **options):
    unet = randomised(UNet(**SMALL)).eval()
    names = inject_adapters(unet, Adaptation(targets, rank, alpha, **options))
    return (learn(unet) if random else unet), names


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_fresh_adapter_changes_nothing_bit_for_bit(preset, dora):
    base = randomised(UNet(**SMALL)).eval()
    unet, _ = adapted(preset, random=False, dora=dora)
    assert torch.equal(base(*inputs()), unet(*inputs()))


@pytest.mark.parametrize("network", ["deep", "plain", "residual"])
def test_so_it_is_in_the_other_kinds_of_networks(network):
    unet = variant(network)
    before = unet(*inputs_of(unet))
    names = inject_adapters(unet, Adaptation(EVERYTHING, 2))
    assert torch.equal(unet(*inputs_of(unet)), before)
    assert any(".to_q" in name for name in names)
    assert any("residual" in name for name in names)
    assert ("downsample.conv_in" in str(names)) == (network == "residual")


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("rank", [1, 4])
def test_merged_and_adapted_networks_agree(rank, dora):
    unet, _ = adapted(rank=rank, dora=dora)
    base = randomised(UNet(**SMALL)).eval()
    change = adapters_of(unet, "default")
    with torch.no_grad():
        for name, own in change.items():
            layer = base.get_submodule(name)
            layer.weight.copy_(own.merged(layer.weight))
        before, wanted = unet(*inputs()), base(*inputs())
        torch.testing.assert_close(before, wanted, rtol=1e-4, atol=1e-4)
        merge_adapters(unet)
        assert torch.equal(unet(*inputs()), wanted)
        unmerge_adapters(unet)
        assert torch.equal(unet(*inputs()), before)
        bake_adapters(unet)
        assert torch.equal(unet(*inputs()), wanted)
    assert adapted_layers(unet) == {}
    assert unet.state_dict().keys() == base.state_dict().keys()


def test_two_adapters_at_once_are_the_base_and_the_sum_of_their_changes():
    unet, base = randomised(UNet(**SMALL)).eval(), randomised(UNet(**SMALL)).eval()
    one, two = (adapters_of(adapted(targets)[0], "default") for targets in ("attention", EVERYTHING))
    attach_adapters(unet, "one", one, multiplier=0.8)
    attach_adapters(unet, "two", two, multiplier=-0.3)
    assert adapter_names(unet) == ["one", "two"]
    with torch.no_grad():
        for change, multiplier in ((one, 0.8), (two, -0.3)):
            for name, own in change.items():
                base.get_submodule(name).weight.add_(multiplier * own.delta())
        torch.testing.assert_close(unet(*inputs()), base(*inputs()), rtol=1e-4, atol=1e-4)


def test_a_multiplier_counts_one_adapter_and_0_is_without_it():
    unet = randomised(UNet(**SMALL)).eval()
    change = adapters_of(adapted()[0], "default")
    attach_adapters(unet, "one", change, multiplier=0.5)
    alone = unet(*inputs())
    attach_adapters(unet, "two", change, multiplier=0.25)
    assert not torch.allclose(unet(*inputs()), alone)
    set_multiplier(unet, "two", 0.0)
    assert torch.equal(unet(*inputs()), alone)


def test_detached_adapters_leave_the_plain_network():
    unet, base = randomised(UNet(**SMALL)).eval(), randomised(UNet(**SMALL)).eval()
    change = adapters_of(adapted()[0], "default")
    attach_adapters(unet, "one", change)
    alone = unet(*inputs())
    attach_adapters(unet, "two", change)
    merge_adapters(unet)
    detach_adapters(unet, "two")
    assert torch.equal(unet(*inputs()), alone)
    detach_adapters(unet)
    assert torch.equal(unet(*inputs()), base(*inputs()))
    assert [type(module) for module in unet.modules()] == [type(module) for module in base.modules()]


@pytest.mark.parametrize("merged", [False, True])
def test_disabled_adapters_are_the_base_model_and_come_back(merged):
    base = randomised(UNet(**SMALL)).eval()
    unet, _ = adapted()
    if merged:
        merge_adapters(unet)
    with_adapters = unet(*inputs())
    with lora_disabled(unet):
        assert torch.equal(unet(*inputs()), base(*inputs()))
    assert torch.equal(unet(*inputs()), with_adapters)
    assert not torch.allclose(with_adapters, base(*inputs()))


@pytest.mark.parametrize("dora", [False, True])
def test_only_adapters_are_trained_and_all_of_them(dora):
    unet, names = adapted(dora=dora)
    unet(*inputs()).square().mean().backward()
    trained = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    parts = ("up", "down", *(["length_change"] if dora else []))
    assert trained == {f"{name}.adapters.default.{part}" for name in names for part in parts}
    assert {name for name, p in unet.named_parameters() if p.requires_grad} == trained


@pytest.mark.parametrize("dora", [False, True])
def test_values_come_out_as_they_went_in(dora):
    unet, _ = adapted(rank=3, alpha=0.25, dora=dora)
    change = adapters_of(unet, "default")
    other = randomised(UNet(**SMALL)).eval()
    attach_adapters(other, "again", change)
    torch.testing.assert_close(other(*inputs()), unet(*inputs()), rtol=1e-5, atol=1e-5)
    for name, own in adapters_of(other, "again").items():
        assert own.alpha == 0.25
        assert torch.equal(own.down, change[name].down)
        assert torch.equal(own.up, change[name].up)
        if dora:
            torch.testing.assert_close(own.magnitude, change[name].magnitude, rtol=1e-6, atol=1e-6)


def test_several_networks_are_one_dictionary_of_them():
    networks = nn.ModuleDict({"a": UNet(**SMALL), "b": UNet(**SMALL)})
    change = LowRank(torch.ones(1, 4, 3, 3), torch.ones(32, 1, 1, 1))
    attach_adapters(networks, "one", {"a.conv_in": change, "b.conv_in": change})
    assert list(adapters_of(networks["b"], "one")) == ["conv_in"]
    assert list(adapters_of(networks, "one")) == ["a.conv_in", "b.conv_in"]


# Ways of computing.


@pytest.mark.parametrize("dora", [False, True])
def test_recomputed_levels_give_the_same_gradients_with_dropout(dora):
    found = []
    for factors in ((), (1, 2)):
        unet = randomised(UNet(**SMALL | {"checkpoint_factors": factors})).train()
        inject_adapters(unet, Adaptation(EVERYTHING, 2, dropout=0.3, dora=dora))
        torch.manual_seed(5)
        with torch.no_grad():
            for layer in adapted_layers(unet).values():
                for adapter in layer.of_adapters():
                    adapter.down.normal_(std=0.1)
        learn(unet)
        torch.manual_seed(7)
        found.append(gradients(unet, *inputs())[0])
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-5, atol=1e-7)


def test_channels_last_is_kept():
    unet = randomised(UNet(**SMALL | {"memory_format": "channels_last"})).eval()
    other, _ = adapted()
    attach_adapters(unet, "one", adapters_of(other, "default"))
    convolution = adapted_layers(unet)["down.0.blocks.0.residual.conv_in"].adapters["one"].down
    assert convolution.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(unet(*inputs()), other(*inputs()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dora", [False, True])
def test_a_bfloat16_base_keeps_float32_adapters_and_starts_at_itself(dora):
    base = randomised(UNet(**SMALL)).eval().to(torch.bfloat16)
    unet = copy.deepcopy(base)
    inject_adapters(unet, Adaptation(EVERYTHING, 2, dora=dora))
    assert torch.equal(unet(*inputs()), base(*inputs()))
    assert {p.dtype for p in unet.parameters() if p.requires_grad} == {torch.float32}
    learn(unet)
    whole, _ = adapted(rank=2, alpha=1.0, random=False)
    detach_adapters(whole)
    attach_adapters(whole, "one", adapters_of(unet, "default"))
    close = (unet(*inputs()).float() - whole(*inputs())).norm() / whole(*inputs()).norm()
    assert close < 0.05
    unet(*inputs()).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in unet.parameters() if p.requires_grad)


def test_a_compiled_network_computes_the_same_while_adapters_come_change_and_go():
    compiled, plain = (randomised(SpatialTransformer(32, 16, 2, norm_groups=16)).eval() for _ in range(2))
    x, context = torch.randn(2, 32, 4, 4), torch.randn(2, 3, 16)
    compiled.compile(backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, context), plain(x, context))
    inject_adapters(plain, Adaptation([".*"], 2, dora=True))
    attach_adapters(compiled, "one", adapters_of(learn(plain), "default"))
    torch.testing.assert_close(compiled(x, context), plain(x, context), rtol=1e-5, atol=1e-5)
    for name, network in (("one", compiled), ("default", plain)):
        set_multiplier(network, name, 0.5)
    torch.testing.assert_close(compiled(x, context), plain(x, context), rtol=1e-5, atol=1e-5)
    with lora_disabled(compiled), lora_disabled(plain):
        assert torch.equal(compiled(x, context), plain(x, context))


def test_a_moved_and_loaded_network_keeps_what_it_computes():
    unet, _ = adapted(dora=True)
    file = BytesIO()
    torch.save(unet.state_dict(), file)
    other, _ = adapted(dora=True, random=False)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(*inputs()), unet(*inputs()))


# What does not fit.


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("taken", {}, r"there is an adapter 'taken' already, .* choose another name"),
        ("with.dot", {}, r"called 'with.dot'; allowed are names .* no dot"),
        ("", {}, r"called ''; allowed"),
        ("new", {}, r"'new' of 0 layers does not fit"),
        ("new", {"nowhere": LowRank(torch.ones(1, 2), torch.ones(3, 1))}, r"1 layers are not there \['nowhere'\]"),
        (
            "new",
            {"conv_in": LowRank(torch.ones(1, 5, 3, 3), torch.ones(32, 1, 1, 1))},
            r"1 have another shape \['conv_in is for \(32, 5, 3, 3\), not \(32, 4, 3, 3\)'\]; allowed .* name another",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(name, change, message):
    unet = randomised(UNet(**SMALL)).eval()
    fitting = LowRank(torch.ones(1, 4, 3, 3), torch.ones(32, 1, 1, 1))
    attach_adapters(unet, "taken", {"conv_in": fitting})
    before = unet(*inputs())
    with pytest.raises(ValueError, match=message):
        attach_adapters(unet, name, {"conv_out": fitting} | change if name == "taken" else change)
    assert adapter_names(unet) == ["taken"]
    assert torch.equal(unet(*inputs()), before)


def test_an_absent_adapter_and_a_merged_network_are_named():
    unet, _ = adapted()
    for ask in (
        lambda: set_multiplier(unet, "b", 1.0),
        lambda: adapters_of(unet, "b"),
        lambda: detach_adapters(unet, "b"),
    ):
        with pytest.raises(ValueError, match="there is no adapter 'b'; allowed are default; choose"):
            ask()
    merge_adapters(unet)
    for ask in (lambda: set_multiplier(unet, "default", 2.0), lambda: attach_adapters(unet, "b", {})):
        with pytest.raises(ValueError, match=r"merged into its weights; allowed .* `unmerge_adapters`"):
            ask()


def test_a_convolution_of_groups_cannot_be_adapted():
    module = nn.ModuleDict({"a": nn.Conv2d(4, 4, 3, groups=2), "b": nn.Conv2d(4, 4, 3, padding_mode="circular")})
    with pytest.raises(ValueError, match=r"match none of 0 linear layers and convolutions"):
        inject_adapters(module, Adaptation([".*"]))
