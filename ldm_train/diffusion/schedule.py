"""Noise schedules: how much of the image is left at each time.

The forward process is a Markov chain of T steps that adds Gaussian noise of variance beta_t (Ho et al. 2020, eq. 2):

    q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I)
    q(x_t | x_0)     = N(alpha_t x_0, sigma_t^2 I)
    alpha_t          = sqrt(prod_{s<=t} (1 - beta_s)),  alpha_t^2 + sigma_t^2 = 1,  SNR(t) = alpha_t^2 / sigma_t^2

Two corrections apply to every schedule. Neighbouring pixels agree, so an image of more of them shows through noise of
the same variance more clearly. A schedule made for images of side `reference_size` hides those of side `image_size` as
well if it is shifted (Hoogeboom et al. 2023, section 3.1),

    log SNR(t) <- log SNR(t) + 2 log(reference_size / image_size)

and `zero_terminal_snr` makes the last state pure noise, which is where sampling starts (Lin et al. 2024).

Notation: `t` counts from 0 to T - 1, so `t = 0` is the papers' first noisy step, and `t = -1` is the clean data:
alpha = 1, sigma = 0. The papers' alpha-bar is `alpha_t ** 2`. All tables are float64.
"""

import math

import torch
from torch import Tensor, nn


class Table:
    """A float64 table that is read on any device: each device gets its copy once, so that no step waits for one.

    Args:
        values: (N,) float64, on the host.
    """

    def __init__(self, values: Tensor) -> None:
        self.values = values
        self._copies: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    def at(self, index: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Entries by number, counted from the end if negative: int64 of any shape to `dtype` of that shape."""
        place = (index.device, dtype)
        if place not in self._copies:
            self._copies[place] = self.values.to(*place)
        return self._copies[place][index]


class NoiseSchedule(nn.Module):
    """A variance-preserving schedule given by its betas.

    Args:
        betas: (T,) noise variance added by each step; each in (0, 1], and 1 only at the last.
        name: how errors and summaries call the schedule.

    Attributes:
        betas: (T,) float64.
        alpha_bar: (T,) float64, alpha_t squared.
        alpha: (T,) float64.
        sigma: (T,) float64.

    Raises:
        ValueError: if `betas` is no increasing-noise sequence of that range.
    """

    def __init__(self, betas: Tensor, name: str = "betas") -> None:
        super().__init__()
        betas = betas.to(torch.float64)
        inside = betas.ndim == 1 and len(betas) > 1 and bool((betas > 0).all() and (betas[:-1] < 1).all())
        if not inside or betas[-1] > 1:
            raise ValueError(
                f"schedule {name!r}: betas of shape {tuple(betas.shape)} in [{betas.min():.3g}, {betas.max():.3g}]; "
                "allowed are at least two values in (0, 1), the last of which may be 1; change the `schedule` keys "
                "(`num_steps`, `beta_start`, `beta_end`)"
            )
        self.name = name
        self.betas = betas
        self.alpha_bar = torch.cumprod(1.0 - betas, dim=0)
        self.alpha = self.alpha_bar.sqrt()
        self.sigma = (1.0 - self.alpha_bar).sqrt()
        # Clean data stands at the end, which is where an index of -1 looks.
        self._alpha = Table(torch.cat([self.alpha, _tensor(1.0)]))
        self._sigma = Table(torch.cat([self.sigma, _tensor(0.0)]))

    @property
    def num_steps(self) -> int:
        """T, the length of the forward chain."""
        return len(self.betas)

    @property
    def has_zero_terminal_snr(self) -> bool:
        """Whether x_T holds no signal at all (alpha_T = 0)."""
        return bool(self.alpha_bar[-1] == 0)

    def signal_to_noise(self) -> Tensor:
        """SNR(t) = alpha_t^2 / sigma_t^2, shape (T,), float64."""
        return self.alpha_bar / (1.0 - self.alpha_bar)

    def scales(self, t: Tensor, ndim: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t for a batch of times.

        Args:
            t: (B,) int64 times in [0, T), or -1 for clean data, on any device.
            ndim: dimensions of the tensors to be scaled.
            dtype: of the result.

        Returns:
            Two tensors of shape (B, 1, ..., 1) with `ndim` dimensions.
        """
        shape = (-1, *(1,) * (ndim - 1))
        return self._alpha.at(t, dtype).view(shape), self._sigma.at(t, dtype).view(shape)

    def extra_repr(self) -> str:
        """The facts worth printing."""
        return f"{self.name}, num_steps={self.num_steps}, terminal_snr={self.signal_to_noise()[-1]:.3g}"


def linear_schedule(
    num_steps: int = 1000,
    beta_start: float = 1e-4,
    beta_end: float = 0.02,
    zero_terminal_snr: bool = False,
    image_size: int | None = None,
    reference_size: int | None = None,
) -> NoiseSchedule:
    """Betas that grow linearly (Ho et al. 2020, section 4).

    Args:
        num_steps: T.
        beta_start: first beta.
        beta_end: last beta.
        zero_terminal_snr: rescale so that alpha_T = 0, see `rescale_to_zero_terminal_snr`.
        image_size: side of the images to be noised, in pixels of the image or of the latents.
        reference_size: side, in the same pixels, of images that the betas are right for; `None` shifts nothing.

    Returns:
        The schedule.
    """
    betas = torch.linspace(beta_start, beta_end, num_steps, dtype=torch.float64)
    return _corrected(NoiseSchedule(betas, "linear"), zero_terminal_snr, image_size, reference_size)


def scaled_linear_schedule(
    num_steps: int = 1000,
    beta_start: float = 0.00085,
    beta_end: float = 0.012,
    zero_terminal_snr: bool = False,
    image_size: int | None = None,
    reference_size: int | None = None,
) -> NoiseSchedule:
    """Betas whose square roots grow linearly, the schedule of latent and stable diffusion (Rombach et al. 2022).

    Args:
        num_steps: T.
        beta_start: first beta.
        beta_end: last beta.
        zero_terminal_snr: see `linear_schedule`.
        image_size: see `linear_schedule`.
        reference_size: see `linear_schedule`.

    Returns:
        The schedule.
    """
    roots = torch.linspace(math.sqrt(beta_start), math.sqrt(beta_end), num_steps, dtype=torch.float64)
    return _corrected(NoiseSchedule(roots**2, "scaled_linear"), zero_terminal_snr, image_size, reference_size)


def cosine_schedule(
    num_steps: int = 1000,
    offset: float = 0.008,
    max_beta: float = 0.999,
    zero_terminal_snr: bool = False,
    image_size: int | None = None,
    reference_size: int | None = None,
) -> NoiseSchedule:
    """alpha-bar follows a squared cosine (Nichol and Dhariwal 2021, eq. 17).

    alpha-bar(t) = f(t) / f(0),  f(t) = cos^2((t / T + s) / (1 + s) * pi / 2),  beta_t clipped at `max_beta`

    Args:
        num_steps: T.
        offset: s, keeps the first beta from vanishing.
        max_beta: the clip, which keeps the last steps from a singularity.
        zero_terminal_snr: see `linear_schedule`.
        image_size: see `linear_schedule`.
        reference_size: see `linear_schedule`.

    Returns:
        The schedule.
    """
    time = torch.arange(num_steps + 1, dtype=torch.float64) / num_steps
    f = torch.cos((time + offset) / (1 + offset) * math.pi / 2) ** 2
    betas = (1.0 - f[1:] / f[:-1]).clamp(max=max_beta)
    return _corrected(NoiseSchedule(betas, "cosine"), zero_terminal_snr, image_size, reference_size)


def shift_signal_to_noise(schedule: NoiseSchedule, image_size: float, reference_size: float) -> NoiseSchedule:
    """Hide images of one side as well as the schedule hides those of another (Hoogeboom et al. 2023, section 3.1).

    log SNR(t) <- log SNR(t) + 2 log(reference_size / image_size)

    Args:
        schedule: right for images of side `reference_size`.
        image_size: side of the images to be noised.
        reference_size: in the same unit as `image_size`; only their ratio counts.

    Returns:
        The shifted schedule; equal sides change nothing.
    """
    gain = (reference_size / image_size) ** 2
    signal, noise = gain * schedule.alpha_bar, 1.0 - schedule.alpha_bar
    return _from_alpha_bar(signal / (signal + noise), f"{schedule.name}, from {reference_size} to {image_size} pixels")


def rescale_to_zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Shift and stretch alpha_t so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1)."""
    alpha = (schedule.alpha - schedule.alpha[-1]) * schedule.alpha[0] / (schedule.alpha[0] - schedule.alpha[-1])
    return _from_alpha_bar(alpha**2, f"{schedule.name}, zero terminal SNR")


def _corrected(
    schedule: NoiseSchedule, zero_terminal_snr: bool, image_size: int | None, reference_size: int | None
) -> NoiseSchedule:
    if reference_size is not None:
        if image_size is None or min(image_size, reference_size) < 1:
            raise ValueError(
                f"image_size is {image_size} and reference_size {reference_size}; allowed are two sides from 1, or "
                "reference_size null for no shift; change `schedule.image_size` or `schedule.reference_size`"
            )
        schedule = shift_signal_to_noise(schedule, image_size, reference_size)
    # Last, for a shift leaves a terminal SNR of zero where it is, but would move the first alpha.
    return rescale_to_zero_terminal_snr(schedule) if zero_terminal_snr else schedule


def _from_alpha_bar(alpha_bar: Tensor, name: str) -> NoiseSchedule:
    return NoiseSchedule(1.0 - alpha_bar / torch.cat([_tensor(1.0), alpha_bar[:-1]]), name)


def _tensor(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)
