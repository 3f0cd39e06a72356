"""Adapters of small models, random, with a scale, rank and kind of their own for each layer."""

import copy
import re

import torch

from ldm_train.interchange.adapter_names import AdapterBase, TextShape, layers_of
from ldm_train.interchange.adapter_weights import Weighted, merged
from ldm_train.nn.low_rank import LowRank

from .models import TOWERS, WIDTH
from .unets import SMALL_UNET

SMALL_BASE = AdapterBase(SMALL_UNET, TextShape(TOWERS["openai"]["num_layers"], WIDTH))


def random_adapters(base=SMALL_BASE, chosen=".*", ranks=(4,), alphas=(1.0,), seed=0, *, dora=False):
    """Adapters of the layers whose keys match, ranks and scales by turns; large enough to be seen in a prediction."""
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in layers_of(base) if re.fullmatch(chosen, layer.key)]
    result = {}
    for index, layer in enumerate(layers):
        rank, alpha = ranks[index % len(ranks)], alphas[index % len(alphas)]
        out, *entering = layer.weight_shape
        fan_in = torch.Size(entering).numel()
        down = torch.randn(rank, *entering, generator=generator) * fan_in**-0.5
        up = torch.randn(out, rank, *(1,) * (len(entering) - 1), generator=generator) * rank**-0.5 * 0.5
        magnitude = torch.rand(out, generator=generator) + 0.5 if dora else None
        result[layer.key] = LowRank(down, up, alpha, magnitude)
    return result


def with_adapters(unet, *sets):
    """A copy of our U-Net with sets of adapters, each with a weight, in its weights."""
    state = merged(unet.state_dict(), "unet.", [Weighted(*each) for each in sets])
    result = copy.deepcopy(unet)
    result.load_state_dict(state, strict=True)
    return result


def assert_same_adapters(found, expected, tolerance=0.0):
    """The same layers, and the same changes of them."""
    assert list(found) == list(expected)
    for key, adapter in expected.items():
        assert (found[key].magnitude is None) == (adapter.magnitude is None)
        difference = (found[key].delta() - adapter.delta()).norm() / adapter.delta().norm()
        assert float(difference) <= tolerance, key
        if adapter.magnitude is not None:
            assert torch.equal(found[key].magnitude.float(), adapter.magnitude.float())
