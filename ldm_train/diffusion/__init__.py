"""The diffusion process: schedules, denoisers, the objective, guidance and samplers, as functions of tensors."""

from ldm_train.diffusion.denoiser import PREDICTIONS, Denoised, Denoiser, DenoiserLike, Prediction, RawPrediction
from ldm_train.diffusion.guidance import ClassifierFreeGuidance, GuidedDenoiser
from ldm_train.diffusion.inpainting import InpaintingDenoiser
from ldm_train.diffusion.likelihood import Bound, Decoder, bound_term, variational_bound
from ldm_train.diffusion.objective import DiffusionLoss, DiffusionObjective
from ldm_train.diffusion.process import VARIANCES, Variance, add_noise
from ldm_train.diffusion.samplers import DDIMSampler, DDPMSampler, Sampler, SamplerState, sampling_times
from ldm_train.diffusion.schedule import (
    NoiseSchedule,
    cosine_schedule,
    linear_schedule,
    rescale_to_zero_terminal_snr,
    scaled_linear_schedule,
    shift_signal_to_noise,
)
from ldm_train.diffusion.solvers import DPMSolverSampler, EulerSampler, HeunSampler
from ldm_train.diffusion.times import LossAwareTimes, LowDiscrepancyTimes, TimeDraw, Times, UniformTimes
from ldm_train.diffusion.weighting import P2, Debiased, MinSNR, Uniform, VariationalBound, Weighting

__all__ = [
    "P2",
    "PREDICTIONS",
    "VARIANCES",
    "Bound",
    "ClassifierFreeGuidance",
    "DDIMSampler",
    "DDPMSampler",
    "DPMSolverSampler",
    "Debiased",
    "Decoder",
    "Denoised",
    "Denoiser",
    "DenoiserLike",
    "DiffusionLoss",
    "DiffusionObjective",
    "EulerSampler",
    "GuidedDenoiser",
    "HeunSampler",
    "InpaintingDenoiser",
    "LossAwareTimes",
    "LowDiscrepancyTimes",
    "MinSNR",
    "NoiseSchedule",
    "Prediction",
    "RawPrediction",
    "Sampler",
    "SamplerState",
    "TimeDraw",
    "Times",
    "Uniform",
    "UniformTimes",
    "Variance",
    "VariationalBound",
    "Weighting",
    "add_noise",
    "bound_term",
    "cosine_schedule",
    "linear_schedule",
    "rescale_to_zero_terminal_snr",
    "sampling_times",
    "scaled_linear_schedule",
    "shift_signal_to_noise",
    "variational_bound",
]
