"""SIGKILL at random moments of real runs: the same command again ends with the same bits.

The moments are uniform over the life of an unbroken run, so they fall into start-up, steps, checkpoints being written,
validation and the closing work alike. Life is measured in CPU time, or a busy machine would bend it. A run that ends
before its moment is compared and a new one begins. Set `LDM_KILLS=30` for more kills than the few of the default.
"""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .test_end_to_end import equal, last, metrics

STEPS = 20
RUN = [
    "experiment=demo", "debug=tiny", "logger=csv", "stage.autoencoder.checkpoint=untrained", "callbacks.samples=null",
    "sampler.num_steps=2", f"trainer.max_steps={STEPS}", f"lr_scheduler.total_steps={STEPS}",
    "trainer.val_check_interval=7", "callbacks.checkpoint.every_n_steps=3", "data.limit=50", "data.val_fraction=0.1",
    "unet.channels=32", "conditioner.context_dim=64", "autoencoder.channels=16",
]  # fmt: skip
RUNS = {
    1: [*RUN, "data.batch_size=4", "data.num_workers=1", "data.cache_decoded=false"],
    2: [*RUN, "data.batch_size=2", "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu"],
}
PARTS = ("state_dict", "ema", "optimizer_states", "lr_schedulers", "ImageTextDataModule", "global_step", "epoch")


class Runs:
    """Starts runs of some ranks and kills them when they have used some CPU time."""

    def __init__(self, ranks, folder):
        self.ranks, self.folder = ranks, folder
        own = {key: value for key, value in os.environ.items() if "WANDB" not in key}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_runs"],
            env=own | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, run_id, moment=float("inf")):
        """Seconds of CPU time of a run that ended, or None if it was killed at `moment`."""
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        ranks = [
            {
                "overrides": [*RUNS[self.ranks], f"run_id={run_id}", f"paths.root={self.folder}"],
                "environment": self._environment(rank, port),
                "output": str(self.folder / f"output{rank}.txt"),
            }
            for rank in range(self.ranks)
        ]
        print(json.dumps(ranks), file=self.server.stdin, flush=True)
        pids = json.loads(self.server.stdout.readline())
        while (used := sum(map(cpu_seconds, pids))) < moment and not all(map(has_ended, pids)):
            time.sleep(0.01)
        if used >= moment:
            for pid in pids:  # all ranks and their workers, as when a node goes down
                os.killpg(pid, signal.SIGKILL)
        codes, seconds = zip(*json.loads(self.server.stdout.readline()), strict=True)
        if all(code == -signal.SIGKILL for code in codes):
            return None
        assert not any(codes), self.said(0)[-3000:]
        return sum(seconds)

    def _environment(self, rank, port):
        if self.ranks == 1:
            return {}
        place = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": self.ranks}
        place |= {"LOCAL_WORLD_SIZE": self.ranks, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
        return {key: str(value) for key, value in place.items()} | {"TORCHELASTIC_RUN_ID": "test"}

    def said(self, rank):
        """What the last run printed."""
        return (self.folder / f"output{rank}.txt").read_text()

    def phase(self, run_id):
        """What the last run was doing when it was killed, by what it had said, and the step it can go on from."""
        output = self.said(0)
        phase = "training" if "run directory" in output else "starting"
        phase = "closing" if "`Trainer.fit` stopped" in output else phase
        exists = (self.folder / "demo" / run_id / "checkpoints/last.ckpt").exists()
        return f"{phase}, step {last(self.folder, run_id=run_id)['global_step'] if exists else 0} is saved"

    def close(self):
        self.server.stdin.close()
        self.server.wait(60)


def stat(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def has_ended(pid):
    fields = stat(pid)
    return fields is None or fields[0] == "Z"


def cpu_seconds(pid):
    """CPU time of a process and those of its children that have ended."""
    fields = stat(pid)
    return 0.0 if fields is None else sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def assert_same_end(root, run_id):
    unbroken, broken = last(root, run_id="unbroken"), last(root, run_id=run_id)
    for part in PARTS:
        assert equal(broken[part], unbroken[part]), (run_id, part)
    expected, found = (metrics(root / "demo" / name)["train/loss"] for name in ("unbroken", run_id))
    assert all(expected[step] == loss for step, loss in found.items()), run_id


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kills"), [(1, 2), pytest.param(2, 1, marks=pytest.mark.distributed)])
def test_killed_at_random_moments_a_run_ends_with_the_bits_of_an_unbroken_one(ranks, kills, tmp_path):
    kills = int(os.environ.get("LDM_KILLS", kills))
    runs = Runs(ranks, tmp_path)
    try:
        life = runs.run("unbroken")
        moments, number = random.Random(ranks), 0
        print(f"\nunbroken: {life:.1f} s of CPU time")
        while kills:
            moment, run_id = moments.uniform(0, life), f"killed{number}"
            if runs.run(run_id, moment) is None:
                kills -= 1
                print(f"{time.strftime('%H:%M:%S')} {run_id}: at {moment:.1f} s: {runs.phase(run_id)}", flush=True)
            else:
                print(f"{time.strftime('%H:%M:%S')} {run_id}: ended by itself", flush=True)
                assert_same_end(tmp_path, run_id)
                number += 1
        runs.run(f"killed{number}")
        assert_same_end(tmp_path, f"killed{number}")
    finally:
        runs.close()
