"""What the ranks of a run say to each other beside the training: are we the same, who is silent?

Both go through the store of the process group, a table of words on rank 0, and through no collective operation, so that
they work while ranks are stuck in one, cost a step nothing, and can name a rank that does not answer.

    compare     before the first step: every rank writes its facts, rank 0 compares them and writes the verdict, which
                every rank reads: all raise the same error, or none does
    Pulse       from then on: a thread on each rank writes every two seconds that the process lives, and where its
                training is. Rank 0 reads all of it, and rank 1 hears when rank 0 is gone. If ranks stand still in
                different places, one rank of each prints the stacks of its threads

A silent rank is only spoken of: what ends the others is the time-out of the process group, its lost connections, or the
launcher.
"""

import json
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import TypeVar

import torch.distributed as dist

_log = logging.getLogger(__name__)
_Answer = TypeVar("_Answer")

_MOST_LINES = 8
_SECONDS_TO_READ = 5.0
_ENDED = "ended"


class RanksDifferError(ValueError):
    """Ranks that should be the same are not, or some are missing; the message names them."""


def compare(store: dist.Store, topic: str, facts: Mapping[str, object], rank: int, world_size: int) -> None:
    """See that all ranks have the same facts; waits until all are here.

    Args:
        store: of all ranks; its time-out is how long they wait for each other.
        topic: what is compared, for the message; of two calls with one store no two have the same.
        facts: plain values under names for people.
        rank: of this process.
        world_size: how many there are.

    Raises:
        RanksDifferError: on every rank, if one has other facts or does not come.
    """
    seconds = store.timeout.total_seconds()  # type: ignore[attr-defined]
    word = json.dumps({name: str(value) for name, value in facts.items()})
    if rank == 0:
        store.set(f"{topic}/0", word)
        verdict = _judge(store, topic, world_size, seconds)
    else:
        patience = 1.5 * seconds + 5
        try:
            verdict = _within(patience + _SECONDS_TO_READ, lambda: _hear(store, topic, rank, word, patience))
        except RuntimeError as error:
            raise RanksDifferError(f"{topic}: nothing was heard of rank 0 within {seconds:.0f} s; {_REMEDY}") from error
    if verdict:
        raise RanksDifferError(f"{topic}: {verdict}{_REMEDY}")


def _judge(store: dist.Store, topic: str, world_size: int, seconds: float) -> str:
    """On rank 0: compare, and tell the others what was found; empty if there is nothing."""
    keys = [f"{topic}/{other}" for other in range(world_size)]
    missing = _await(store, keys, seconds)
    found = "" if missing else _listed(differences([json.loads(word) for word in store.multi_get(keys)]))
    if missing:
        found = f"nothing was heard of {named(missing)} within {seconds:.0f} s; "
    store.set(f"{topic}/verdict", found)
    if found:  # the store ends with this process, and others may still have to read
        _await(store, [f"{topic}/{other}/read" for other in range(1, world_size)], _SECONDS_TO_READ)
    return found


def _hear(store: dist.Store, topic: str, rank: int, word: str, seconds: float) -> str:
    """On the others: say what is known here, and wait for what rank 0 says of it.

    Raises:
        RuntimeError: if rank 0 says nothing in that time, or is gone.
    """
    store.set(f"{topic}/{rank}", word)
    if _await(store, [f"{topic}/verdict"], seconds):
        raise RuntimeError("no verdict")
    verdict = store.get(f"{topic}/verdict").decode()
    if verdict:
        store.set(f"{topic}/{rank}/read", "")
    return verdict


_REMEDY = (
    "allowed are ranks that run the same code with the same config on the same data: give all of them the same "
    "command, environment variables, installation and files, and if one only came late, more time by "
    "`trainer.strategy.timeout.seconds`"
)


def differences(facts: Sequence[Mapping[str, str]]) -> list[str]:
    """A line for each fact that is not the same on all ranks: its values, and who has them.

    Args:
        facts: of rank 0, 1, and so on.
    """
    lines = []
    for name in sorted({name for each in facts for name in each}):
        holders = defaultdict(list)
        for rank, each in enumerate(facts):
            holders[each.get(name, "nothing")].append(rank)
        if len(holders) > 1:
            lines.append(f"{name} is " + ", ".join(f"{value} on {named(ranks)}" for value, ranks in holders.items()))
    return lines


