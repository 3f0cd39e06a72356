"""Ranks and reductions that read the same with one process and with many.

Every function is correct before a process group exists (`global_rank` is then 0, the world has one member and a sum
over ranks is its argument), so that metrics and callbacks hold no `if distributed` of their own.
"""

import time
from collections.abc import Mapping
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor


def _group_exists() -> bool:
    return dist.is_available() and dist.is_initialized()


def global_rank() -> int:
    """This process's rank among all processes of the run."""
    return dist.get_rank() if _group_exists() else 0


def world_size() -> int:
    """The number of processes of the run."""
    return dist.get_world_size() if _group_exists() else 1


def duration(seconds: float) -> timedelta:
    """So many seconds, for a config: `trainer.strategy.timeout.seconds` is how long a rank waits for the others.

    Raises:
        ValueError: if it is no time to wait.
    """
    if not seconds > 0:
        raise ValueError(
            f"seconds is {seconds}; allowed are seconds above 0; change `trainer.strategy.timeout.seconds`"
        )
    return timedelta(seconds=seconds)


def rank_store(name: str) -> dist.Store | None:
    """A connection of its own to the words that ranks leave for each other on rank 0; None with one process.

    Args:
        name: of the conversation; keys of another do not meet its keys.
    """
    return dist.PrefixStore(name, _default_store().clone()) if _group_exists() else None


def patience(store: dist.Store) -> timedelta:
    """How long a rank waits for the others: the time-out of the run's process group, which its store has as well."""
    return store.timeout  # type: ignore[attr-defined]


def _default_store() -> dist.Store:
    return dist.distributed_c10d._get_default_store()


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all ranks; a new tensor, equal on every rank. Shape and dtype are kept."""
    total = value.detach().clone()
    if _group_exists():
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all ranks, for a floating-point tensor; a new tensor, equal on every rank."""
    return all_reduce_sum(value) / world_size()


def mean_figures(figures: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The means over all ranks of scalars with the same names on each, in one reduction.

    On a GPU no process waits for its device, as each would in every step by Lightning's `sync_dist` and its barrier.
    """
    if not _group_exists():
        return {name: value.detach() for name, value in figures.items()}
    means = all_reduce_mean(torch.stack([value.float() for value in figures.values()]))
    return dict(zip(figures, means.unbind(), strict=True))


def all_gather_cat(value: Tensor) -> Tensor:
    """The tensors of all ranks joined along the first dimension, in rank order; equal shapes are required."""
    if not _group_exists():
        return value.detach().clone()
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.detach().contiguous())
    return torch.cat(parts)


class Agreement:
    """The largest of the ranks' small numbers, the same on every rank, without waiting for a device.

    The numbers travel between CPUs, in a process group of their own, and `exchange` returns what the call *before* this
    one agreed on: the network has the time of a training step, and no rank waits for another. Every rank must make the
    same calls in the same order, and construct it at the same place.
    """

    def __init__(self) -> None:
        self._group: dist.ProcessGroup | None = None
        if _group_exists():
            # A group has a time-out of its own, half an hour if nobody says another.
            self._group = dist.new_group(backend="gloo", timeout=patience(_default_store()))  # type: ignore[assignment]
        self._work: dist.Work | None = None
        self._is_forgotten = False
        self._pending = torch.zeros(1, dtype=torch.int64)

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self._group is None

    def exchange(self, value: int) -> int:
        """What the previous call agreed on, 0 on the first; with one process, `value`."""
        if self._group is None:
            return value
        agreed = self._settled()
        self._pending = torch.tensor([value])
        self._work = dist.all_reduce(self._pending, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return agreed

    def now(self, value: int) -> int:
        """What this call and the one before agree on; waits for the slowest rank."""
        return max(self.exchange(value), self._settled())

    def wait(self, seconds: float) -> None:
        """Wait until all ranks are here.

        Raises:
            RuntimeError: if one of them does not come in that time.
        """
        if self._group is not None:
            self._settled()
            dist.monitored_barrier(self._group, timeout=timedelta(seconds=seconds))

    def forget(self) -> None:
        """What was said so far is out of date, and the next call returns 0; every rank calls it at the same place."""
        self._is_forgotten = self._work is not None

    def _settled(self) -> int:
        if self._work is None:
            return 0
        self._work.wait()
        self._work = None
        is_forgotten, self._is_forgotten = self._is_forgotten, False
        return 0 if is_forgotten else int(self._pending)


class PacedAgreement:
    """An `Agreement` that may be asked in every step of a run, and talks in some of them where steps are short.

    Ranks that talked in each step of a millisecond would spend a twentieth of it on that. Where all of them find that
    less than `seconds` have passed since they last talked, they let twice as many calls pass the next time, up to
    `most_calls`. The first two calls after `talk_at_once` talk. In each step, on every rank:

        if agreement.next_call_talks():
            agreed = agreement.exchange(value)

    One process has nobody to talk to, and may do so without.

    Args:
        seconds: between two talks, about.
        most_calls: of which one talks.

    Attributes:
        is_alone: whether there is nobody to agree with.
    """

    def __init__(self, seconds: float, most_calls: int) -> None:
        self.seconds, self.most_calls = seconds, most_calls
        self._agreement = Agreement()
        self.is_alone = self._agreement.is_alone
        self._talked_at = 0.0
        self.talk_at_once()

    def talk_at_once(self) -> None:
        """What follows may take longer than what went before; every rank says so at the same place."""
        self._every = self._to_go = 1
        self._at_once = 2  # talks; what the first one hears was said before

    def next_call_talks(self) -> bool:
        """Counts one call, and says whether it is one in which the ranks talk."""
        self._to_go -= 1
        return self._to_go <= 0

    def exchange(self, value: int) -> int:
        """What the talk before this one agreed on, as by `Agreement.exchange`."""
        now = time.monotonic()
        is_late, self._talked_at = now - self._talked_at > self.seconds, now
        # The number twice, plus one if this rank has waited long: of the ranks' values the largest tells both.
        agreed = self._agreement.exchange(2 * value + is_late)
        self._at_once = max(0, self._at_once - 1)
        self._every = self._to_go = 1 if agreed or self._at_once else min(2 * self._every, self.most_calls)
        return agreed // 2

    def forget(self) -> None:
        """What was said so far is out of date: see `Agreement.forget`."""
        self._agreement.forget()

    def now(self, value: int) -> int:
        """What this call and the talk before it agree on; waits for the slowest rank."""
        return self._agreement.now(2 * value) // 2

    def wait(self, seconds: float) -> None:
        """Wait until all ranks are here.

        Raises:
            RuntimeError: if one of them does not come in that time.
        """
        self._agreement.wait(seconds)
