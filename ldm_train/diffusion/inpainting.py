"""Inpainting with any denoiser: what is known of x_0 replaces what is estimated.

    x_0 <- m known + (1 - m) D(x_t, t, c),   noise <- (x_t - alpha_t x_0) / sigma_t,   m = 1 where x_0 is known

The denoiser sees the known part at every noise level and fills in the rest to suit it. The last step of every sampler
leads to the estimate of x_0 itself, so that the known part is exact at the end; with `final_alpha=first` it keeps the
noise of that time. Networks trained on masks do it better, see `ldm_train.conditioning`; this needs no training.
"""

from torch import Tensor

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import Denoised, DenoiserLike
from ldm_train.diffusion.process import Variance, noise_from_x_0
from ldm_train.diffusion.schedule import NoiseSchedule


class InpaintingDenoiser:
    """A denoiser that knows a part of x_0.

    Args:
        denoiser: any denoiser, guided or not.
        known: (B, C, h, w) what is known; anywhere else its values are not used.
        mask: (B, 1, h, w) float, 1 where it is known and 0 where it is not; in between for soft edges.

    Raises:
        ValueError: if the mask does not fit.
    """

    def __init__(self, denoiser: DenoiserLike, known: Tensor, mask: Tensor) -> None:
        if mask.shape != (len(known), 1, *known.shape[2:]):
            raise ValueError(
                f"the mask has shape {tuple(mask.shape)}; allowed is {(len(known), 1, *known.shape[2:])}, one channel "
                f"for {tuple(known.shape)} that is known; change `mask`"
            )
        self.denoiser = denoiser
        self.known = known
        self.mask = mask
        self.schedule: NoiseSchedule = denoiser.schedule
        self.variance: Variance = denoiser.variance

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """The denoiser's estimate where nothing is known, and the noise that suits both."""
        denoised = self.denoiser(x_t, t, conditioning)
        x_0 = self.mask * self.known + (1.0 - self.mask) * denoised.x_0
        return denoised._replace(x_0=x_0, noise=noise_from_x_0(x_t, x_0, *self.schedule.scales(t, x_t.ndim)))
