import pytest
import torch

from ldm_train.diffusion import (
    DDIMSampler,
    DDPMSampler,
    DPMSolverSampler,
    EulerSampler,
    HeunSampler,
    InpaintingDenoiser,
    linear_schedule,
)
from ldm_train.randomness import Stream, normal

SAMPLERS = [
    DDPMSampler(20),
    DDIMSampler(20),
    DDIMSampler(20, eta=1.0),
    EulerSampler(20),
    HeunSampler(20),
    DPMSolverSampler(20),
]
SHAPE = (4, 2, 6, 6)


@pytest.fixture
def known():
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def mask():
    return (torch.rand(SHAPE[0], 1, *SHAPE[2:], generator=torch.Generator().manual_seed(1)) < 0.5).float()


def painted(denoiser, sampler, nothing):
    seeds = torch.arange(SHAPE[0])
    return sampler(denoiser, normal(1, 0, seeds, Stream.SAMPLING, SHAPE[1:]), nothing, 1, seeds)


@pytest.mark.parametrize("sampler", SAMPLERS, ids=lambda s: type(s).__name__)
def test_what_is_known_is_exact_at_the_end_and_the_rest_is_the_sampler_s(sampler, known, mask, gaussian, nothing):
    """Pixels of this denoiser do not see each other, so the unknown ones must not notice the known ones."""
    denoiser = gaussian(linear_schedule())
    x = painted(InpaintingDenoiser(denoiser, known, mask), sampler, nothing)
    is_known = mask.bool().expand_as(x)
    assert torch.equal(x[is_known], known[is_known])
    free = painted(denoiser, sampler, nothing)
    torch.testing.assert_close(x[~is_known], free[~is_known])


def test_a_denoiser_that_sees_its_surroundings_fills_the_hole_to_suit_them(known, mask, nothing, gaussian):
    """Where images are flat, a hole takes the one colour that is known."""

    class Flat:
        def __init__(self):
            self.schedule, self.variance, self.seen = (
                linear_schedule(),
                "posterior",
                gaussian(linear_schedule(), 0.0, 1.0),
            )

        def __call__(self, x_t, t, conditioning):
            mean = x_t.mean(dim=(2, 3), keepdim=True)
            return self.seen(mean.expand_as(x_t), t, conditioning)

    colours = torch.linspace(-1, 1, SHAPE[0]).view(-1, 1, 1, 1).expand(SHAPE)
    hole = torch.ones(SHAPE[0], 1, *SHAPE[2:])
    hole[..., 2:4, 2:4] = 0
    x = painted(InpaintingDenoiser(Flat(), colours, hole), DDIMSampler(100), nothing)
    distance = (x - colours)[..., 2:4, 2:4].mean(dim=(1, 2, 3)).abs()
    assert float(distance.max()) < 0.25
    free = painted(Flat(), DDIMSampler(100), nothing)
    assert float((free - colours)[..., 2:4, 2:4].mean(dim=(1, 2, 3)).abs().max()) > 0.5


def test_estimates_of_data_and_noise_make_up_the_state(known, mask, gaussian, nothing):
    denoiser = gaussian(linear_schedule(), variance="learned", fraction=0.5)
    inpainting = InpaintingDenoiser(denoiser, known, mask)
    t = torch.tensor([0, 10, 500, 999])
    x = torch.randn(SHAPE)
    x_0, noise, fraction = inpainting(x, t, nothing)
    alpha, sigma = denoiser.schedule.scales(t, 4)
    torch.testing.assert_close(alpha * x_0 + sigma * noise, x)
    assert inpainting.variance == "learned"
    assert torch.equal(fraction, torch.full_like(x, 0.5))


def test_a_mask_of_another_shape_is_refused(known, mask, gaussian):
    with pytest.raises(ValueError, match=r"\(4, 2, 6, 6\); allowed is \(4, 1, 6, 6\).* change `mask`"):
        InpaintingDenoiser(gaussian(linear_schedule()), known, mask.expand(SHAPE))
