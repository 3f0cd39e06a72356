"""Three routes to two nodes, one result; what happens to a submitted job reaches the command that submitted it."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest

from ldm_train.train import train
from tests.conftest import composed, small_demo
from tests.slurm.test_preemption import Jobs
from tests.test_end_to_end import equal, last, metrics
from tests.test_interruptions import PARTS

pytestmark = [pytest.mark.slurm, pytest.mark.slow, pytest.mark.distributed, pytest.mark.thorough]

ROOT = Path(__file__).parents[2]
STEPS = 12
RUN = [
    *small_demo(STEPS), "callbacks.samples=null", "trainer.val_check_interval=5", "data.val_fraction=0.1",
    "callbacks.checkpoint.every_n_steps=2", "callbacks.progress.every_n_steps=1",
]  # fmt: skip
TWO_NODES = ["trainer=slurm", "trainer.num_nodes=2", "trainer.accelerator=cpu", "data.batch_size=2",
             "data.val_batch_size=1"]  # fmt: skip
PACE = ["+callbacks.pace._target_=tests.slurm.pace.Pace", "+callbacks.pace.seconds=0.2"]


def trouble(kind, marker=None, rank=1):
    """Of one rank, after three steps."""
    overrides = [f"_target_=tests.slurm.trouble.{kind}", f"rank={rank}", "step=3"]
    overrides += [] if marker is None else [f"marker={marker}"]
    return [f"+callbacks.trouble.{override}" for override in overrides]


class Commands:
    """`python -m ldm_train` on the cluster's login node."""

    def __init__(self, cluster, folder):
        self.cluster, self.folder = cluster, folder
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled", "LDM_RUNS": str(folder)}
        self.environment = cluster.environment | own
        self.words = [sys.executable, "-m", "ldm_train"]

    def start(self, run_id, *overrides, before=()):
        words = [*before, *self.words, *overrides, *RUN, *TWO_NODES, f"run_id={run_id}"]
        with self.output(run_id).open("w") as output:
            return subprocess.Popen(words, env=self.environment, cwd=ROOT, stdout=output, stderr=output)

    def submit(self, run_id, *overrides):
        return self.start(run_id, "-m", "hydra=slurm", *overrides)

    def output(self, run_id):
        return self.folder / f"{run_id}.txt"

    def said(self, run_id):
        return self.output(run_id).read_text()

    def job(self):
        """The id of the job that was submitted last."""
        ids = self.cluster.run("squeue", "--noheader", "--states=all", "--format=%i").split()
        return max(ids, key=lambda each: int(each.split("_")[0]))

    def log(self, job, rank=0):
        return self.folder / f"debug/.submitit/{job}/{job}_{rank}_log.out"


@pytest.fixture(scope="module")
def commands(cluster, tmp_path_factory):
    return Commands(cluster, tmp_path_factory.mktemp("submitted"))


@pytest.fixture(scope="module")
def runs(commands):
    return commands.folder / "debug"


@pytest.fixture(scope="module")
def unbroken(commands, runs):
    """A run by `srun` alone, that nobody disturbs."""
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "--kill-on-bad-exit=1"]
    assert commands.start("srun", before=srun).wait(200) == 0, commands.said("srun")
    return runs


def assert_same_end(runs, run_id):
    expected, found = last(runs, run_id="srun"), last(runs, run_id=run_id)
    for part in PARTS:
        assert equal(found[part], expected[part]), (run_id, part)
    assert metrics(runs / "demo" / run_id)["train/loss"] == metrics(runs / "demo/srun")["train/loss"]


def test_by_srun_two_nodes_have_the_losses_of_one_process_with_the_same_global_batch(unbroken, tmp_path):
    train(composed(*RUN, "data.batch_size=4", "data.val_batch_size=2", "run_id=one", root=tmp_path))
    one, two = metrics(tmp_path / "demo/one")["train/loss"], metrics(unbroken / "demo/srun")["train/loss"]
    assert one.keys() == two.keys()
    assert all(one[step] == pytest.approx(two[step], rel=1e-4) for step in one)
    assert last(unbroken, run_id="srun")["provenance"]["world_size"] == 2


