"""The parts of the U-Net against the formulas in their docstrings."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_train.nn.attention import PlainAttention, SpatialTransformer
from ldm_train.nn.resnet import Downsample, ResidualBlock, Upsample


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 4
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)
    return module.eval()


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def test_plain_attention_is_the_softmax_of_scaled_products_head_by_head():
    layer, x = randomised(PlainAttention(12, num_heads=3, norm_groups=4)), draw(2, 12, 4, 3)
    h = F.group_norm(x, 4, layer.norm.weight, layer.norm.bias, eps=1e-5).permute(0, 2, 3, 1).reshape(2, 12, 12)
    heads = []
    for head in range(3):
        rows = slice(4 * head, 4 * head + 4)
        q, k, v = (h @ part.weight[rows].T + part.bias[rows] for part in (layer.to_q, layer.to_k, layer.to_v))
        heads.append(torch.softmax(q @ k.transpose(1, 2) / 2.0, dim=-1) @ v)  # 2 = sqrt(4)
    attended = torch.cat(heads, dim=-1) @ layer.to_out.weight.T + layer.to_out.bias
    torch.testing.assert_close(layer(x), x + attended.permute(0, 2, 1).reshape(2, 12, 4, 3))


def test_an_embedding_that_scales_and_shifts_is_another_gain_and_bias_of_the_normalisation():
    """(1 + s) (gain n + bias) + b has the gain (1 + s) gain and the bias (1 + s) bias + b."""
    block = randomised(ResidualBlock(8, 12, 6, norm_groups=4, time_modulation="scale_shift"))
    plain = randomised(ResidualBlock(8, 12, None, norm_groups=4))
    embedding, x = draw(1, 6), draw(1, 8, 5, 5)
    plain.load_state_dict({key: value for key, value in block.state_dict().items() if not key.startswith("embed")})
    scale, shift = block.embed(F.silu(embedding))[0].chunk(2)
    with torch.no_grad():
        plain.norm_out.weight.mul_(1 + scale)
        plain.norm_out.bias.mul_(1 + scale).add_(shift)
    torch.testing.assert_close(block(x, embedding), plain(x))


@pytest.mark.parametrize("resample", ["up", "down"])
def test_a_block_that_resamples_is_the_plain_block_on_the_other_resolution(resample):
    """On maps that are constant in 2 x 2 squares, where normalisation, SiLU and averaging commute."""
    block, plain = (
        randomised(ResidualBlock(8, 8, 6, norm_groups=4, time_modulation="scale_shift", resample=kind))
        for kind in (resample, None)
    )
    embedding, coarse = draw(2, 6), draw(2, 8, 3, 4)
    fine = coarse.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    x, other = (coarse, fine) if resample == "up" else (fine, coarse)
    torch.testing.assert_close(block(x, embedding), plain(other, embedding))


def test_changes_of_resolution_have_no_use_for_an_embedding():
    for layer in (Downsample(4, symmetric=True), Upsample(4)):
        x = draw(1, 4, 6, 6)
        assert torch.equal(layer(x, draw(1, 3)), layer(x))


@pytest.mark.parametrize("linear_projection", [False, True])
def test_only_from_a_channels_last_map_do_all_layers_of_a_transformer_read_contiguous_tokens(linear_projection):
    """Those that do not would copy them first."""
    layer = randomised(SpatialTransformer(8, 6, 2, 1, linear_projection, norm_groups=4))
    x, context, copied = draw(2, 8, 4, 4), draw(2, 5, 6), []
    readers = [child for child in layer.modules() if isinstance(child, nn.Linear | nn.LayerNorm)]
    for child in readers:
        child.register_forward_pre_hook(lambda reader, given: copied.extend([reader] * (not given[0].is_contiguous())))
    y = layer(x.contiguous(memory_format=torch.channels_last), context)
    assert copied == []
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(layer(x, context), y)
    assert copied[0] is readers[0]


def test_normalisation_sees_float32_under_autocast():
    """It does not depend on the input's mean; at a mean of 300, bfloat16 would keep one value in two."""
    block, x = randomised(ResidualBlock(8, 8, None, norm_groups=4)), draw(2, 8, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        branch, moved = (block(given) - given for given in (x, x + 300.0))
    assert (branch - moved).norm() < 0.03 * branch.norm()
