"""Classifier-free guidance: a denoiser that exaggerates what the condition changes (Ho and Salimans 2022, eq. 6).

    D_w(x_t, t, c) = D(x_t, t, null) + w (D(x_t, t, c) - D(x_t, t, null))

`w = 1` is the conditional model, `w = 0` the unconditional one. Guidance wraps a denoiser into a denoiser, so that no
sampler and no network knows of it. The combination is linear, hence the same in x_0, noise and v.
"""

import torch
from torch import Tensor

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import Denoised, DenoiserLike


class GuidedDenoiser:
    """The denoiser D_w; made by `ClassifierFreeGuidance`."""

    def __init__(self, denoiser: DenoiserLike, null: Conditioning, scale: float) -> None:
        self.denoiser = denoiser
        self.null = null
        self.scale = scale
        self.schedule = denoiser.schedule

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """Both estimates in one pass over a doubled batch, then their combination."""
        both = Conditioning(*(_join(null, given) for null, given in zip(self.null, conditioning, strict=True)))
        denoised = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        return Denoised(*(self._combine(estimate) for estimate in denoised))

    def _combine(self, estimate: Tensor) -> Tensor:
        unconditional, conditional = estimate.chunk(2)
        return torch.lerp(unconditional, conditional, self.scale)


class ClassifierFreeGuidance:
    """Wraps denoisers with guidance of one scale.

    Args:
        scale: w; 1 means no guidance and costs one network evaluation a step instead of two.

    Raises:
        ValueError: for a negative scale.
    """

    def __init__(self, scale: float = 1.0) -> None:
        if scale < 0:
            raise ValueError(
                f"guidance scale is {scale}; allowed are numbers >= 0 (1 is no guidance, 3 to 8 usual); "
                "change `guidance.scale`"
            )
        self.scale = scale

    def __call__(self, denoiser: DenoiserLike, null: Conditioning) -> DenoiserLike:
        """Wrap `denoiser`; `null` is the empty condition, of the same shapes as the conditions to come."""
        return denoiser if self.scale == 1.0 else GuidedDenoiser(denoiser, null, self.scale)


def _join(null: Tensor | None, given: Tensor | None) -> Tensor | None:
    if null is None or given is None:
        return None
    return torch.cat([null, given])