def test_a_submitted_job_that_loses_its_nodes_ends_with_the_bits_of_one_by_srun_and_its_figure_returns(
    commands, unbroken
):
    process = commands.submit("preempted", *PACE)
    commands.cluster._await(lambda: list(unbroken.glob(".submitit/*/*_0_log.out")), 60, "the job starts")
    job = commands.job()
    commands.cluster.wait_for_text(job, commands.log(job), f"step 3/{STEPS}")
    Jobs(commands.cluster, commands.folder).preempt(job, "urgent")
    assert process.wait(200) == 0, commands.said("preempted")
    assert commands.cluster.facts(job)["Restarts"] == "1"
    said = commands.log(job).read_text()
    left = int(said.split("SIGUSR2: leaving at step ")[1].split(",")[0])
    assert f"Resuming from step {left} of " in said
    assert_same_end(unbroken, "preempted")
    state, result = pickle.loads((commands.log(job).parent / f"{job}_0_result.pkl").read_bytes())
    figures = metrics(unbroken / "demo/preempted")["val/loss"]
    assert (state, result.return_value) == ("success", pytest.approx(figures[max(figures)], rel=1e-5))


def test_what_a_submitted_job_raises_is_raised_by_the_command(commands):
    assert commands.submit("raises", *trouble("Raises", rank=0)).wait(200) == 1
    assert "ValueError: a made-up mistake" in commands.said("raises")


def test_a_submitted_job_that_dies_is_told_by_the_command(commands):
    """Without the script that would start it again."""
    assert commands.submit("dies", *trouble("Dies"), "hydra.launcher.setup=['export SLURM_KILL_BAD_EXIT=1']").wait(300)
    assert "died: rank 1 does not answer" in commands.said("dies")
    job = commands.job()
    assert "rank 1 does not answer" in commands.log(job).read_text()


def by_sbatch(commands, output, *overrides):
    """The id of a job of two nodes."""
    variables = {key: commands.environment[key] for key in ("PYTHONPATH", "OMP_NUM_THREADS", "WANDB_MODE", "LDM_RUNS")}
    path = f"{Path(sys.executable).parent}{os.pathsep}{commands.environment['PATH']}"
    return commands.cluster.submit(
        "--nodes=2", "--ntasks-per-node=1", f"--chdir={ROOT}", f"--output={output}", ROOT / "slurm/train.sbatch",
        *RUN, *TWO_NODES, *overrides, PATH=path, **variables,
    )  # fmt: skip


def test_a_job_whose_process_is_killed_ends_names_it_and_goes_on_from_its_last_save(commands, unbroken, tmp_path):
    output = tmp_path / "output"
    job = by_sbatch(commands, output, *trouble("Dies", tmp_path / "marker"), "run_id=killed")
    # SLURM 22.05 repeats its signal to the old step after 70 s. A cluster has a requeued job wait for two minutes, and
    # it meets nobody; here it would meet the next start.
    commands.cluster._await(lambda: commands.cluster.facts(job)["Restarts"] == "1", 200, "the job is requeued", job)
    commands.cluster.run("scontrol", "update", f"JobId={job}", "StartTime=now+80")
    facts = commands.cluster.wait(job, 300)
    said = output.read_text()
    assert (facts["JobState"], facts["Restarts"]) == ("COMPLETED", "1"), said[-3000:]
    assert "rank 1 does not answer" in said
    assert "a process died with status 137 (a start from step 0)" in said
    assert "Resuming from step 2 of " in said
    assert_same_end(unbroken, "killed")


def test_a_job_that_waits_in_vain_for_a_rank_that_lives_has_another_start(commands, tmp_path):
    """By gloo's time-out, which ends a process by an error and not by a signal."""
    output = tmp_path / "output"
    words = ["run_id=hangs", "trainer.strategy.timeout.seconds=12"]
    job = by_sbatch(commands, output, *trouble("Hangs", tmp_path / "marker"), *words)
    commands.cluster._await((tmp_path / "marker").exists, 100, "it hangs", job)
    commands.cluster.run("scancel", "--signal=QUIT", job)
    commands.cluster.wait_for_text(job, output, "in happen", timeout=5)  # it shows where it is, and goes on
    commands.cluster._await(lambda: commands.cluster.facts(job)["Restarts"] == "1", 200, "the job is requeued", job)
    commands.cluster.run("scancel", job)
    said = output.read_text()
    assert said.index("nothing has moved for") < said.index("rank 1, process ") < said.rindex("in happen")
    assert "Timed out waiting" in said
    assert "rank 1 does not answer" not in said
    assert "its processes have lost each other (a start from step 0); the job goes into the queue again" in said


def test_ranks_of_different_configs_are_refused_before_the_first_step(commands, runs):
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", "bash", "-c", 'exec "$@" seed=$SLURM_PROCID', "task"]
    assert commands.start("unlike", before=srun).wait(200) == 2
    assert commands.said("unlike").count("`seed` is 0 on rank 0, 1 on rank 1") == 2
    assert not (runs / "demo/unlike/checkpoints").exists()
