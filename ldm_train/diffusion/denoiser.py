"""A network predicts; a denoiser interprets what it predicts as clean data.

    D(x_t, t, c) = E[x_0 | x_t, c]

A network may be trained on the noise (epsilon), on the velocity (v) or on the data (x_0). The denoiser alone knows
which; samplers and guidance see x_0 and the noise it implies, objectives ask for the training target. Anything callable
as `denoiser(x_t, t, conditioning) -> Denoised` is a denoiser, so guidance can wrap one into another.
"""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.diffusion import process
from ldm_train.diffusion.schedule import NoiseSchedule

Prediction = Literal["epsilon", "v", "x_0"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "x_0")


class Denoised(NamedTuple):
    """An estimate of the clean data and of the noise, with x_t = alpha_t x_0 + sigma_t noise."""

    x_0: Tensor
    noise: Tensor


class DenoiserLike(Protocol):
    """What a sampler needs: a schedule, and an estimate of the clean data at any time."""

    schedule: NoiseSchedule

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """Estimate x_0 and the noise: `x_t` (B, C, H, W), `t` (B,) int64."""
        ...


class Denoiser(nn.Module):
    """Interprets a network's output under a schedule.

    Args:
        network: `network(x_t, t, conditioning) -> (B, C, H, W)`.
        schedule: the noise schedule; others reach it as `denoiser.schedule`.
        prediction: what the network's output means: `epsilon`, `v` or `x_0`.

    Raises:
        ValueError: for an unknown prediction, or for `epsilon` with a schedule that ends without signal.
    """

    def __init__(self, network: nn.Module, schedule: NoiseSchedule, prediction: Prediction = "epsilon") -> None:
        super().__init__()
        if prediction not in PREDICTIONS:
            raise ValueError(
                f"prediction {prediction!r} is unknown; allowed are {', '.join(PREDICTIONS)}; "
                "change `stage.denoiser.prediction`"
            )
        if prediction == "epsilon" and schedule.has_zero_terminal_snr:
            raise ValueError(
                "prediction 'epsilon' cannot be trained with a zero-terminal-SNR schedule, whose last step holds no "
                "signal: x_0 = (x_T - noise) / 0; allowed there are v and x_0; set `stage.denoiser.prediction=v` or "
                "`schedule.zero_terminal_snr=false`"
            )
        self.network = network
        self.schedule = schedule
        self.prediction = prediction

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """Estimate x_0 and noise from x_t (B, C, H, W) at times t (B,)."""
        alpha_t, sigma_t = self.schedule.scales(t, x_t.ndim)
        output = self.predict(x_t, t, conditioning).float()
        if self.prediction == "epsilon":
            return Denoised(process.x_0_from_noise(x_t, output, alpha_t, sigma_t), output)
        x_0 = output if self.prediction == "x_0" else process.x_0_from_velocity(x_t, output, alpha_t, sigma_t)
        return Denoised(x_0, process.noise_from_x_0(x_t, x_0, alpha_t, sigma_t))

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's raw output, in the parameterisation it is trained on: (B, C, H, W)."""
        return self.network(x_t, t, conditioning)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should return for x_t made of this x_0 and noise: (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x_0":
            return x_0
        return process.velocity(x_0, noise, *self.schedule.scales(t, x_0.ndim))
