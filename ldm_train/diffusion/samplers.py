"""Samplers: from noise to data in a few evaluations of a denoiser.

A sampler walks down a sequence of times t_0 > t_1 > ... and, at each, replaces x_t by a sample of an estimate of x_s,
s the next time. After the last time comes clean data (alpha = 1, sigma = 0). Ancestral sampling draws from the model's
reverse step (Ho et al. 2020, algorithm 2), whose mean is that of the posterior at the estimate of x_0,

    x_s = mean of q(x_s | x_t, x_0) + sqrt(variance) z,   z ~ N(0, I), and z = 0 in the step to the data

and implicit sampling (Song et al. 2021, eq. 12) divides the noise into a part that is kept and a part that is new,

    x_s = alpha_s x_0 + sqrt(sigma_s^2 - tau^2) noise + tau z,   tau = eta sqrt(variance of q(x_s | x_t, x_0))

so that eta = 0 is deterministic and eta = 1 is ancestral sampling with the posterior's variance. Solvers of the
deterministic equation are in `ldm_train.diffusion.solvers`.

Initial noise is given and z is keyed by the image's own seed, so an image depends neither on its batch nor on the
number of processes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from ldm_train.batch import Conditioning
from ldm_train.diffusion.denoiser import Denoised, DenoiserLike
from ldm_train.diffusion.process import noise_from_x_0, posterior, reverse_variance
from ldm_train.diffusion.schedule import NoiseSchedule
from ldm_train.randomness import Stream, normal

Spacing = Literal["leading", "linspace", "trailing"]
SPACINGS: tuple[Spacing, ...] = ("leading", "linspace", "trailing")
FinalAlpha = Literal["one", "first"]


def sampling_times(num_train_steps: int, num_steps: int, spacing: Spacing) -> list[int]:
    """The times a sampler visits, descending.

    Args:
        num_train_steps: T of the schedule.
        num_steps: how many times to visit, at most T.
        spacing: `leading` is every (T // num_steps)-th time counted from 1, as in the published latent diffusion code;
            `linspace` reaches both ends; `trailing` counts from T - 1 down, which a schedule with zero terminal SNR
            needs (Lin et al. 2024, table 2).

    Returns:
        `num_steps` distinct times in [0, T).

    Raises:
        ValueError: for more steps than times, fewer than one, an unknown spacing, or a number of steps whose leading
            times begin far from the noise that sampling begins with.
    """
    if not 1 <= num_steps <= num_train_steps:
        raise ValueError(
            f"num_steps is {num_steps}; allowed are 1 to {num_train_steps}, the length of the noise schedule; "
            "change `sampler.num_steps`"
        )
    _check_spacing(spacing)
    if spacing == "leading":
        first, stride = int(num_steps < num_train_steps), num_train_steps // num_steps
        begin = first + (num_steps - 1) * stride
        if 3 * begin < 2 * (num_train_steps - 1):
            raise ValueError(
                f"num_steps is {num_steps}, which with leading spacing begins at time {begin} of {num_train_steps}, "
                "far from the noise that sampling begins with; allowed are those that begin in the last third, as 3 "
                f"to {num_train_steps // 2}; change `sampler.num_steps` or set `sampler.spacing=trailing`"
            )
        return [first + i * stride for i in reversed(range(num_steps))]
    if spacing == "linspace":
        return [round(t) for t in torch.linspace(num_train_steps - 1, 0, num_steps, dtype=torch.float64).tolist()]
    return [round(num_train_steps * (num_steps - i) / num_steps) - 1 for i in range(num_steps)]


class Level(NamedTuple):
    """How noisy a state is.

    Attributes:
        t: time of the schedule; -1 is clean data.
        alpha: scale of the signal, a float64 scalar on the host, which a tensor of any device can be multiplied by.
        sigma: scale of the noise, likewise.
    """

    t: int
    alpha: Tensor
    sigma: Tensor

    @property
    def noise_to_signal(self) -> Tensor:
        """The sigma of Karras et al. (2022), sigma / alpha; infinite without signal."""
        return self.sigma / self.alpha

    @property
    def half_log_snr(self) -> Tensor:
        """The lambda of Lu et al. (2022), log(alpha / sigma); infinite without noise."""
        return (self.alpha / self.sigma).log()


class Step(NamedTuple):
    """The `number`-th step of a sampler, counted from 1, from time t to the less noisy s."""

    number: int
    t: Level
    s: Level


class SamplerState(NamedTuple):
    """Where a sampler stands after a step.

    Attributes:
        step: the number of the step, counted from 1.
        t: the time that the step has reached; -1 is clean data.
        x_t: (B, C, H, W) the state at that time.
        x_0: (B, C, H, W) the estimate of the clean data that the step was made with.
    """

    step: int
    t: int
    x_t: Tensor
    x_0: Tensor


class Images(NamedTuple):
    """The images that are being sampled: how they are denoised, and where their noise comes from.

    Attributes:
        denoiser: any denoiser.
        conditioning: of the B images.
        seed: the run's seed.
        image_seeds: (B,) int64.
        clip_x_0: the largest magnitude of an estimate of x_0, or `None`.
    """

    denoiser: DenoiserLike
    conditioning: Conditioning
    seed: int
    image_seeds: Tensor
    clip_x_0: float | None

    def denoise(self, x_t: Tensor, level: Level) -> Denoised:
        """The denoiser's estimate, with its x_0 clipped and its noise that of the clipped x_0."""
        denoised = self.denoiser(x_t, torch.full_like(self.image_seeds, level.t), self.conditioning)
        if self.clip_x_0 is None:
            return denoised
        x_0 = denoised.x_0.clamp(-self.clip_x_0, self.clip_x_0)
        return denoised._replace(x_0=x_0, noise=noise_from_x_0(x_t, x_0, level.alpha, level.sigma))

    def noise(self, number: int, like: Tensor) -> Tensor:
        """Standard normal noise of a step, counted from 1: 0 is that of x_T; float32, shaped like `like`."""
        return normal(self.seed, number, self.image_seeds, Stream.SAMPLING, tuple(like.shape[1:]))


class Sampler(ABC):
    """Walks from noise to data; a subclass says how one time leads to the next.

    Args:
        num_steps: how many times are visited.
        spacing: how they are spread, see `sampling_times`.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
        final_alpha: where the last step leads: to data without noise, `one`; or to the schedule's first time, `first`,
            as in the published latent diffusion code, whose images keep the noise of that time. Where that time is
            itself visited, as with linspace, the last step leads to data.

    Raises:
        ValueError: for an unknown spacing or end, or a clip that is not positive.
    """

    def __init__(
        self,
        num_steps: int,
        spacing: Spacing = "trailing",
        clip_x_0: float | None = None,
        final_alpha: FinalAlpha = "one",
    ) -> None:
        _check_spacing(spacing)
        if clip_x_0 is not None and clip_x_0 <= 0:
            raise ValueError(f"clip_x_0 is {clip_x_0}; allowed are positive numbers or null; change `sampler.clip_x_0`")
        if final_alpha not in ("one", "first"):
            raise ValueError(
                f"final_alpha {final_alpha!r} is unknown; allowed are one and first; change `sampler.final_alpha`"
            )
        self.num_steps = num_steps
        self.spacing: Spacing = spacing
        self.clip_x_0 = clip_x_0
        self.final_alpha: FinalAlpha = final_alpha

    def __call__(
        self,
        denoiser: DenoiserLike,
        x_T: Tensor,
        conditioning: Conditioning,
        seed: int,
        image_seeds: Tensor,
        start: int = 0,
    ) -> Tensor:
        """The end of `trajectory`: data (B, C, H, W)."""
        x = x_T
        for state in self.trajectory(denoiser, x_T, conditioning, seed, image_seeds, start):
            x = state.x_t
        return x

    # Decorated, a generator has gradients disabled while it runs and the caller's own mode while it waits.
    @torch.no_grad()
    def trajectory(
        self,
        denoiser: DenoiserLike,
        x: Tensor,
        conditioning: Conditioning,
        seed: int,
        image_seeds: Tensor,
        start: int = 0,
    ) -> Iterator[SamplerState]:
        """Turn noise into data, and stop after each step.

        Args:
            denoiser: any denoiser, guided or not.
            x: (B, C, H, W) standard normal noise; or, with a start, x_t at the time `start_time(schedule, start)`.
            conditioning: for the B images.
            seed: the run's seed.
            image_seeds: (B,) int64, the images' own seeds, which key all noise that is added on the way.
            start: steps to leave out.

        Yields:
            The state after each step, in float32, or in float64 if `x` is.

        Raises:
            ValueError: if no step is left, or the schedule has fewer times than the sampler visits.
        """
        if not 0 <= start < self.num_steps:
            raise ValueError(
                f"start is {start}; allowed are 0 to {self.num_steps - 1}, so that a step is left; change `start` or "
                "`sampler.num_steps`"
            )
        images = Images(denoiser, conditioning, seed, image_seeds, self.clip_x_0)
        steps = self.steps(denoiser.schedule)[start:]
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        for step, (x_t, x_0) in zip(steps, self.walk(images, x, steps), strict=True):
            yield SamplerState(step.number, step.s.t, x_t, x_0)

    @abstractmethod
    def walk(self, images: Images, x: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """From `x` (B, C, H, W), at the first step's t: x_s and the estimate of x_0, after each step."""

    def steps(self, schedule: NoiseSchedule) -> list[Step]:
        """All steps under a schedule, in order.

        Raises:
            ValueError: if the schedule has fewer times, or ends in pure noise, where the steps would not begin.
        """
        times = sampling_times(schedule.num_steps, self.num_steps, self.spacing)
        if schedule.has_zero_terminal_snr and times[0] != schedule.num_steps - 1:
            raise ValueError(
                f"spacing {self.spacing!r} begins at time {times[0]} of a schedule whose pure noise is at "
                f"{schedule.num_steps - 1}; allowed with zero terminal SNR are trailing and linspace; set "
                "`sampler.spacing=trailing` or `schedule.zero_terminal_snr=false`"
            )
        end = 0 if self.final_alpha == "first" and times[-1] > 0 else -1
        levels = [level(schedule, t) for t in (*times, end)]
        return [Step(i, levels[i - 1], levels[i]) for i in range(1, len(levels))]

    def start_of(self, strength: float) -> int:
        """How many steps image-to-image leaves out; at least one is made.

        Args:
            strength: the share of the steps to be made, in (0, 1]; 1 starts from the noisiest time.

        Returns:
            `start` of `trajectory`.

        Raises:
            ValueError: if the strength is outside.
        """
        if not 0.0 < strength <= 1.0:
            raise ValueError(f"strength is {strength}; allowed are numbers above 0, up to 1; change `strength`")
        return self.num_steps - max(1, round(self.num_steps * strength))

    def start_time(self, schedule: NoiseSchedule, start: int) -> int:
        """The time to which an image is noised before `trajectory` goes on from it without its first `start` steps."""
        return self.steps(schedule)[start].t.t


class DDPMSampler(Sampler):
    """Ancestral sampling (Ho et al. 2020, algorithm 2), over all times or a respaced few.

    The variance is the denoiser's: posterior, beta or learned.

    Args:
        num_steps: evaluations of the denoiser.
        spacing: how the times are spread, see `sampling_times`.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
        final_alpha: `one` or `first`, see `Sampler`.
    """

    def __init__(
        self,
        num_steps: int = 1000,
        spacing: Spacing = "trailing",
        clip_x_0: float | None = None,
        final_alpha: FinalAlpha = "one",
    ) -> None:
        super().__init__(num_steps, spacing, clip_x_0, final_alpha)

    def walk(self, images: Images, x: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """One reverse step after another."""
        schedule, kind = images.denoiser.schedule, images.denoiser.variance
        for number, t, s in steps:
            x_0, _, fraction = images.denoise(x, t)
            if s.t < 0:
                x = x_0
            else:
                x = posterior(x_0, x, (s.alpha, t.alpha), (s.sigma, t.sigma)).mean
                t_now, t_next = (torch.full((1,), time, device=x.device) for time in (t.t, s.t))
                variance = reverse_variance(schedule, kind, t_now, t_next, x.ndim, fraction, x.dtype)
                x = x + variance.sqrt() * images.noise(number, x)
            yield x, x_0


class DDIMSampler(Sampler):
    """Denoising diffusion implicit models (Song et al. 2021).

    Args:
        num_steps: evaluations of the denoiser.
        eta: 0 deterministic, 1 ancestral.
        spacing: how the times are spread, see `sampling_times`.
        clip_x_0: clamp the estimate of x_0 to [-clip, clip]; `None` (for latents) leaves it alone.
        final_alpha: `one` or `first`, see `Sampler`.
    """

    def __init__(
        self,
        num_steps: int = 50,
        eta: float = 0.0,
        spacing: Spacing = "trailing",
        clip_x_0: float | None = None,
        final_alpha: FinalAlpha = "one",
    ) -> None:
        super().__init__(num_steps, spacing, clip_x_0, final_alpha)
        if not 0.0 <= eta <= 1.0:
            raise ValueError(f"eta is {eta}; allowed are 0 (DDIM) to 1 (ancestral); change `sampler.eta`")
        self.eta = eta

    def walk(self, images: Images, x: Tensor, steps: Sequence[Step]) -> Iterator[tuple[Tensor, Tensor]]:
        """Keep some of the noise, and renew the rest."""
        for number, t, s in steps:
            x_0, noise, _ = images.denoise(x, t)
            if self.eta == 0:
                x = s.alpha * x_0 + s.sigma * noise
            else:
                tau = self.eta * posterior(x_0, x, (s.alpha, t.alpha), (s.sigma, t.sigma)).variance.sqrt()
                x = s.alpha * x_0 + (s.sigma**2 - tau**2).clamp(min=0).sqrt() * noise + tau * images.noise(number, x)
            yield x, x_0


def level(schedule: NoiseSchedule, t: int) -> Level:
    """The level of a time, or of clean data at -1."""
    if t < 0:
        one = torch.ones((), dtype=torch.float64)
        return Level(t, one, torch.zeros_like(one))
    return Level(t, schedule.alpha[t], schedule.sigma[t])


def _check_spacing(spacing: str) -> None:
    if spacing not in SPACINGS:
        raise ValueError(f"spacing {spacing!r} is unknown; allowed are {', '.join(SPACINGS)}; change `sampler.spacing`")
