"""A process that does not move says where it stands, and so do its loading processes."""

import signal
import subprocess
import sys
from pathlib import Path

STUCK = """
import multiprocessing, os, threading, time
from torch.utils.data import DataLoader
from ldm_train.data.dataset import as_is, start_worker
from ldm_train.stacks import answering_with_stacks, say_stacks

class Photos:
    def __len__(self):
        return 1

    def __getitem__(self, index):
        return read_from_a_dead_disk()

def read_from_a_dead_disk():
    open({started!r}, "w").close()
    time.sleep(60)

def wait_for_a_batch():
    next(iter(DataLoader(Photos(), num_workers=1, batch_size=None, collate_fn=as_is, worker_init_fn=start_worker)))

def look():
    while not os.path.exists({started!r}):
        time.sleep(0.05)
    say_stacks("rank 3")
    time.sleep(2)  # its loading process may be late on a busy machine
    alive = [child.is_alive() for child in multiprocessing.active_children()]
    [child.kill() for child in multiprocessing.active_children()]
    print(alive, flush=True)
    os._exit(0)

other = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), name="deaf")
other.start()  # before: the signal would end it
with answering_with_stacks():
    threading.Thread(target=look).start()
    wait_for_a_batch()
"""


def test_a_process_that_waits_for_its_loading_process_shows_both(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", STUCK.format(started=str(tmp_path / "started"))],
        cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout.strip()) == (0, "[True, True]"), done.stderr
    own, its_worker = done.stderr.split("its process ")
    assert "rank 3, process " in own
    assert "in wait_for_a_batch" in own
    assert "in look" in own  # all threads
    assert "in read_from_a_dead_disk" in its_worker
    assert "in read_from_a_dead_disk" not in own


def test_afterwards_the_signal_does_what_it_did():
    script = """
import os, signal
from ldm_train.stacks import answering_with_stacks
signal.signal(signal.SIGQUIT, signal.SIG_DFL)
with answering_with_stacks():
    os.kill(os.getpid(), signal.SIGQUIT)
print("alive", flush=True)
os.kill(os.getpid(), signal.SIGQUIT)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.returncode) == ("alive\n", -signal.SIGQUIT)
    assert "<module>" in done.stderr


def test_nobody_who_reads_them_is_no_error():
    script = """
import os
from ldm_train.stacks import say_stacks
os.close(2)
say_stacks("rank 0")
print("alive")
"""
    done = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=60)
    assert done.stdout == "alive\n"
