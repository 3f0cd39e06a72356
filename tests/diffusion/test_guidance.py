import pytest
import torch

from ldm_train.batch import Conditioning
from ldm_train.diffusion import ClassifierFreeGuidance, Denoised, linear_schedule


class Echo:
    """Denoises to the mean of its context tokens, and counts its calls."""

    def __init__(self):
        self.schedule = linear_schedule()
        self.calls = 0

    def __call__(self, x_t, t, conditioning):
        self.calls += 1
        value = conditioning.context.mean(dim=(1, 2)).view(-1, 1, 1, 1)
        return Denoised(x_t * 0 + value, x_t * 0 - value)


def given(value, count=3):
    return Conditioning(context=torch.full((count, 2, 4), value))


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 3.0, 7.5])
def test_guidance_extrapolates_from_null_to_condition(scale):
    denoiser = Echo()
    x = torch.zeros(3, 1, 2, 2)
    guided = ClassifierFreeGuidance(scale)(denoiser, given(1.0))(x, torch.zeros(3, dtype=torch.long), given(5.0))
    expected = 1.0 + scale * (5.0 - 1.0)
    torch.testing.assert_close(guided.x_0, torch.full_like(x, expected))
    torch.testing.assert_close(guided.noise, torch.full_like(x, -expected))
    assert denoiser.calls == 1


def test_scale_one_is_the_conditional_denoiser_itself():
    denoiser = Echo()
    assert ClassifierFreeGuidance(1.0)(denoiser, given(0.0)) is denoiser


def test_a_negative_scale_is_refused():
    with pytest.raises(ValueError, match=r"change `guidance\.scale`"):
        ClassifierFreeGuidance(-1.0)
