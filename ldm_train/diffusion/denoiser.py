"""A network predicts; a denoiser interprets what it predicts as clean data.

    D(x_t, t, c) = E[x_0 | x_t, c]

A network may be trained on the noise (epsilon), on the velocity (v) or on the data (x_0). The denoiser alone knows
which; samplers and guidance see x_0 and the noise it implies, objectives ask for the training target. Anything callable
as `denoiser(x_t, t, conditioning) -> Denoised` is a denoiser, so guidance can wrap one into another.

The variance of the reverse step is fixed, or learned (Nichol and Dhariwal 2021, eq. 15): then the network has twice as
many output channels, the second half of which says where between the two fixed variances it lies, element by element,

    log variance = v log beta + (1 - v) log tilde-beta,   v = (output + 1) / 2
"""

from typing import Literal, NamedTuple, Protocol

from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.diffusion import process
from ldm_train.diffusion.process import VARIANCES, Variance
from ldm_train.diffusion.schedule import NoiseSchedule

Prediction = Literal["epsilon", "v", "x_0"]
PREDICTIONS: tuple[Prediction, ...] = ("epsilon", "v", "x_0")


class RawPrediction(NamedTuple):
    """What a network said of x_t, in float32.

    Attributes:
        output: (B, C, H, W) in the parameterisation it is trained on.
        variance_fraction: (B, C, H, W) v of a learned variance, 0 at tilde-beta and 1 at beta; `None` if it is fixed.
    """

    output: Tensor
    variance_fraction: Tensor | None = None


class Denoised(NamedTuple):
    """An estimate of the clean data and of the noise, with x_t = alpha_t x_0 + sigma_t noise.

    Attributes:
        x_0: (B, C, H, W).
        noise: (B, C, H, W).
        variance_fraction: as in `RawPrediction`.
    """

    x_0: Tensor
    noise: Tensor
    variance_fraction: Tensor | None = None


class DenoiserLike(Protocol):
    """What a sampler needs: a schedule, an estimate of the clean data at any time, the variance of reverse steps."""

    schedule: NoiseSchedule
    variance: Variance

    def __call__(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """Estimate x_0 and the noise: `x_t` (B, C, H, W), `t` (B,) int64."""
        ...


class Denoiser(nn.Module):
    """Interprets a network's output under a schedule.

    Args:
        network: `network(x_t, t, conditioning) -> (B, C, H, W)`, or (B, 2 C, H, W) if the variance is learned.
        schedule: the noise schedule; others reach it as `denoiser.schedule`.
        prediction: what the network's output means: `epsilon`, `v` or `x_0`.
        variance: of the reverse step: `posterior`, `beta` or `learned`, see `ldm_train.diffusion.process`.

    Raises:
        ValueError: for an unknown prediction or variance; for `epsilon` with a schedule that ends without signal; for a
            network that says how many channels it has, and has not as many outputs as these arguments need.
    """

    def __init__(
        self,
        network: nn.Module,
        schedule: NoiseSchedule,
        prediction: Prediction = "epsilon",
        variance: Variance = "posterior",
    ) -> None:
        super().__init__()
        for key, found, allowed in (("prediction", prediction, PREDICTIONS), ("variance", variance, VARIANCES)):
            if found not in allowed:
                raise ValueError(
                    f"{key} {found!r} is unknown; allowed are {', '.join(allowed)}; change `stage.denoiser.{key}`"
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
        self.variance: Variance = variance
        channels, outputs = (getattr(network, name, None) for name in ("in_channels", "out_channels"))
        if isinstance(channels, int) and isinstance(outputs, int):
            self._check_outputs(channels, outputs)

    def forward(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Denoised:
        """Estimate x_0 and noise from x_t (B, C, H, W) at times t (B,)."""
        return self.interpret(self.predict(x_t, t, conditioning), x_t, t)

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> RawPrediction:
        """The network's output for x_t (B, C, H, W) at times t (B,), in the parameterisation it is trained on."""
        output = self.network(x_t, t, conditioning).float()
        self._check_outputs(x_t.shape[1], output.shape[1])
        if self.variance != "learned":
            return RawPrediction(output)
        output, place = output.chunk(2, dim=1)
        return RawPrediction(output, (place + 1.0) / 2.0)

    def interpret(self, prediction: RawPrediction, x_t: Tensor, t: Tensor) -> Denoised:
        """What a prediction for x_t (B, C, H, W) at times t (B,) says of the clean data."""
        alpha_t, sigma_t = self.schedule.scales(t, x_t.ndim)
        output, fraction = prediction
        if self.prediction == "epsilon":
            return Denoised(process.x_0_from_noise(x_t, output, alpha_t, sigma_t), output, fraction)
        x_0 = output if self.prediction == "x_0" else process.x_0_from_velocity(x_t, output, alpha_t, sigma_t)
        return Denoised(x_0, process.noise_from_x_0(x_t, x_0, alpha_t, sigma_t), fraction)

    def target(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """What `predict` should put out for x_t made of this x_0 and noise: (B, C, H, W)."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "x_0":
            return x_0
        return process.velocity(x_0, noise, *self.schedule.scales(t, x_0.ndim))

    def _check_outputs(self, channels: int, outputs: int) -> None:
        needed = 2 * channels if self.variance == "learned" else channels
        if outputs != needed:
            raise ValueError(
                f"the network has {outputs} output channels; allowed are {needed} for {channels} channels of data and "
                f"the variance {self.variance!r}; change `unet.out_channels` or `stage.denoiser.variance`"
            )
