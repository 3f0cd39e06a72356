"""SIGKILL at random moments of real runs: the same command again ends with the same bits.

The moments are uniform over the life of an unbroken run, so they fall into start-up, steps, checkpoints being written,
validation and the closing work alike. Life is measured in CPU time, or a busy machine would bend it. A run that ends
before its moment is compared and a new one begins. Set `LDM_KILLS=30` for more kills than the few of the default.
"""

import os
import random
import signal
import time

import pytest

from .conftest import small_demo
from .test_end_to_end import equal, last, metrics

STEPS = 20
RUN = [
    *small_demo(STEPS), "callbacks.samples=null", "trainer.val_check_interval=7", "data.val_fraction=0.1",
    "callbacks.checkpoint.every_n_steps=3",
]  # fmt: skip
RUNS = {
    1: [*RUN, "data.batch_size=4", "data.num_workers=1", "data.cache_decoded=false"],
    2: [*RUN, "data.batch_size=2", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
}
PARTS = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "ImageTextDataModule", "global_step", "epoch")


def killed_at(moment, runs, *arguments, **places):
    """Whether a run was killed when it had used `moment` seconds of CPU time; else it ended by itself."""
    runs.start(*arguments, **places)
    while (used := runs.cpu_seconds()) < moment and runs.is_running:
        time.sleep(0.01)
    if used >= moment:
        runs.kill()
    codes, _ = runs.wait()
    if -signal.SIGKILL in codes:  # of a rank; others may have ended just before
        return True
    assert not any(codes), runs.said()[-3000:]
    return False


def phase(runs, root, run_id):
    """What the last run was doing when it was killed, by what it had said, and the step it can go on from."""
    output = runs.said()
    name = "training" if "run directory" in output else "starting"
    name = "closing" if "`Trainer.fit` stopped" in output else name
    exists = (root / "demo" / run_id / "checkpoints/last.ckpt").exists()
    return f"{name}, step {last(root, run_id=run_id)['global_step'] if exists else 0} is saved"


def assert_same_end(root, run_id):
    unbroken, broken = last(root, run_id="unbroken"), last(root, run_id=run_id)
    for part in PARTS:
        assert equal(broken[part], unbroken[part]), (run_id, part)
    expected, found = (metrics(root / "demo" / name) for name in ("unbroken", run_id))
    for key in ("train/loss", "val/loss"):
        assert found[key] == expected[key], (run_id, key)


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.distributed)])
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_an_unbroken_one(ranks, kills, forked_runs, tmp_path):
    kills = int(os.environ.get("LDM_KILLS", kills))
    place = {"root": tmp_path, "ranks": ranks}
    forked_runs.start(*RUNS[ranks], "run_id=unbroken", **place)
    codes, life = forked_runs.wait()
    assert not any(codes), forked_runs.said()[-3000:]
    moments, number = random.Random(ranks), 0
    print(f"\nunbroken: {life:.1f} s of CPU time")
    while kills:
        moment, run_id = moments.uniform(0, life), f"killed{number}"
        if killed_at(moment, forked_runs, *RUNS[ranks], f"run_id={run_id}", **place):
            kills -= 1
            now = time.strftime("%H:%M:%S")
            print(f"{now} {run_id}: at {moment:.1f} s: {phase(forked_runs, tmp_path, run_id)}", flush=True)
        else:
            print(f"{time.strftime('%H:%M:%S')} {run_id}: ended by itself", flush=True)
            assert_same_end(tmp_path, run_id)
            number += 1
    forked_runs.finish(*RUNS[ranks], f"run_id=killed{number}", **place)
    assert_same_end(tmp_path, f"killed{number}")
