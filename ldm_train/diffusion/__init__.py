"""The diffusion process: schedules, denoisers, the objective, guidance and samplers, as functions of tensors."""

from ldm_train.diffusion.denoiser import PREDICTIONS, Denoised, Denoiser, DenoiserLike, Prediction
from ldm_train.diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser
from ldm_train.diffusion.objective import DiffusionLoss, DiffusionObjective
from ldm_train.diffusion.samplers import DDIMSampler, DDPMSampler, sampling_times
from ldm_train.diffusion.schedule import (
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    rescale_to_zero_terminal_snr,
    scaled_linear_schedule,
)

__all__ = [
    "PREDICTIONS",
    "ClassifierFreeGuidance",
    "DDIMSampler",
    "DDPMSampler",
    "Denoised",
    "Denoiser",
    "DenoiserLike",
    "DiffusionLoss",
    "DiffusionObjective",
    "GuidedDenoiser",
    "NoiseSchedule",
    "Prediction",
    "cosine_schedule",
    "linear_schedule",
    "rescale_to_zero_terminal_snr",
    "sampling_times",
    "scaled_linear_schedule",
]
