"""Classifier-free guidance: a denoiser that exaggerates what the condition changes (Ho and Salimans 2022, eq. 6).

    D_w(x_t, t, c) = D(x_t, t, null) + w (D(x_t, t, c) - D(x_t, t, null))

`w = 1` is the conditional model, `w = 0` the unconditional one. Guidance wraps a denoiser into a denoiser, so that no
sampler and no network knows of it. The combination is linear, hence the same in x_0, noise and v. What is passed as
`null` need not be the empty condition: the condition of another text makes that a negative prompt.

Large weights overexpose. Rescaling (Lin et al. 2024, eq. 15 and 16) gives each example's guided v the spread of its
conditional v, by a share phi,

    v <- v (phi std(v_c) / std(v_w) + 1 - phi)

and an interval (Kynkaanniemi et al. 2024) guides only where low < sigma_t / alpha_t <= high: at high noise
guidance costs variety, at low noise it changes little.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import Denoised, DenoiserLike
from ldm_train.diffusion.process import Variance, noise_from_x_0, velocity, x_0_from_velocity
from ldm_train.diffusion.schedule import NoiseSchedule


class GuidedDenoiser:
    """The denoiser D_w; made by `ClassifierFreeGuidance`, whose arguments it has.

    The variance of reverse steps, also a learned one, is that of the conditional model.
    """

    def __init__(
        self,
        denoiser: DenoiserLike,
        null: Conditioning,
        scale: float,
        rescale: float = 0.0,
        interval: tuple[float, float] | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.null = null
        self.scale = scale
        self.rescale = rescale
        self.interval = interval
        self.schedule: NoiseSchedule = denoiser.schedule
        self.variance: Variance = denoiser.variance

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """Both estimates in one pass over a doubled batch, then their combination; outside the interval only one."""
        scale: float | Tensor = self.scale
        if self.interval is not None:
            low, high = self.interval
            alpha, sigma = self.schedule.scales(t, x_t.ndim, x_t.dtype)
            inside = (sigma / alpha > low) & (sigma / alpha <= high)
            if not inside.any():
                return self.denoiser(x_t, t, conditioning)
            scale = torch.where(inside, self.scale, torch.ones_like(alpha))
        both = Conditioning(*(_join(null, given) for null, given in zip(self.null, conditioning, strict=True)))
        x_0, noise, fraction = self.denoiser(torch.cat([x_t, x_t]), torch.cat([t, t]), both)
        (x_0_null, x_0), (noise_null, noise) = x_0.chunk(2), noise.chunk(2)
        conditional = Denoised(x_0, noise, None if fraction is None else fraction.chunk(2)[1])
        guided = conditional._replace(x_0=_towards(x_0_null, x_0, scale), noise=_towards(noise_null, noise, scale))
        return self._rescaled(guided, conditional, x_t, t) if self.rescale else guided

    def _rescaled(self, guided: Denoised, conditional: Denoised, x_t: Tensor, t: Tensor) -> Denoised:
        scales = self.schedule.scales(t, x_t.ndim)
        v, v_conditional = (velocity(denoised.x_0, denoised.noise, *scales) for denoised in (guided, conditional))
        dims = tuple(range(1, x_t.ndim))
        spread, conditional_spread = (estimate.std(dims, keepdim=True) for estimate in (v, v_conditional))
        # A network that is not trained yet says zero everywhere.
        factor = torch.where(spread > 0, conditional_spread / spread, torch.ones_like(spread))
        x_0 = x_0_from_velocity(x_t, v * (self.rescale * factor + 1.0 - self.rescale), *scales)
        return guided._replace(x_0=x_0, noise=noise_from_x_0(x_t, x_0, *scales))


class ClassifierFreeGuidance:
    """Wraps denoisers with guidance of one scale.

    Args:
        scale: w; 1 means no guidance and costs one network evaluation a step instead of two.
        rescale: phi, from 0, off, to 1; 0.7 is usual with a large scale and zero terminal SNR.
        interval: low and high of sigma_t / alpha_t, between which to guide; a step outside costs one evaluation. `None`
            guides everywhere.

    Raises:
        ValueError: for a negative scale, a rescale outside [0, 1], or an interval that holds nothing.
    """

    def __init__(self, scale: float = 1.0, rescale: float = 0.0, interval: Sequence[float] | None = None) -> None:
        if scale < 0:
            raise ValueError(
                f"guidance scale is {scale}; allowed are numbers >= 0 (1 is no guidance, 3 to 8 usual); "
                "change `guidance.scale`"
            )
        if not 0.0 <= rescale <= 1.0:
            raise ValueError(
                f"guidance rescale is {rescale}; allowed are 0 (off) to 1 (0.7 is usual); change `guidance.rescale`"
            )
        if interval is not None and not (len(interval) == 2 and 0.0 <= interval[0] < interval[1]):
            raise ValueError(
                f"guidance interval is {list(interval)}; allowed are [low, high] of sigma / alpha with "
                "0 <= low < high, such as [0.28, 5.42], or null for all noise levels; change `guidance.interval`"
            )
        self.scale = scale
        self.rescale = rescale
        self.interval = None if interval is None else (interval[0], interval[1])

    def __call__(self, denoiser: DenoiserLike, null: Conditioning) -> DenoiserLike:
        """Wrap `denoiser`; `null` is the empty condition, of the same shapes as the conditions to come."""
        if self.scale == 1.0:
            return denoiser
        return GuidedDenoiser(denoiser, null, self.scale, self.rescale, self.interval)


def _towards(null: Tensor, given: Tensor, scale: float | Tensor) -> Tensor:
    # A scale of each image is of the state's type, and an estimate may be of the network's.
    return torch.lerp(null, given, scale.to(given.dtype) if isinstance(scale, Tensor) else scale)


def _join(null: Tensor | None, given: Tensor | None) -> Tensor | None:
    if null is None or given is None:
        return None
    return torch.cat([null, given])
