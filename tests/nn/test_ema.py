import pytest
import torch
from torch import nn

from ldm_train.nn.ema import ExponentialMovingAverage, load_average


def _module(seed=0):
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    module[0].bias.requires_grad_(False)
    return module


def _fill(module, value):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.fill_(value)


def _values(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def _assert_equal(left, right):
    assert left.keys() == right.keys()
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


def test_average_is_the_closed_form_of_its_decays():
    module = _module()
    _fill(module, 0.0)
    ema = ExponentialMovingAverage(module, decay=0.5)
    expected, values = 0.0, [1.0, -2.0, 4.0, 8.0, 3.0, 0.5, 0.25, 7.0, 1.5, 2.5, 9.0, -1.0]
    for n, value in enumerate(values):
        _fill(module, value)
        ema.update(module)
        d = min(0.5, (1 + n) / (10 + n))
        expected = d * expected + (1 - d) * value
    for average in ema.average.values():
        torch.testing.assert_close(average, torch.full_like(average, expected))


def test_only_trainable_parameters_are_averaged():
    assert set(ExponentialMovingAverage(_module()).average) == {"0.weight", "1.weight", "1.bias"}


def test_half_life_halves_an_old_value_after_that_many_images_for_any_batch_size():
    for images in (1, 8, 64):
        ema = ExponentialMovingAverage(_module(), decay=None, half_life_images=512)
        ema.num_updates = 10**9  # past the warm-up
        assert ema.next_decay(images) ** (512 / images) == pytest.approx(0.5)


def test_warm_up_bounds_the_decay_then_leaves_it():
    ema = ExponentialMovingAverage(_module(), decay=0.999)
    assert ema.next_decay() == pytest.approx(0.1)
    ema.num_updates = 8990
    assert ema.next_decay() == pytest.approx(0.999)


def test_swap_shows_the_averages_and_gives_the_raw_values_back_bit_for_bit():
    module = _module().to(torch.bfloat16)
    ema = ExponentialMovingAverage(module, decay=0.9)
    _fill(module, 1 / 3)
    ema.update(module)
    raw = _values(module)
    with ema.swap(module):
        for name, average in ema.average.items():
            assert torch.equal(module.get_parameter(name), average.to(torch.bfloat16))
        _assert_equal(ema.raw, {name: raw[name] for name in ema.average})
    _assert_equal(_values(module), raw)
    assert ema.raw is None


def test_swap_gives_back_after_an_exception():
    module = _module()
    ema = ExponentialMovingAverage(module, decay=0.9)
    raw = _values(module)
    with pytest.raises(IndexError), ema.swap(module):
        module[7].fill_(0)
    _assert_equal(_values(module), raw)


def test_what_would_lose_the_raw_values_is_refused_while_swapped():
    module = _module()
    ema = ExponentialMovingAverage(module, decay=0.9)
    with ema.swap(module):
        with pytest.raises(RuntimeError, match="already swapped"), ema.swap(module):
            pass
        with pytest.raises(RuntimeError, match="cannot be updated"):
            ema.update(module)


def test_the_average_moves_although_bfloat16_could_not_hold_the_difference():
    module = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    _fill(module, 1.0)
    ema = ExponentialMovingAverage(module, decay=0.9999)
    ema.num_updates = 10**9
    _fill(module, 2.0)
    for _ in range(100):
        ema.update(module)
    assert ema.average["weight"].item() == pytest.approx(2 - 0.9999**100, abs=1e-5)


def test_state_round_trip_continues_as_if_unbroken(tmp_path):
    module, other = _module(), _module(seed=1)
    ema = ExponentialMovingAverage(module, decay=0.9)
    for value in (1.0, 2.0, 3.0):
        _fill(module, value)
        ema.update(module)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    restored = ExponentialMovingAverage(other, decay=0.9)
    restored.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    ema.update(module)
    restored.update(module)
    _assert_equal(restored.average, ema.average)

    load_average(other, ema.state_dict())
    _assert_equal({name: other.get_parameter(name).data for name in ema.average}, ema.average)


def test_loading_is_strict_and_lists_every_difference():
    state = ExponentialMovingAverage(_module()).state_dict()
    average = dict(state["average"])
    average["old.weight"] = average.pop("0.weight")
    average["1.bias"] = torch.zeros(7)
    broken = {**state, "average": average}
    with pytest.raises(ValueError, match=r"missing: +0\.weight(.|\n)*shape: +1\.bias is \(7,\)(.|\n)*unexpected: +old"):
        ExponentialMovingAverage(_module()).load_state_dict(broken)
    with pytest.raises(ValueError, match=r"old\.weight"):
        load_average(_module(), broken)


def _train(ema, module):
    generator = torch.Generator().manual_seed(0)
    for images in (4, 8, 16):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter))
        ema.update(module, images)


def _check_the_host_s_average_against_the_module_s(device, dtype):
    modules = [_module().to(device, dtype) for _ in range(2)]
    beside, host = (
        ExponentialMovingAverage(m, decay=0.5, device=d) for m, d in zip(modules, (None, "cpu"), strict=True)
    )
    for ema, module in zip((beside, host), modules, strict=True):
        _train(ema, module)
    for name, average in host.average.items():
        assert average.device.type == "cpu"
        torch.testing.assert_close(average, beside.average[name].cpu(), rtol=1e-6, atol=1e-7)
    raw = _values(modules[1])
    with host.swap(modules[1]), beside.swap(modules[0]):
        assert all(value.device.type == "cpu" for value in host.raw.values())
        shown = [_values(module) for module in modules]
        for name in host.average:
            torch.testing.assert_close(shown[1][name], shown[0][name])
    _assert_equal(_values(modules[1]), raw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_on_the_host_is_the_average_beside_the_parameters(dtype):
    _check_the_host_s_average_against_the_module_s("cpu", dtype)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_average_on_the_host_follows_parameters_on_a_gpu(dtype):
    _check_the_host_s_average_against_the_module_s("cuda", dtype)


def test_a_state_fits_wherever_the_average_is_kept():
    module = _module()
    beside, host = ExponentialMovingAverage(module), ExponentialMovingAverage(_module(seed=1), device="cpu")
    beside.update(module)
    host.load_state_dict(beside.state_dict())
    _assert_equal(host.average, beside.average)


def test_another_device_than_the_host_is_refused():
    with pytest.raises(ValueError, match=r"'cuda:1'; allowed are cpu .* change `callbacks\.ema\.device`"):
        ExponentialMovingAverage(_module(), device="cuda:1")


@pytest.mark.parametrize(
    "arguments", [{"half_life_images": 10}, {"decay": None}, {"decay": 1.0}, {"decay": None, "half_life_images": 0}]
)
def test_exactly_one_valid_clock_is_required(arguments):
    with pytest.raises(ValueError, match=r"callbacks\.ema\.decay"):
        ExponentialMovingAverage(_module(), **arguments)
