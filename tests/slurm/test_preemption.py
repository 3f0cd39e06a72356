"""Jobs of two nodes that lose their place: each ends with the bits of a job that kept it.

Set `LDM_PREEMPTIONS=20` for more of them than the few of the default. Ranks are skewed and have loading processes; a
signal comes in training, in a validation, or while images are generated to judge the model, by `scancel` or because an
urgent job takes the nodes.
"""

import itertools
import os
import re
import sys
import time
from pathlib import Path

import pytest

from ldm_train.train import train
from tests.conftest import composed, small_demo
from tests.test_end_to_end import equal, last, metrics
from tests.test_interruptions import PARTS
from tests.wandb_record import history

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.distributed]

ROOT = Path(__file__).parents[2]
STEPS = 12
RUN = [
    *small_demo(STEPS), "trainer.val_check_interval=5", "trainer.limit_val_batches=1.0", "data.val_fraction=0.3",
    "callbacks.checkpoint.every_n_steps=100", "callbacks.progress.every_n_steps=1",
    "callbacks.samples.num_images=40", "callbacks.samples.num_pairs=4", "callbacks.samples.num_real=8",
    "callbacks.samples.batch_size=2", "callbacks.samples.every_n_steps=8",
]  # fmt: skip
TWO_NODES = ["data.batch_size=2", "data.val_batch_size=1", "data.num_workers=1", "trainer.accelerator=cpu",
             "+callbacks.pace._target_=tests.slurm.pace.Pace", "+callbacks.pace.seconds=0.15",
             "trainer.strategy.timeout.seconds=150"]  # fmt: skip
PLACES = {"training": f"step 2/{STEPS}", "validation": "rank 0 validates step 5", "generation": f"step 8/{STEPS}"}
HOWS = ("USR1", "urgent", "TERM")


class Jobs:
    """Submits `slurm/train.sbatch` and takes its place away."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder

    def submit(self, run_id, *overrides, time="60", signal="USR1@120", shared=False, output=None, wandb="disabled"):
        path = f"{Path(sys.executable).parent}:{self.cluster.environment['PATH']}"
        variables = {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": wandb}
        options = ["--nodes=2", "--ntasks-per-node=1", f"--output={self.output(output or run_id)}"]
        options += [] if shared else ["--exclusive"]
        options += [f"--time={time}", f"--signal={signal}"]
        overrides = [*RUN, *TWO_NODES, f"run_id={run_id}", f"paths.root={self.folder}", *overrides]
        return self.cluster.submit(
            f"--chdir={ROOT}", *options, ROOT / "slurm" / "train.sbatch", *overrides, **variables
        )

    def output(self, run_id):
        return self.folder / f"{run_id}.txt"

    def preempt(self, job, how):
        """By a signal, or by a job that needs both nodes."""
        if how != "urgent":
            self.cluster.run("scancel", f"--signal={how}", job)
            return
        urgent = self.cluster.submit(
            "--partition=urgent", "--nodes=2", "--exclusive", "--output=/dev/null", "--wrap=sleep 1"
        )
        assert self.cluster.wait(urgent, 120)["JobState"] == "COMPLETED"

    def wait_for_restart(self, job, restarts):
        deadline = time.monotonic() + 120
        while int(self.cluster.facts(job)["Restarts"]) < restarts:
            assert time.monotonic() < deadline, self.cluster.facts(job)
            time.sleep(0.2)

    def finish(self, job, run_id):
        facts = self.cluster.wait(job, 300)
        assert facts["JobState"] == "COMPLETED", self.output(run_id).read_text()[-4000:]
        return facts


@pytest.fixture(scope="module")
def jobs(cluster, tmp_path_factory):
    return Jobs(cluster, tmp_path_factory.mktemp("jobs"))


@pytest.fixture(scope="module")
def unbroken(jobs):
    """The folder of runs, which holds one that kept its place."""
    jobs.finish(jobs.submit("unbroken"), "unbroken")
    return jobs.folder / "debug" if (jobs.folder / "debug").exists() else jobs.folder


@pytest.mark.thorough
def test_two_nodes_have_the_losses_of_one_process_with_the_same_global_batch(unbroken, tmp_path):
    train(composed(*RUN, "data.batch_size=4", "data.val_batch_size=2", "run_id=one", root=tmp_path))
    one, two = metrics(tmp_path / "demo/one")["train/loss"], metrics(unbroken / "demo/unbroken")["train/loss"]
    assert one.keys() == two.keys()
    assert len(one) == STEPS
    assert all(one[step] == pytest.approx(two[step], rel=1e-4) for step in one)


def test_whatever_takes_its_place_a_job_ends_with_the_bits_of_one_that_kept_it(jobs, unbroken):
    count = int(os.environ.get("LDM_PREEMPTIONS", "2"))
    # Neighbours differ in both, and all nine pairs come up in turn.
    ways = [(place, HOWS[(i + j) % 3]) for j in range(3) for i, place in enumerate(PLACES)]
    for number, batch in enumerate(_in_threes(itertools.islice(itertools.cycle(ways), count))):
        _one_run(jobs, unbroken, f"broken{number}", batch)


def _in_threes(ways):
    return iter(lambda: list(itertools.islice(ways, 3)), [])


def _one_run(jobs, unbroken, run_id, ways):
    job = jobs.submit(run_id)
    for restarts, (place, how) in enumerate(ways, start=1):
        jobs.cluster.wait_for_text(job, jobs.output(run_id), PLACES[place])
        began = time.monotonic()
        jobs.preempt(job, how)
        jobs.wait_for_restart(job, restarts)
        print(f"{run_id}: {how} in {place}, requeued after {time.monotonic() - began:.1f} s", flush=True)
    facts = jobs.finish(job, run_id)
    said = jobs.output(run_id).read_text()
    assert int(facts["Restarts"]) == len(ways), said[max(0, said.find("nothing has moved")) :][:20000]
    _assert_same_end(unbroken, run_id)
    # On a busy machine a start may leave at the step from which it went on: it has nothing to save.
    steps = re.findall(r"leaving at step (\d+)", said)
    assert len(steps) == len(ways)
    assert last(unbroken, run_id=run_id)["provenance"]["restarts"] == len(set(steps))


@pytest.mark.thorough
def test_signals_that_end_wandb_s_process_too_cost_a_run_none_of_its_steps(jobs, unbroken, monkeypatch):
    """With the default logger, whose process belongs to the job's step: it dies of SIGTERM and is deaf to SIGUSR1."""
    job = jobs.submit("recorded", "logger=default", "callbacks.pace.seconds=0.3", wandb="offline")
    for restarts, (place, how) in enumerate(((f"step 4/{STEPS}", "TERM"), (PLACES["generation"], "urgent")), start=1):
        jobs.cluster.wait_for_text(job, jobs.output("recorded"), place)
        jobs.preempt(job, how)
        jobs.wait_for_restart(job, restarts)
    assert jobs.finish(job, "recorded")["Restarts"] == "2"
    _assert_same_end(unbroken, "recorded")
    said = jobs.output("recorded").read_text()
    assert "W&B is lost" in said
    assert "Traceback" not in said
    logged = metrics(unbroken / "demo/recorded")["train/loss"]
    first, second, third = (list(steps) for steps in _recorded(unbroken / "demo/recorded", logged, monkeypatch))
    assert first[:1] == [min(logged)]
    assert [*second, *third] == list(range(second[0], STEPS))


