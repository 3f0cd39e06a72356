"""The layers have torch's values, whoever computes the products."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ldm_train.nn import linear as module
from ldm_train.nn.linear import Conv2d, Linear, feature_map, linear, tokens

ONEDNN = pytest.mark.skipif(not module._HAS_ONEDNN, reason="this build of torch has no oneDNN")


def draw(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def results(function, x, weight, bias, g):
    """The value, and the gradients of what wants one, in float64."""
    y = function(x, weight, bias)
    wanted = [tensor for tensor in (x, weight, bias) if tensor is not None and tensor.requires_grad]
    return [tensor.double() for tensor in (y.detach(), *torch.autograd.grad(y, wanted, g.to(y.dtype)))]


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (1, 64, 33, 48), (4, 1, 16, 1)])
@pytest.mark.parametrize("wanted", [(True, True, True), (True, False, False), (False, True, True), (True, True, None)])
@pytest.mark.parametrize("layout", ["plain", "strided", "expanded"])
def test_value_and_gradients_are_those_of_exact_arithmetic(shape, wanted, layout):
    batch, count, c_in, c_out = shape
    x, weight, bias = draw(batch, count, c_in), draw(c_out, c_in), draw(c_out)
    g = draw(batch, count, c_out)
    if layout == "strided":
        x, g = draw(batch, c_in, count).transpose(1, 2), draw(batch, c_out, count).transpose(1, 2)
    if layout == "expanded":
        g = torch.ones(()).expand(batch, count, c_out)
    given = [
        None if want is None else tensor.requires_grad_(want)
        for tensor, want in zip((x, weight, bias), wanted, strict=True)
    ]
    exact = [
        None if tensor is None else tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in given
    ]
    for found, expected in zip(results(linear, *given, g), results(F.linear, *exact, g), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


@pytest.fixture
def products(monkeypatch):
    """The products that oneDNN is asked for."""
    calls, product = [], module._product
    monkeypatch.setattr(module, "_product", lambda *given: calls.append(1) or product(*given))
    return calls


@ONEDNN
def test_float32_on_a_cpu_takes_the_fast_way_and_nothing_else_does(products):
    layer, x = Linear(4, 6), draw(2, 3, 4)
    layer(x)
    assert len(products) == 1
    layer(x).sum().backward()
    assert len(products) == 3  # the value again, and the weight's gradient; nobody wants the input's
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
    layer.double()(x.double())
    layer.bfloat16()(x.bfloat16())
    layer.to("meta")(x.to("meta"))
    assert len(products) == 3


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    ("kernel", "stride", "padding"), [(1, 1, 0), (1, 2, 0), (3, 1, 1), (3, 2, 1), (3, 2, 0), (5, 1, 2)]
)
@pytest.mark.parametrize("size", [(4, 6), (5, 7), (12, 16)], ids=["few", "odd", "many"])
def test_value_and_gradients_are_those_of_torch_s_convolution(memory_format, kernel, stride, padding, size):
    torch.manual_seed(0)
    layer = Conv2d(6, 64, kernel, stride, padding=padding).to(memory_format=memory_format)
    plain = nn.Conv2d(6, 64, kernel, stride, padding=padding).double()
    plain.load_state_dict(layer.state_dict())
    x = draw(2, 6, *size).contiguous(memory_format=memory_format).requires_grad_()
    exact = x.detach().double().requires_grad_()
    y, expected = layer(x), plain(exact)
    torch.testing.assert_close(y.double(), expected, rtol=1e-5, atol=1e-5)
    assert y.is_contiguous(memory_format=memory_format)
    g = draw(*y.shape)
    y.backward(g)
    expected.backward(g.double())
    found = (x.grad, *(parameter.grad for parameter in layer.parameters()))
    wanted = (exact.grad, *(parameter.grad for parameter in plain.parameters()))
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-4, atol=1e-4)
    assert layer.weight.grad.is_contiguous(memory_format=memory_format)


@ONEDNN
def test_a_convolution_becomes_a_product_where_it_has_fewer_positions_than_channels(products):
    layer = Conv2d(4, 32, 3, padding=1).to(memory_format=torch.channels_last)
    for positions, product in ((32, True), (33, False)):
        products.clear()
        layer(draw(1, 4, 1, positions).to(memory_format=torch.channels_last))
        assert bool(products) == product
    products.clear()
    layer(draw(1, 4, 4, 8))  # contiguous
    layer.to(memory_format=torch.contiguous_format)(draw(1, 4, 4, 8).to(memory_format=torch.channels_last))
    assert not products


def test_tokens_of_a_channels_last_map_are_a_view_and_back():
    x = draw(2, 6, 5, 3).contiguous(memory_format=torch.channels_last)
    seen = tokens(x)
    assert seen.is_contiguous()
    assert seen.data_ptr() == feature_map(seen, x).data_ptr() == x.data_ptr()
    assert torch.equal(seen[1, 4], x[1, :, 1, 1])  # row by row
    assert torch.equal(feature_map(seen, x), x)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU by g++")
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(Linear(8, 16), (2, 5, 8)), (Conv2d(8, 16, 3, padding=1), (2, 8, 3, 3)), (Conv2d(8, 16, 1), (2, 8, 6, 6))],
)
def test_torch_s_own_compiler_takes_the_layers(layer, shape):
    x = draw(*shape)
    if len(shape) == 4:
        layer, x = layer.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    x.requires_grad_()
    expected = layer(x)
    gradients = torch.autograd.grad(expected.square().sum(), (x, *layer.parameters()))
    layer.compile()
    found = layer(x)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found.square().sum(), (x, *layer.parameters())), gradients)
