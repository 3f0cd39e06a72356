"""`hydra=slurm` asks for what the trainer's config says, and says so where that is not enough."""

import os
import pickle
from types import SimpleNamespace

import pytest
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationResolutionError

from hydra_plugins import ldm_train_slurm
from ldm_train.multirun import SweepResults
from ldm_train.submission import SWEPT_KEYS, Queue, gpus_per_node, tasks_per_node
from tests.conftest import composed

pytest.importorskip("submitit", reason='pip install "ldm-train[slurm]"')


def launcher(*overrides):
    cfg = composed("hydra=slurm", *overrides, return_hydra_config=True)
    return cfg, OmegaConf.to_container(cfg.hydra.launcher, resolve=True)


@pytest.mark.parametrize("experiment", ["ldm_512", "autoencoder_kl_f8"])
@pytest.mark.parametrize(("nodes", "devices"), [(1, 1), (3, 4)])
def test_a_job_has_a_process_and_a_gpu_for_each_device(experiment, nodes, devices):
    _, asked = launcher(f"experiment={experiment}", f"trainer.num_nodes={nodes}", f"trainer.devices={devices}")
    assert (asked["nodes"], asked["tasks_per_node"], asked["gpus_per_node"]) == (nodes, devices, devices)


def test_on_the_cpu_it_has_no_gpu():
    _, asked = launcher("experiment=demo", "trainer=slurm", "trainer.accelerator=cpu", "trainer.devices=2")
    assert (asked["tasks_per_node"], asked["gpus_per_node"]) == (2, None)


def test_a_site_may_ask_in_its_own_way():
    keys = ("hydra.launcher.gpus_per_node=null", "hydra.launcher.gres='gpu:a100:4'", "hydra.launcher.partition=long")
    _, asked = launcher("experiment=ldm_512", "trainer.devices=4", *keys)
    assert (asked["gpus_per_node"], asked["gres"], asked["partition"]) == (None, "gpu:a100:4", "long")


def test_its_trainer_knows_slurm_and_its_signal_leaves_the_time_that_saving_may_take():
    cfg, asked = launcher("experiment=ldm_512")
    assert cfg.hydra.runtime.choices.trainer == "slurm"
    assert asked["signal_delay_s"] == cfg.callbacks.preemption.grace_seconds
    assert asked["max_num_timeout"] > 0
    assert asked["timeout_min"] > 10  # for submitit, a signal in a shorter job is always a time limit


def test_a_number_of_devices_that_nobody_knows_yet_is_refused():
    with pytest.raises(InterpolationResolutionError, match=r"'auto'; allowed .* take `trainer=slurm`, and change") as e:
        launcher("experiment=ldm_512", "trainer=ddp")
    assert "`trainer.devices`" in str(e.value)


@pytest.mark.parametrize("devices", ["auto", 0, -1, [0, 1], True])
def test_what_is_no_number_of_devices_is_refused(devices):
    with pytest.raises(ValueError, match=r"change `trainer\.devices`"):
        tasks_per_node(devices)
    with pytest.raises(ValueError, match=r"change `trainer\.devices`"):
        gpus_per_node("auto", devices)


def test_a_trainer_that_knows_nothing_of_slurm_is_refused_before_anything_is_submitted(tmp_path, capsys):
    """The experiment chooses the CPU's trainer, and is composed after `hydra=slurm`."""
    cfg, _ = launcher("experiment=demo_autoencoder", f"paths.root={tmp_path}")
    with pytest.raises(SystemExit) as stop:
        SweepResults().on_multirun_start(cfg)
    assert stop.value.code == 2
    assert "trainer=cpu" in (said := capsys.readouterr().err)
    assert "change `trainer=slurm`" in said
    assert not list(tmp_path.iterdir())
    cfg, _ = launcher("experiment=demo_autoencoder", "trainer=slurm", f"paths.root={tmp_path}")
    SweepResults().on_multirun_start(cfg)
    assert list(tmp_path.rglob("plan.json"))


@pytest.fixture
def queue(tmp_path, monkeypatch):
    """Asks a queue, as `squeue` shows it at some second, for a job; looks each 15 s and waits for 30 s."""
    shown = tmp_path / "shown"
    (tmp_path / "squeue").write_text(f"#!/bin/sh\ncat {shown}\n")
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    asked = Queue()

    def ask(second, *lines, job="7_1"):
        monkeypatch.setattr("ldm_train.submission.time", SimpleNamespace(monotonic=lambda: float(second)))
        shown.unlink(missing_ok=True)
        if lines != ("the controller does not answer",):
            shown.write_text("".join(f"{line}\n" for line in lines))
        return asked.ending_of(job)

    return ask


