import copy

import pytest
import torch
from torch import nn

from ldm_train.nn import (
    LoRALinear,
    UNet,
    inject_lora,
    load_lora_state_dict,
    lora_disabled,
    lora_layers,
    lora_shape,
    lora_state_dict,
    merge_lora,
)

from .test_unet import SMALL, inputs, randomised


def adapted(rank=2, alpha=0.5, targets="attention_and_feed_forward", random=True):
    unet = randomised(UNet(**SMALL)).eval()
    names = inject_lora(unet, targets, rank, alpha)
    if random:
        with torch.no_grad():
            for i, (_, layer) in enumerate(lora_layers(unet)):
                layer.up.normal_(generator=torch.Generator().manual_seed(i))
    return unet, names


def test_a_fresh_adapter_changes_nothing_bit_for_bit():
    base = randomised(UNet(**SMALL)).eval()
    unet, _ = adapted(random=False)
    assert torch.equal(base(*inputs()), unet(*inputs()))


def test_the_layer_computes_w_plus_alpha_b_a():
    layer = LoRALinear(nn.Linear(6, 4), rank=3, alpha=0.7)
    nn.init.normal_(layer.up)
    x = torch.randn(5, 6)
    weight = layer.base.weight + 0.7 * layer.up @ layer.down
    torch.testing.assert_close(layer(x), x @ weight.T + layer.base.bias)


@pytest.mark.parametrize("rank", [1, 4])
def test_merged_and_adapted_networks_agree(rank):
    unet, _ = adapted(rank)
    before = unet(*inputs())
    merged = copy.deepcopy(unet)
    merge_lora(merged)
    assert list(lora_layers(merged)) == []
    torch.testing.assert_close(merged(*inputs()), before, rtol=1e-4, atol=1e-4)
    assert merged.state_dict().keys() == UNet(**SMALL).state_dict().keys()


def test_disabled_adapters_are_the_base_model_and_come_back():
    base = randomised(UNet(**SMALL)).eval()
    unet, _ = adapted()
    with_adapters = unet(*inputs())
    with lora_disabled(unet):
        assert torch.equal(unet(*inputs()), base(*inputs()))
    assert torch.equal(unet(*inputs()), with_adapters)
    assert not torch.allclose(with_adapters, base(*inputs()))


def test_only_adapters_are_trained_and_all_of_them():
    unet, names = adapted()
    unet(*inputs()).square().mean().backward()
    trained = {name for name, p in unet.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {f"{name}.{part}" for name in names for part in ("up", "down")}


def test_state_dict_round_trip_rebuilds_the_adapters_from_the_file_alone():
    unet, _ = adapted(rank=3, alpha=0.25)
    state = lora_state_dict(unet)
    other = randomised(UNet(**SMALL)).eval()
    inject_lora(other, *lora_shape(state))
    load_lora_state_dict(other, state)
    assert torch.equal(other(*inputs()), unet(*inputs()))


def test_stable_diffusion_s_attention_has_128_layers_and_797184_parameters_at_rank_4():
    with torch.device("meta"):
        unet = UNet(4, 4, context_dim=768, num_heads=8)
        names = inject_lora(unet, "attention", rank=4, alpha=1.0)
    assert len(names) == 128
    assert sum(p.numel() for p in unet.parameters() if p.requires_grad) == 797_184


def test_what_fits_no_layer_or_file_is_refused():
    unet, _ = adapted()
    state = lora_state_dict(unet)
    with pytest.raises(ValueError, match=r"match none of .* change `stage.targets`"):
        inject_lora(UNet(**SMALL), ["nothing"], 2, 1.0)
    with pytest.raises(ValueError, match=r"'all' is no preset; allowed are attention"):
        inject_lora(UNet(**SMALL), "all", 2, 1.0)
    with pytest.raises(ValueError, match=r"rank is 99 .* change `stage.rank`"):
        inject_lora(UNet(**SMALL), "attention", 99, 1.0)
    with pytest.raises(ValueError, match=r"shapes \['.* is \(2, 32\), not \(3, 32\)'"):
        load_lora_state_dict(adapted(rank=3)[0], state)
    with pytest.raises(ValueError, match=r"1 keys missing"):
        load_lora_state_dict(unet, dict(list(state.items())[1:]))
    with pytest.raises(ValueError, match="no LoRA adapter among 1 tensors"):
        lora_shape({"weight": torch.zeros(1)})