def _recorded(run_dir, logged, monkeypatch):
    """The steps in W&B's record of each start, as the tool that sends them finds it."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    from sync_wandb import find_runs

    (run,) = find_runs([run_dir])
    for segment in run.segments:
        losses = {r["trainer/global_step"]: r["train/loss"] for r in history(segment.file) if "train/loss" in r}
        assert losses == pytest.approx({step: logged[step] for step in losses})
        yield losses


def _assert_same_end(unbroken, run_id):
    expected, found = last(unbroken, run_id="unbroken"), last(unbroken, run_id=run_id)
    for part in PARTS:
        assert equal(found[part], expected[part]), (run_id, part)
    of_unbroken, of_broken = (metrics(unbroken / "demo" / name) for name in ("unbroken", run_id))
    for key in ("train/loss", "val/loss", "val/fid_randomconv"):
        assert of_broken[key] == of_unbroken[key], (run_id, key)


@pytest.mark.thorough
def test_a_job_that_is_cancelled_saves_and_does_not_come_back(jobs):
    job = jobs.submit("cancelled")
    jobs.cluster.wait_for_text(job, jobs.output("cancelled"), PLACES["training"])
    jobs.cluster.run("scancel", job)
    facts = jobs.cluster.wait(job, 60)
    assert (facts["JobState"], facts["Restarts"]) == ("CANCELLED", "0")
    assert last(jobs.folder, run_id="cancelled")["global_step"] >= 2


@pytest.mark.thorough
def test_of_two_jobs_with_one_run_id_the_second_is_refused(jobs):
    """Both fit on the nodes: each takes a part of their CPUs."""
    first = jobs.submit("twice", "callbacks.pace.seconds=4", shared=True)
    jobs.cluster.wait_for_text(first, jobs.output("twice"), f"step 1/{STEPS}")
    second = jobs.submit("twice", shared=True, output="second")
    assert jobs.cluster.wait(second, 120)["JobState"] == "FAILED"
    said = jobs.output("second").read_text()
    assert f"job {first}; allowed is one run at a time in a directory" in said
    assert "change `run_id`" in said
    jobs.cluster.run("scancel", first)
    jobs.cluster.wait(first, 120)


@pytest.mark.thorough
@pytest.mark.skipif(int(os.environ.get("LDM_PREEMPTIONS", "0")) < 20, reason="takes eight minutes: LDM_PREEMPTIONS=20")
def test_a_job_whose_time_is_up_goes_on_in_another_one(jobs, unbroken):
    """SLURM may be a minute early, so nothing shorter than two minutes lets a training begin."""
    job = jobs.submit("timed", "callbacks.pace.seconds=3", time="2", signal="USR1@30")
    facts = jobs.cluster.wait(job, 600)
    assert facts["JobState"] == "COMPLETED", jobs.output("timed").read_text()[-4000:]
    assert int(facts["Restarts"]) >= 1
    _assert_same_end(unbroken, "timed")
