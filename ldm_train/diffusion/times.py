"""Which times a batch is trained at.

The loss is an expectation over uniform times. It may be estimated with less variance in two ways.

Evenly spread times: in place of B independent draws, the points of an additive recurrence with the golden ratio g,

    u_i = frac(shift + i g),   g = (sqrt(5) - 1) / 2,   t_i = floor(T u_i)

where i is the sample's place in the order of its epoch and the shift is random. Any run of consecutive points is spread
over [0, 1) about as evenly as can be (Steinhaus' three-gap theorem), so every global batch is, however it is split over
processes. (Kingma et al. 2021, "Variational diffusion models", appendix I.1, spread each batch by itself.)

Loss-aware times: times whose loss is large are drawn more often and count for less (Nichol and Dhariwal 2021, eq. 18),

    L = E_{t ~ p} [ L_t / (T p_t) ],   p_t ~ sqrt(E[L_t^2])

with E[L_t^2] over the last losses seen at t, and uniform times until there are enough of them.

Letters: B batch, T length of the schedule, N samples of all processes, H losses kept of each time.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ldm_train.distributed import all_gather_cat
from ldm_train.randomness import SampleKeys, Stream, random_words, uniform

_GOLDEN = 0x9E3779B9  # the golden ratio in units of 2^-32
_NO_SAMPLE = -1  # keys draws that belong to an epoch, not to one of its samples


class TimeDraw(NamedTuple):
    """The times of a batch.

    Attributes:
        t: (B,) int64 in [0, T).
        weight: (B,) float32, 1 / (T p_t): what makes the mean loss that of uniform times.
    """

    t: Tensor
    weight: Tensor


class Times(nn.Module, ABC):
    """A way to draw times; a module, because it may remember something that belongs into a checkpoint."""

    @abstractmethod
    def draw(self, keys: SampleKeys, num_steps: int) -> TimeDraw:
        """A time of 0 .. num_steps - 1 for each of the B samples."""

    def observe(self, t: Tensor, loss: Tensor, keys: SampleKeys) -> None:
        """Learn from the losses (B,) at times (B,) of a batch, the weights of the draw left out."""


class UniformTimes(Times):
    """Independent times, a function of (seed, epoch, sample id)."""

    def draw(self, keys: SampleKeys, num_steps: int) -> TimeDraw:
        """Uniform and independent."""
        return _unweighted(_scaled(_uniform(keys), num_steps))


class LowDiscrepancyTimes(Times):
    """Evenly spread times, a function of (seed, epoch, position)."""

    def draw(self, keys: SampleKeys, num_steps: int) -> TimeDraw:
        """Uniform, and evenly spread over consecutive positions."""
        nobody = torch.full_like(keys.position[:1], _NO_SAMPLE)
        shift = random_words(keys.seed, keys.epoch, nobody, Stream.TIMESTEP, 1)[0]
        # Fractions are 32-bit words, so that a point is exact at any position and on any device.
        word = (shift + _times_golden(keys.position)) & 0xFFFFFFFF
        return _unweighted((word * num_steps) >> 32)


class LossAwareTimes(Times):
    """Times drawn in proportion to the root mean square of their last losses.

    All processes learn from the losses of all, in the order of the samples, so they agree with each other and with one
    process of the joined batch. Evaluation draws uniform times and learns nothing.

    Args:
        num_steps: T.
        history: H, losses kept of each time; nothing is preferred before each time has so many.
        uniform_share: share of the probability that is spread evenly, so that no time is forgotten.

    Raises:
        ValueError: if an argument is out of range, or `num_steps` is not that of the schedule.
    """

    losses: Tensor
    seen: Tensor

    def __init__(self, num_steps: int, history: int = 10, uniform_share: float = 0.001) -> None:
        super().__init__()
        _require(num_steps >= 1, "num_steps", num_steps, "whole numbers from 1, `schedule.num_steps`")
        _require(history >= 1, "history", history, "whole numbers from 1")
        _require(0 < uniform_share <= 1, "uniform_share", uniform_share, "numbers above 0 to 1")
        self.uniform_share = uniform_share
        self.register_buffer("losses", torch.zeros(num_steps, history, dtype=torch.float64))
        self.register_buffer("seen", torch.zeros(num_steps, dtype=torch.int64))

    def probabilities(self) -> Tensor:
        """p_t of training: (T,) float64."""
        num_steps, history = self.losses.shape
        size = self.losses.double().square().mean(dim=1).sqrt()
        # Losses of zero everywhere leave nothing to prefer; the last division spreads them evenly.
        shares = size / size.sum().clamp(min=torch.finfo(size.dtype).tiny)
        shares = (1.0 - self.uniform_share) * shares + self.uniform_share / num_steps
        # A choice on the device: asking for its outcome would wait for the GPU.
        ready = (self.seen >= history).all()
        return torch.where(ready, shares / shares.sum(), 1.0 / num_steps)

    def draw(self, keys: SampleKeys, num_steps: int) -> TimeDraw:
        """Independent, by inversion of the cumulated probabilities; uniform in evaluation."""
        _require(num_steps == len(self.seen), "num_steps", len(self.seen), f"{num_steps}, that of the schedule")
        if not self.training:
            return _unweighted(_scaled(_uniform(keys), num_steps))
        p = self.probabilities()
        t = torch.searchsorted(p.cumsum(0), _uniform(keys), right=True).clamp(max=num_steps - 1)
        return TimeDraw(t, (1.0 / (num_steps * p[t])).float())

    @torch.no_grad()
    def observe(self, t: Tensor, loss: Tensor, keys: SampleKeys) -> None:
        """Keep the losses of all processes, the last H of each time, in the order of the samples."""
        if not self.training:
            return
        num_steps, history = self.losses.shape
        mine = torch.stack([keys.position.double(), t.double(), loss.double()], dim=1)  # one message instead of three
        position, t, loss = all_gather_cat(mine).unbind(1)  # (N,)
        # A loss that is no number would make its time the only one drawn: it counts as one of a time beyond the last.
        t = torch.where(loss.isfinite(), t, num_steps).long()
        order = torch.argsort(position, stable=True)
        order = order[torch.argsort(t[order], stable=True)]  # by time, within it by position
        t, loss = t[order], loss[order]

        every = torch.arange(num_steps + 1, device=t.device)
        begin, end = torch.searchsorted(t, every), torch.searchsorted(t, every, right=True)
        place = torch.arange(len(t), device=t.device)
        kept = (t < num_steps) & (place >= end[t] - history)  # of more than H losses of a time the last
        age = self.seen[t.clamp(max=num_steps - 1)] + place - begin[t]  # its number among all losses of the time
        slot = torch.where(kept, t * history + age % history, self.losses.numel())  # the last slot is thrown away
        ring = torch.cat([self.losses.flatten(), self.losses.new_zeros(1)])
        # A module of half precision keeps its losses in it as well.
        self.losses.copy_(ring.scatter(0, slot, loss.to(ring.dtype))[:-1].view_as(self.losses))
        self.seen += (end - begin)[:-1]


def _uniform(keys: SampleKeys) -> Tensor:
    """One uniform draw for each sample: (B,) float64."""
    return uniform(keys.seed, keys.epoch, keys.sample_id, Stream.TIMESTEP).double()


def _scaled(share: Tensor, num_steps: int) -> Tensor:
    """Shares (B,) of [0, 1) to times."""
    return (share * num_steps).long()


def _unweighted(t: Tensor) -> TimeDraw:
    return TimeDraw(t, torch.ones_like(t, dtype=torch.float32))


def _times_golden(position: Tensor) -> Tensor:
    """frac(position g) in units of 2^-32, for int64 positions; 16-bit halves keep products within int64."""
    low, high = position & 0xFFFF, (position >> 16) & 0xFFFF
    return (low * _GOLDEN + ((high * _GOLDEN & 0xFFFF) << 16)) & 0xFFFFFFFF


def _require(condition: bool, key: str, found: object, allowed: str) -> None:
    if not condition:
        raise ValueError(f"{key} is {found}; allowed are {allowed}; change `objective.times.{key}`")
