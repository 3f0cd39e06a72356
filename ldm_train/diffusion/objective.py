"""The training objective: how far the network's prediction is from its target, and how much each time counts.

    L = E_{x_0, t, noise} [ w(t) || target - prediction ||^2 ],   x_t = alpha_t x_0 + sigma_t noise

L_simple (Ho et al. 2020, eq. 14) has w = 1, t uniform and noise ~ N(0, I). Other weights are in
`ldm_train.diffusion.weighting`, other ways to draw t in `ldm_train.diffusion.times`, and the noise may be changed too:

    offset noise          noise + a o, one o ~ N(0, 1) for each channel of each sample: the mean of an image is hidden
                          as well as its detail is (Guttenberg, "Diffusion with offset noise", 2023)
    input perturbation    the network sees x_t of noise + b xi, xi ~ N(0, I), and its target stays that of the noise: it
                          learns to live with its own errors (Ning et al., "Input perturbation reduces exposure bias in
                          diffusion models", 2023, algorithm 1)

A denoiser that learns the variance of its reverse steps is trained on the hybrid loss (Nichol and Dhariwal 2021,
eq. 16) L + bound_weight sum_t L_t. The sum is T times the L_t of the time drawn, in nats per dimension. The estimate of
x_0 is a constant in it: the bound teaches the variance, and the square error the mean.

All draws are functions of the keys of the samples, see `ldm_train.randomness`.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import Denoiser, Prediction, RawPrediction
from ldm_train.diffusion.likelihood import Decoder, bound_term
from ldm_train.diffusion.process import add_noise
from ldm_train.diffusion.schedule import NoiseSchedule, Table
from ldm_train.diffusion.times import Times, UniformTimes
from ldm_train.diffusion.weighting import Uniform, Weighting
from ldm_train.randomness import SampleKeys, Stream, normal


class DiffusionLoss(NamedTuple):
    """The loss of a batch.

    Attributes:
        per_example: (B,) what to minimise the mean of.
        t: (B,) int64 the times drawn.
        square_error: (B,) mean square error of the prediction, without any weight and without gradient.
    """

    per_example: Tensor
    t: Tensor
    square_error: Tensor


class DiffusionObjective(nn.Module):
    """The weighted square error of a denoiser's prediction, with the bound of a learned variance.

    In evaluation the input is not perturbed and the times learn nothing from the losses; the rest is the same.

    Args:
        weighting: w(t); `None` is `Uniform`.
        times: how times are drawn; `None` is `UniformTimes`.
        offset_noise: a, usually 0 or 0.1.
        input_perturbation: b, usually 0 or 0.1.
        bound_weight: of the bound in the loss of a denoiser with a learned variance, 0.001 in the paper; `None` with a
            fixed one.
        decoder: of the bound: `gaussian` for latents, `discrete` for 8-bit pixels.

    Raises:
        ValueError: if a strength is negative, the bound's weight not positive, or the decoder unknown.
    """

    def __init__(
        self,
        weighting: Weighting | None = None,
        times: Times | None = None,
        offset_noise: float = 0.0,
        input_perturbation: float = 0.0,
        bound_weight: float | None = None,
        decoder: Decoder = "gaussian",
    ) -> None:
        super().__init__()
        _require(offset_noise >= 0, "offset_noise", offset_noise, "numbers from 0, which is off; 0.1 is usual")
        _require(input_perturbation >= 0, "input_perturbation", input_perturbation, "numbers from 0, which is off")
        is_weight = bound_weight is None or bound_weight > 0
        _require(is_weight, "bound_weight", bound_weight, "positive numbers, 0.001 is usual, or null")
        _require(decoder in ("gaussian", "discrete"), "decoder", repr(decoder), "gaussian and discrete")
        self.weighting = Uniform() if weighting is None else weighting
        self.times = UniformTimes() if times is None else times
        self.offset_noise = offset_noise
        self.input_perturbation = input_perturbation
        self.bound_weight = bound_weight
        self.decoder: Decoder = decoder
        self._table: tuple[NoiseSchedule, Prediction, Table] | None = None

    def forward(self, denoiser: Denoiser, x_0: Tensor, conditioning: Conditioning, keys: SampleKeys) -> DiffusionLoss:
        """The loss of clean data (B, C, H, W) under the draws that belong to the keys of its B samples."""
        t, share = self.times.draw(keys, denoiser.schedule.num_steps)
        noise = self._noise(keys, x_0)
        x_t = add_noise(denoiser.schedule, x_0, self._perturbed(noise, keys), t)
        prediction = denoiser.predict(x_t, t, conditioning)
        error = (prediction.output - denoiser.target(x_0, noise, t)).square().flatten(1).mean(1)
        loss = self.weight(denoiser, t) * error
        if denoiser.variance == "learned":
            # Of the chain's own x_t: what perturbs the network's input is no error of its variance.
            loss = loss + self._bound(denoiser, prediction, x_0, add_noise(denoiser.schedule, x_0, noise, t), t)
        self.times.observe(t, loss.detach(), keys)
        return DiffusionLoss(share * loss, t, error.detach())

    def check(self, denoiser: Denoiser) -> None:
        """Refuse a denoiser that this objective would not train as a whole.

        Raises:
            ValueError: if a learned variance has no bound to teach it or a fixed one has, the weighting is made for
                another variance, or gives a time no weight.
        """
        is_learned = denoiser.variance == "learned"
        rule = "positive numbers for a learned variance (`objective=hybrid`) and null for a fixed one, as "
        rule += f"`stage.denoiser.variance` is {denoiser.variance}"
        _require(is_learned == (self.bound_weight is not None), "bound_weight", self.bound_weight, rule)
        made_for = self.weighting.variance
        rule = f"{denoiser.variance}, as `stage.denoiser.variance`"
        _require(made_for in (None, denoiser.variance), "weighting.variance", made_for, rule)
        unseen = torch.nonzero(self.weighting.weight(denoiser.schedule, denoiser.prediction) <= 0).flatten().tolist()
        if unseen:
            raise ValueError(
                f"{type(self.weighting).__name__} gives time {unseen[0]} no weight, where the schedule has no signal "
                "and sampling begins: it would never be trained; allowed there are weightings such as Uniform; set "
                "`objective=simple` or `schedule.zero_terminal_snr=false`"
            )

    def weight(self, denoiser: Denoiser, t: Tensor) -> Tensor:
        """w(t) for what the denoiser predicts: (B,) float32."""
        schedule, prediction = denoiser.schedule, denoiser.prediction
        if self._table is None or self._table[:2] != (schedule, prediction):
            self._table = schedule, prediction, Table(self.weighting.weight(schedule, prediction))
        return self._table[2].at(t)

    def _noise(self, keys: SampleKeys, x_0: Tensor) -> Tensor:
        """The noise to be predicted: (B, C, H, W)."""
        noise = _normal(keys, Stream.NOISE, tuple(x_0.shape[1:]))
        if self.offset_noise == 0:
            return noise
        return noise + self.offset_noise * _normal(keys, Stream.OFFSET_NOISE, (x_0.shape[1], 1, 1))

    def _perturbed(self, noise: Tensor, keys: SampleKeys) -> Tensor:
        """The noise of what the network sees: (B, C, H, W)."""
        if self.input_perturbation == 0 or not self.training:
            return noise
        return noise + self.input_perturbation * _normal(keys, Stream.INPUT_PERTURBATION, tuple(noise.shape[1:]))

    def _bound(self, denoiser: Denoiser, prediction: RawPrediction, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The weighted bound, with a gradient to the variance alone: (B,)."""
        assert self.bound_weight is not None, "see `check`"
        schedule = denoiser.schedule
        estimate = denoiser.interpret(prediction, x_t, t).x_0.detach()
        fraction = prediction.variance_fraction
        term = bound_term(schedule, denoiser.variance, x_0, t, estimate, fraction, self.decoder)
        return self.bound_weight * schedule.num_steps * term


def _normal(keys: SampleKeys, stream: Stream, shape: tuple[int, ...]) -> Tensor:
    return normal(keys.seed, keys.epoch, keys.sample_id, stream, shape)


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {found}; allowed are {allowed}; change `objective.{key}`")
