"""Processes that work on shards: results in order, and none that outlives the run that asked for them."""

import os
import signal
import subprocess
import sys
import time

from ldm_train.data.parallel import map_in_order

RUN = """
import os, time
from ldm_train.data.parallel import map_in_order

def wait(item):
    os.write(1, b"%d\\n" % os.getpid())  # whole: another process writes as well
    time.sleep(60)

list(map_in_order(wait, range(4), 2))
"""


def is_running(pid):
    """Whether a process is there, and no mere entry that nobody has asked for."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_results_come_in_order_from_any_number_of_processes():
    assert [list(map_in_order(abs, range(-9, 9), workers)) for workers in (0, 1, 3)] == [[*map(abs, range(-9, 9))]] * 3


def test_no_process_outlives_a_run_that_is_killed():
    """An orphan would hold the lock of the index, which it inherits, and every later run would wait for it."""
    run = subprocess.Popen([sys.executable, "-c", RUN], stdout=subprocess.PIPE, text=True)
    workers = {int(run.stdout.readline()) for _ in range(2)}
    assert len(workers) == 2
    assert all(map(is_running, workers))
    os.kill(run.pid, signal.SIGKILL)
    run.wait()
    deadline = time.monotonic() + 10
    while any(map(is_running, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(is_running, workers))
