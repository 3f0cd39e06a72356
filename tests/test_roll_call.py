"""Ranks that differ, are missing or fall silent are named, by threads that stand for ranks around one store."""

import logging
import os
import signal
import socket
import threading
import time
from datetime import timedelta
from functools import partial

import pytest
import torch.distributed as dist
from torch.multiprocessing import ProcessExitedException

from ldm_train.distributed import rank_store
from ldm_train.roll_call import Pulse, RanksDifferError, compare, differences, named

from .ranks import run_ranks

EVERY = 0.05


def in_ranks(count, function, seconds=20.0):
    """What `function(store, rank)` returns or raises on each rank, all at the same time."""
    store, found = dist.HashStore(), [None] * count
    store.set_timeout(timedelta(seconds=seconds))

    def run(rank):
        try:
            found[rank] = function(store, rank)
        except RanksDifferError as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return found


def test_equal_ranks_pass_as_often_as_they_are_compared():
    def twice(store, rank):
        compare(store, "first", {"seed": 0}, rank, 3)
        compare(store, "second", {"batches": 7}, rank, 3)
        return "passed"

    assert in_ranks(3, twice) == ["passed"] * 3


def test_all_ranks_raise_the_same_error_and_it_names_who_has_what():
    errors = in_ranks(4, lambda store, rank: compare(store, "not the same", {"seed": rank // 3, "limit": 5}, rank, 4))
    assert len({str(error) for error in errors}) == 1
    assert "\n  - seed is 0 on ranks 0-2, 1 on rank 3\n" in str(errors[0])
    assert "limit" not in str(errors[0])
    assert "allowed are ranks that run the same code" in str(errors[0])


@pytest.mark.parametrize("missing", [0, 1])
def test_a_rank_that_does_not_come_is_named_within_the_time_out(missing):
    def come(store, rank):
        return None if rank == missing else compare(store, "the start", {}, rank, 2)

    began = time.monotonic()
    errors = in_ranks(2, come, seconds=0.3)
    assert f"nothing was heard of rank {missing}" in str(errors[1 - missing])
    assert "`trainer.strategy.timeout.seconds`" in str(errors[1 - missing])
    assert time.monotonic() - began < 10


def test_what_one_rank_lacks_is_a_difference():
    assert differences([{"a": "1", "b": "2"}, {"a": "1"}]) == ["b is 2 on rank 0, nothing on rank 1"]
    assert differences([{"a": "1"}] * 3) == []


def test_names_of_ranks_are_short():
    assert [named(ranks) for ranks in ([3], [2, 0], [7, 5, 6, 0])] == ["rank 3", "ranks 0, 2", "ranks 0, 5-7"]


@pytest.fixture
def stacks():
    """The ranks that have printed their stacks, in this order."""
    return []


@pytest.fixture
def pulses(stacks):
    """Three ranks' pulses around one store; those that live are stopped in the end."""
    store = dist.HashStore()
    found = [
        Pulse(store, rank, 3, lambda: "the start", EVERY, 4 * EVERY, partial(stacks.append, rank)) for rank in range(3)
    ]
    yield found
    for pulse in found:
        pulse.stop("the test")


class Clock:
    """In place of the time of a busy machine: of each beat of it, those that live beat once and rank 0 listens."""

    def __init__(self, pulses):
        self.now, self.pulses, self.alive = time.monotonic(), pulses, {0, 1, 2}

    def monotonic(self):
        return self.now

    def sleep(self, seconds):
        for _ in range(round(seconds / EVERY)):
            self.now += EVERY
            for rank in self.alive:
                self.pulses[rank]._beat()
            if 0 in self.alive:
                self.pulses[0]._listen()


@pytest.fixture
def clock(pulses, monkeypatch):
    found = Clock(pulses)
    monkeypatch.setattr("ldm_train.roll_call.time", found)
    return found


def said(caplog, text, seconds=5.0):
    deadline = time.monotonic() + seconds
    while text not in caplog.text and time.monotonic() < deadline:
        time.sleep(EVERY)
    return text in caplog.text


def test_a_rank_that_falls_silent_is_named_with_its_last_place(pulses, caplog):
    pulses[2]._place = lambda: "batch 12"
    pulses[2]._beat()  # its thread never starts: it has died after this
    for pulse in pulses[:2]:
        pulse.start()
    assert said(caplog, "rank 2 does not answer, last heard of at batch 12")
    pulses[2].start()
    assert said(caplog, "rank 2 is heard of again")


def test_only_the_rank_that_is_silent_is_named_and_after_four_beats(pulses, clock, caplog):
    clock.sleep(2 * EVERY)
    clock.alive.remove(2)
    clock.sleep(3 * EVERY)
    assert caplog.text == ""
    clock.sleep(8 * EVERY)
    assert caplog.text.count("does not answer") == caplog.text.count("rank 2 does not answer") == 1


def test_a_rank_that_says_goodbye_is_not_missed(pulses, clock, caplog):
    clock.sleep(EVERY)
    pulses[1].stop("with ValueError: a mistake")
    clock.alive.remove(1)
    clock.sleep(8 * EVERY)
    assert "answer" not in caplog.text
    assert "rank 1: ended with ValueError: a mistake" in pulses[0].report()


def test_after_an_error_the_first_rank_that_lives_reports(pulses, clock):
    clock.alive.remove(0)
    for pulse in pulses[1:]:
        pulse._place = lambda: "batch 3"
    clock.sleep(2 * EVERY)
    report = pulses[1].report()
    assert report.startswith("rank 0 does not answer")
    assert "ranks 1-2: batch 3" in report
    assert pulses[2].report() is None


def test_ranks_that_wait_in_different_places_are_listed_before_the_time_out(pulses, stacks, caplog):
    caplog.set_level(logging.WARNING)
    for pulse, batch in zip(pulses, (5, 4, 5), strict=True):
        pulse._place = f"batch {batch}".__str__
        pulse._beat()  # before any of them looks
    for pulse in pulses:
        pulse.start()
    assert said(caplog, "  - ranks 0, 2: batch 5\n  - rank 1: batch 4")
    deadline = time.monotonic() + 5
    while len(stacks) < 2 and time.monotonic() < deadline:
        time.sleep(EVERY)
    time.sleep(8 * EVERY)
    assert sorted(stacks) == [0, 1]  # one of each place, and once


def test_ranks_that_wait_together_are_left_alone(pulses, stacks, clock, caplog):
    for pulse in pulses:
        pulse._place = lambda: "the closing work"
    clock.sleep(10 * EVERY)
    pulses[0]._say_places(10 * EVERY)
    assert (caplog.text, stacks) == ("", [])


def freezes_as_rank_0(rank, port, folder):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=5))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=5))
    pulse = Pulse(rank_store("pulses"), rank, 2, lambda: "here", every=0.5, stall=60, say_stacks=lambda: None)
    pulse.start()
    dist.barrier()
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(RuntimeError):
        dist.barrier()
    (folder / "report").write_text(pulse.report())
    pulse.stop("with RuntimeError")


