"""Samplers walk as the schedulers of diffusers do."""

import pytest
import torch

from ldm_train.batch import Conditioning
from ldm_train.diffusion import (
    DDIMSampler,
    Denoiser,
    DPMSolverSampler,
    EulerSampler,
    sampling_times,
    scaled_linear_schedule,
)

from .test_samplers import Wave

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword:DeprecationWarning")
class TestDiffusers:
    """The same noise and network under the schedulers of diffusers."""

    def ours(self, sampler):
        denoiser = Denoiser(Wave(), scaled_linear_schedule())
        x = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        return x, [s.x_t for s in sampler.trajectory(denoiser, x, Conditioning(), 1, torch.arange(2))]

    @torch.no_grad()
    def theirs(self, scheduler, x, in_coordinates_of_x_over_alpha=False):
        network = Wave()
        if in_coordinates_of_x_over_alpha:
            x = x * (scheduler.sigmas[0] ** 2 + 1) ** 0.5
        for i, t in enumerate(scheduler.timesteps):
            output = network(scheduler.scale_model_input(x, t), torch.tensor([int(t)]), None)
            x = scheduler.step(output, t, x).prev_sample
            yield x / (scheduler.sigmas[i + 1] ** 2 + 1) ** 0.5 if in_coordinates_of_x_over_alpha else x

    def compare(self, states, expected):
        expected = list(expected)
        assert len(states) == len(expected)
        for state, value in zip(states, expected, strict=True):
            torch.testing.assert_close(state, value.float(), rtol=1e-5, atol=1e-5 * float(value.abs().max()))

    # Theirs finds the next time by subtracting T // num_steps, which is right for these.
    @pytest.mark.parametrize(
        ("spacing", "final_alpha", "num_steps"),
        [("leading", "first", 50), ("leading", "first", 27), ("leading", "one", 20), ("trailing", "one", 20)],
    )
    def test_ddim(self, spacing, final_alpha, num_steps):
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler(
            **BETAS,
            clip_sample=False,
            set_alpha_to_one=final_alpha == "one",
            steps_offset=1,
            timestep_spacing=spacing,
        )
        scheduler.set_timesteps(num_steps)
        sampler = DDIMSampler(num_steps, spacing=spacing, final_alpha=final_alpha)
        x, states = self.ours(sampler)
        assert scheduler.timesteps.tolist() == sampling_times(1000, num_steps, spacing)
        self.compare(states, self.theirs(scheduler, x))

    # Theirs visits times between the schedule's where (T - 1) / (num_steps - 1) is no integer.
    @pytest.mark.parametrize(
        ("spacing", "num_steps"), [("leading", 20), ("trailing", 20), ("trailing", 30), ("linspace", 28)]
    )
    def test_euler(self, spacing, num_steps):
        from diffusers import EulerDiscreteScheduler

        scheduler = EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing=spacing)
        scheduler.set_timesteps(num_steps)
        x, states = self.ours(EulerSampler(num_steps, spacing=spacing))
        assert [round(float(t)) for t in scheduler.timesteps] == sampling_times(1000, num_steps, spacing)
        self.compare(states, self.theirs(scheduler, x, in_coordinates_of_x_over_alpha=True))

    @pytest.mark.parametrize("num_steps", [8, 20, 30])
    @pytest.mark.parametrize("spacing", ["leading", "trailing"])
    def test_dpm_solver(self, spacing, num_steps):
        from diffusers import DPMSolverMultistepScheduler

        scheduler = DPMSolverMultistepScheduler(**BETAS, final_sigmas_type="zero")
        scheduler.set_timesteps(timesteps=sampling_times(1000, num_steps, spacing))
        x, states = self.ours(DPMSolverSampler(num_steps, spacing=spacing))
        self.compare(states, self.theirs(scheduler, x))