@pytest.mark.parametrize("state", ["FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "CANCELLED", "TIMEOUT", "COMPLETED"])
def test_a_job_is_over_that_the_queue_calls_so_for_half_a_minute(queue, state):
    assert queue(0, "7_0 RUNNING", "7_1 RUNNING") is None
    assert [queue(second, "7_0 RUNNING", f"7_1 {state}") for second in (20, 36, 49)] == [None] * 3
    assert queue(52, "7_0 RUNNING", f"7_1 {state}") == state
    assert queue(52, job="7_0") is None


@pytest.mark.parametrize("state", ["PENDING", "REQUEUED", "REQUEUE_HOLD", "COMPLETING", "SUSPENDED", "SPECIAL_EXIT"])
def test_a_job_that_comes_back_or_is_held_is_not_over(queue, state):
    assert [queue(second, "7_1 FAILED") for second in (0, 16)] == [None] * 2
    assert [queue(second, f"7_1 {state}") for second in (32, 100, 200)] == [None] * 3
    assert [queue(second, "7_1 FAILED") for second in (300, 316)] == [None] * 2


def test_a_job_that_slurm_has_forgotten_is_over_if_it_has_known_it(queue):
    assert [queue(second) for second in (0, 50, 100)] == [None] * 3
    assert queue(120, "7_1 RUNNING") is None
    assert [queue(second) for second in (140, 160, 180)] == [None, None, "forgotten by SLURM"]


def test_a_controller_that_does_not_answer_ends_no_job(queue):
    assert queue(0, "7_1 RUNNING") is None
    assert [queue(second, "the controller does not answer") for second in (20, 100, 1000)] == [None] * 3


def test_what_was_seen_once_before_the_controller_fell_silent_ends_no_job(queue):
    """A node breaks, the controller is busy with it, and the job comes back."""
    assert queue(0, "7_1 NODE_FAIL") is None
    assert [queue(second, "the controller does not answer") for second in (16, 32, 75)] == [None] * 3
    assert queue(91, "7_1 PENDING") is None
    assert queue(107, "7_1 NODE_FAIL") is None
    assert queue(140, "7_1 NODE_FAIL") == "NODE_FAIL"


def test_a_job_that_dies_has_its_row_while_one_before_it_goes_on(monkeypatch):
    from submitit.core.utils import UncompletedJobError

    told = []

    class Long:
        job_id, asked = "7_0", 0

        def done(self):
            self.asked += 1
            assert self.asked < 100
            return bool(told)

        def results(self):
            return ["its figure"]

    class Dead:
        job_id, state, paths = "7_1", "FAILED", SimpleNamespace(stdout="7_1.out")

        def done(self):
            return True

        def results(self):
            raise UncompletedJobError("no result")

    def return_of_dead(self, overrides, number, job_id, ending):
        told.append((overrides, number, job_id, ending))
        return "a failure"

    executor = SimpleNamespace(map_array=lambda *_: [Long(), Dead()])
    monkeypatch.setattr(ldm_train_slurm.SlurmLauncher, "_executor", lambda self: executor)
    monkeypatch.setattr(ldm_train_slurm.SlurmLauncher, "_return_of_dead", return_of_dead)
    monkeypatch.setattr(ldm_train_slurm, "time", SimpleNamespace(sleep=lambda seconds: None))
    launcher = ldm_train_slurm.SlurmLauncher.__new__(ldm_train_slurm.SlurmLauncher)
    assert launcher.launch([["seed=0"], ["seed=1"]], 4) == ["its figure", "a failure"]
    assert told == [(["seed=1"], 5, "7_1", "job 7_1 ended without a result as FAILED; see 7_1.out")]


def test_a_job_knows_what_its_sweep_varies_though_the_site_keeps_the_environment_from_it(monkeypatch):
    """Pickled on the login node, called on another one; the names of runs are made of it."""
    monkeypatch.setenv(SWEPT_KEYS, "of this process")  # and its end gives back what is set
    (launcher_of_hydra,) = ldm_train_slurm.SlurmLauncher.__bases__
    monkeypatch.setattr(
        launcher_of_hydra, "__call__", lambda self, *arguments: (os.environ[SWEPT_KEYS], arguments), raising=False
    )
    job = ldm_train_slurm.SlurmLauncher()
    job._swept = "optimizer.lr"
    assert pickle.loads(pickle.dumps(job))(["seed=1"], 3) == ("optimizer.lr", (["seed=1"], 3))