def freezes_before_the_first_step(rank, port, folder):
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=rank == 0, timeout=timedelta(seconds=2))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=2))
    words = rank_store("ranks")
    dist.barrier()
    (folder / f"pid_{rank}").write_text(str(os.getpid()))
    if rank == 0:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(RanksDifferError) as error:
        compare(words, "the start", {"seed": 0}, rank, 2)
    (folder / "report").write_text(str(error.value))


@pytest.mark.parametrize(
    ("freezes", "report"),
    [(freezes_as_rank_0, "rank 0 does not answer"), (freezes_before_the_first_step, "the start: nothing was heard of")],
)
def test_a_rank_0_that_is_frozen_keeps_no_other_rank(tmp_path, freezes, report):
    """Its connections stay open, so that whoever asks it something is never answered."""

    ranks = threading.Thread(target=run_until_killed, args=(freezes, free_port(), tmp_path))
    ranks.start()
    frozen, other = (number_in(tmp_path / f"pid_{rank}") for rank in range(2))
    try:
        deadline = time.monotonic() + 30
        while is_there(other) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_there(other)
    finally:
        os.kill(frozen, signal.SIGKILL)
        ranks.join()
    assert (tmp_path / "report").read_text().startswith(report)


def run_until_killed(freezes, port, folder):
    with pytest.raises(ProcessExitedException, match="SIGKILL"):
        run_ranks(freezes, port, folder)


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def number_in(path):
    deadline = time.monotonic() + 200
    while not (path.exists() and path.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    return int(path.read_text())


def is_there(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