def named(ranks: Sequence[int]) -> str:
    """`rank 3`, `ranks 0, 2, 5-7`."""
    parts: list[list[int]] = []
    for rank in sorted(ranks):
        if parts and rank == parts[-1][-1] + 1:
            parts[-1].append(rank)
        else:
            parts.append([rank])
    listed = ", ".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
    return f"rank{'s' if len(ranks) > 1 else ''} {listed}"


def _listed(lines: list[str]) -> str:
    more = [f"and {len(lines) - _MOST_LINES} more"] if len(lines) > _MOST_LINES else []
    return "".join(f"\n  - {line}" for line in [*lines[:_MOST_LINES], *more]) + ("\n" if lines else "")


def _await(store: dist.Store, keys: list[str], seconds: float) -> list[int]:
    """The positions of the keys that are not there in that time."""
    deadline = time.monotonic() + seconds
    while not store.check(keys):
        if time.monotonic() > deadline:
            return [position for position, key in enumerate(keys) if not store.check([key])]
        time.sleep(0.05)
    return []


class _FrozenError(RuntimeError):
    """Rank 0 does not answer, and its connections are open."""


def _within(seconds: float, function: Callable[[], _Answer]) -> _Answer:
    """What a function of the store returns in that time.

    A rank 0 that is frozen keeps its connections, and a call waits on one beyond every time-out of the store.

    Raises:
        RuntimeError: if it does not return in that time.
    """
    answer: Future[_Answer] = Future()

    def ask() -> None:
        try:
            answer.set_result(function())
        except RuntimeError as error:
            answer.set_exception(error)

    threading.Thread(target=ask, daemon=True, name="question").start()
    try:
        return answer.result(seconds)
    except TimeoutError:
        raise _FrozenError("rank 0 does not answer") from None


