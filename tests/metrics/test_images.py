import pytest
import torch

from ldm_train.metrics import to_uint8


def test_bytes_survive_the_way_to_floats_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert to_uint8(levels) is levels


def test_values_round_to_the_nearest_level_and_never_wrap():
    level = 1 / 127.5
    values = torch.tensor([-1e9, -1.01, -1 + 0.49 * level, -1 + 0.51 * level, 1 - 0.51 * level, 1.004, 1.01, 3.0, 1e9])
    assert to_uint8(values).tolist() == [0, 0, 0, 1, 254, 255, 255, 255, 255]


def test_half_precision_rounds_like_float32():
    values = torch.linspace(-1, 1, 33, dtype=torch.bfloat16)
    assert torch.equal(to_uint8(values), to_uint8(values.float()))


def test_what_is_no_image_is_refused():
    with pytest.raises(ValueError, match=r"sampler.*guidance\.scale"):
        to_uint8(torch.tensor([0.0, float("nan")]))
    with pytest.raises(ValueError, match=r"int64 found; allowed are uint8"):
        to_uint8(torch.zeros(3, dtype=torch.int64))