class Pulse:
    """Says that this rank lives, and where it is, and listens to the others.

    Args:
        store: a connection that nothing else uses.
        rank: of this process.
        world_size: how many there are.
        place: says where the training of this rank is, for people; asked at each sign of life, by another thread.
        every: seconds between two signs of life; after four without one a rank is called silent.
        stall: seconds without progress after which ranks in different places say where they are; below the time-out
            of the process group, which may end the process without a word.
        say_stacks: prints where the threads of this rank are.

    Attributes:
        silent: ranks that did not answer when `report` was called.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world_size: int,
        place: Callable[[], str],
        every: float,
        stall: float,
        say_stacks: Callable[[], None],
    ) -> None:
        self._store, self._rank, self._world_size, self._every, self._stall = store, rank, world_size, every, stall
        self._place, self._say_stacks = place, say_stacks
        self.silent: list[int] = []
        self._count = 0
        self._stopped = threading.Event()
        self._keys = [f"pulse/{other}" for other in range(world_size)]
        self._heard: list[tuple[str, float]] = [("", time.monotonic())] * world_size
        self._told: set[int] = set()
        self._is_lost = False
        self._beat()
        self._thread = threading.Thread(target=self._run, daemon=True, name="pulse")

    def start(self) -> None:
        """Begin; every rank has been constructed by then (`compare`)."""
        self._thread.start()

    def stop(self, reason: str) -> None:
        """Say why this rank is not heard of any more; harmless when repeated."""
        if not self._stopped.is_set():
            self._stopped.set()
            if self._thread.is_alive():
                self._thread.join(self._every)
            self._place = lambda: f"{_ENDED} {reason}"
            try:
                self._in_time(self._beat)
            except RuntimeError:
                return  # rank 0 has gone, with the store

    def report(self) -> str | None:
        """After an error that another rank may have caused: who is silent, and where each of the others is.

        Takes two and a half beats, a few more if rank 0 does not answer. None on a rank that need not say it, because
        one with a smaller number does.
        """
        try:
            before = self._in_time(self._words)
            time.sleep(2.5 * self._every)
            after = self._in_time(self._words)
        except RuntimeError:
            self.silent = [0]
            return None if self._rank != 1 else f"rank 0 does not answer; {_GONE}"
        self.silent = silent = [
            r for r, (old, new) in enumerate(zip(before, after, strict=True)) if old == new and not _is_end(new)
        ]
        speaking = [r for r in range(self._world_size) if r not in silent and not _is_end(after[r])]
        if not speaking or self._rank != speaking[0]:
            return None
        missing = f"{named(silent)} {'does' if len(silent) == 1 else 'do'} not answer; {_GONE}\n" if silent else ""
        return missing + "The ranks were last heard of so:\n" + _listing(_holders(after, silent))

    def _run(self) -> None:
        moved, place, is_stalled, lost = time.monotonic(), self._place(), False, 0
        while not self._stopped.wait(self._every):
            if (now_at := self._place()) != place:
                moved, place, is_stalled = time.monotonic(), now_at, False
            try:
                self._beat()
                if self._rank == 0:
                    self._listen()
                if time.monotonic() - moved > self._stall and not is_stalled:
                    self._say_places(time.monotonic() - moved)
                    is_stalled = True
                lost = 0
            except RuntimeError:
                lost += 1
                if lost == 3 and self._rank == 1:
                    _log.error("rank 0 does not answer; %s", _GONE)
                if lost == 3:
                    return

    def _in_time(self, function: Callable[[], _Answer]) -> _Answer:
        """What a function of the store returns within three beats.

        Raises:
            RuntimeError: if it does not return in that time, or an earlier one did not.
        """
        if self._is_lost:
            raise _FrozenError("rank 0 does not answer")
        try:
            return _within(max(3 * self._every, _SECONDS_TO_READ), function)
        except _FrozenError:
            self._is_lost = True
            raise

    def _beat(self) -> None:
        self._count += 1
        self._store.set(self._keys[self._rank], json.dumps([self._count, self._place()]))

    def _words(self) -> list[str]:
        return [word.decode() for word in self._store.multi_get(self._keys)]

    def _listen(self) -> None:
        now = time.monotonic()
        for rank, word in enumerate(self._words()):
            if word != self._heard[rank][0]:
                self._heard[rank] = (word, now)
                if rank in self._told:
                    self._told.remove(rank)
                    _log.warning("rank %d is heard of again", rank)
            elif now - self._heard[rank][1] > 4 * self._every and rank not in self._told and not _is_end(word):
                self._told.add(rank)
                _log.error("%s does not answer, last heard of at %s; %s", named([rank]), _place_of(word), _GONE)

    def _say_places(self, seconds: float) -> None:
        """If the ranks are in different places: rank 0 lists them, and the first rank of each says where exactly."""
        holders = _holders(self._words())
        if len(holders) == 1:
            return
        if self._rank == 0:
            _log.warning(
                "nothing has moved for %.0f s, and the ranks are in different places; they wait for each other for "
                "`trainer.strategy.timeout.seconds`:\n%s",
                *(seconds, _listing(holders)),
            )
        first = [ranks[0] for ranks in holders.values()]
        if self._rank in first:
            # In a thread of their own: the error stream may be on the disk that does not answer.
            turn = first.index(self._rank) * self._every
            threading.Thread(target=self._say_stacks_at, args=(turn,), daemon=True, name="stacks").start()

    def _say_stacks_at(self, turn: float) -> None:
        """One rank after the other: they share a file."""
        if not self._stopped.wait(turn):
            self._say_stacks()


_GONE = (
    "its process was killed or stopped, or its machine is gone: see what the launcher says of it, and the memory it "
    "had. The job ends; the same command goes on from the last checkpoint"
)


def told_silence(error: BaseException) -> str | None:
    """What a report that was noted on an error says of ranks that did not answer; None if it says nothing of any."""
    lines = [line for note in getattr(error, "__notes__", []) for line in note.splitlines()]
    return next((line for line in lines if line.endswith(_GONE)), None)


def _holders(words: Sequence[str], silent: Sequence[int] = ()) -> dict[str, list[int]]:
    """The ranks at each place."""
    holders = defaultdict(list)
    for rank, word in enumerate(words):
        holders[_place_of(word) + (", silent since" if rank in silent else "")].append(rank)
    return holders


def _listing(holders: Mapping[str, Sequence[int]]) -> str:
    return "\n".join(f"  - {named(ranks)}: {place}" for place, ranks in holders.items())


def _place_of(word: str) -> str:
    return str(json.loads(word)[1])


def _is_end(word: str) -> bool:
    return _place_of(word).startswith(_ENDED)
