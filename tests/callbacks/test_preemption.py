"""A signal at any moment of a run: the same command again ends with the same bits, and nothing is left out."""

import os
import signal
import time
from pathlib import Path

import lightning as L
import pytest
from torch.utils.data import DataLoader

from ldm_train.callbacks import CheckpointWriter, MetricsCSV, Preempted, Preemption, SampleEvaluation
from ldm_train.callbacks.preemption import SIGNALS, interruptible, listening
from ldm_train.callbacks.requeue import gets_further, tell_of_lost
from ldm_train.checkpoint import read_checkpoint
from tests.callbacks.toy import NUM_IMAGES, ToyData, ToyStage, batch_of, trainer_of
from tests.test_end_to_end import last, metrics
from tests.wandb_record import history, record_files


class SameBatches(ToyData):
    """Six equal batches: where a run goes on in the data is tested with the real data module."""

    def train_dataloader(self):
        return DataLoader(range(NUM_IMAGES), batch_size=4, collate_fn=lambda _: batch_of(range(4)))


class Sender(L.Callback):
    """Sends this process a signal at a hook, once, at its `count`th call."""

    def __init__(self, hook, count=1, number=signal.SIGUSR1):
        self.calls = 0
        self.hook, self.count, self.number = hook, count, number
        setattr(self, hook, self._send)

    def _send(self, *_, **__):
        self.calls += 1
        if self.calls == self.count:
            os.kill(os.getpid(), self.number)


def fit(tmp_path, *callbacks, requeue=False, **options):
    """One start of a run in `tmp_path`; it goes on from what the last one saved."""
    writer, stage = CheckpointWriter(str(tmp_path), every_n_steps=100), ToyStage()
    preemption = Preemption(requeue=requeue)
    defaults = {"max_steps": 12, "val_check_interval": 4, "enable_checkpointing": True, "log_every_n_steps": 1}
    defaults["logger"] = MetricsCSV(str(tmp_path))
    trainer = trainer_of(tmp_path, [preemption, *callbacks, writer], **defaults | options)
    path = tmp_path / "last.ckpt"
    with listening(trainer):
        trainer.fit(stage, SameBatches(), ckpt_path=path if path.exists() else None, weights_only=True)
    return trainer, stage


class Validations(L.Callback):
    """The step of each validation that came to its end."""

    def __init__(self, steps):
        self.steps = steps

    def on_validation_end(self, trainer, *_):
        self.steps.append(trainer.global_step)


PLACES = [("on_train_start", 1), ("on_train_batch_end", 1), ("on_train_batch_end", 3), ("on_train_batch_end", 4),
          ("on_train_batch_start", 5), ("on_validation_start", 1), ("on_validation_batch_end", 2),
          ("on_validation_batch_end", 6), ("on_validation_end", 1), ("on_train_batch_end", 11)]  # fmt: skip


@pytest.mark.parametrize(("hook", "count"), PLACES)
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_run_that_is_told_to_go_ends_with_the_bits_and_validations_of_an_unbroken_one(tmp_path, hook, count, number):
    expected, steps = [], []
    fit(tmp_path / "unbroken", Validations(expected))
    with pytest.raises(Preempted) as stop:
        fit(tmp_path / "broken", Sender(hook, count, number), Validations(steps))
    assert stop.value.code == 128 + number
    fit(tmp_path / "broken", Validations(steps))
    assert expected == steps == [4, 8, 12]
    assert metrics(tmp_path / "broken") == metrics(tmp_path / "unbroken")
    unbroken, broken = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("unbroken", "broken"))
    for part in ("global_step", "epoch", "lr_schedulers"):
        assert unbroken[part] == broken[part]
    assert unbroken["state_dict"]["colours.weight"].equal(broken["state_dict"]["colours.weight"])
    stepped = [c["loops"]["fit_loop"]["epoch_loop.state_dict"] for c in (unbroken, broken)]
    assert stepped[0] == stepped[1]  # the step that loggers are told


def test_no_step_is_lost(tmp_path):
    with pytest.raises(Preempted):
        fit(tmp_path, Sender("on_validation_batch_end", 2))
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 4


def test_validation_at_the_end_of_an_epoch_is_repeated_too(tmp_path):
    expected, steps = [], []
    fit(tmp_path / "unbroken", Validations(expected), limit_train_batches=4)
    with pytest.raises(Preempted):
        fit(tmp_path / "broken", Sender("on_validation_batch_end", 2), Validations(steps), limit_train_batches=4)
    fit(tmp_path / "broken", Validations(steps), limit_train_batches=4)
    assert expected == steps
    unbroken, broken = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("unbroken", "broken"))
    assert unbroken["epoch"] == broken["epoch"]
    assert (
        unbroken["loops"]["fit_loop"]["epoch_loop.state_dict"] == broken["loops"]["fit_loop"]["epoch_loop.state_dict"]
    )


def test_gradients_that_are_only_accumulated_are_not_lost(tmp_path):
    with pytest.raises(Preempted):
        fit(tmp_path / "broken", Sender("on_train_batch_end", 1), accumulate_grad_batches=3)
    assert read_checkpoint(tmp_path / "broken" / "last.ckpt")["global_step"] == 1
    fit(tmp_path / "broken", accumulate_grad_batches=3)
    fit(tmp_path / "unbroken", accumulate_grad_batches=3)
    unbroken, broken = (read_checkpoint(tmp_path / name / "last.ckpt") for name in ("unbroken", "broken"))
    assert unbroken["state_dict"]["colours.weight"].equal(broken["state_dict"]["colours.weight"])


def test_a_validation_in_the_midst_of_an_accumulation_is_finished(tmp_path):
    steps = []
    with pytest.raises(Preempted):
        fit(tmp_path, Sender("on_validation_start"), Validations(steps), accumulate_grad_batches=3)
    assert steps == [1]  # 4 batches are one step and a third
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 2


@pytest.mark.slow
def test_wandb_s_process_may_be_killed_before_the_run_is_told_to_go(tmp_path, forked_runs):
    """SLURM sends SIGTERM to every process of a job, and that one ends at once; what is older is in its record."""
    forked_runs.start(
        "experiment=demo_autoencoder", "debug=tiny", "trainer=cpu", "trainer.max_steps=100000", "run_id=told",
        "trainer.val_check_interval=100000", "callbacks.progress.every_n_steps=10", "trainer.log_every_n_steps=1",
        root=tmp_path,
    )  # fmt: skip
    _until(forked_runs.outputs[0].exists)
    _until(lambda: "step 10/" in forked_runs.said())
    (run,) = forked_runs.pids
    (service,) = [pid for pid in _children(run) if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text()]
    run_dir = tmp_path / "demo_autoencoder/told"
    logged = metrics(run_dir)["train/loss"]
    time.sleep(2)
    os.kill(service, signal.SIGTERM)
    _until(lambda: "W&B is lost" in forked_runs.said())
    os.kill(run, signal.SIGTERM)
    codes, _ = forked_runs.wait()
    assert codes == [128 + signal.SIGTERM], forked_runs.said()[-3000:]
    saved = last(tmp_path, "demo_autoencoder", "told")["global_step"]
    assert len(metrics(run_dir)["train/loss"]) == saved
    (record,) = record_files(run_dir, timeout=0)
    recorded = {row["trainer/global_step"]: row["train/loss"] for row in history(record) if "train/loss" in row}
    assert recorded == pytest.approx(recorded | logged)


def _until(condition):
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def _children(pid):
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_the_handlers_of_before_are_back_afterwards(tmp_path):
    before = [signal.getsignal(number) for number in SIGNALS]
    seen = []

    class Look(L.Callback):
        def on_train_batch_start(self, *_):
            seen.append([getattr(signal.getsignal(number), "__name__", None) for number in SIGNALS])

    fit(tmp_path, Look())
    assert seen[0] == ["remember"] * 3  # Lightning has not put its own in their place
    with pytest.raises(Preempted):
        fit(tmp_path / "broken", Sender("on_train_batch_end"))
    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_the_launcher_s_handler_is_called_when_all_is_saved(tmp_path, monkeypatch, number):
    """As submitit does it: its handler of USR2 requeues and exits, the one of SIGTERM does nothing."""
    called = []

    def handler(number, frame):
        called.append((number, (tmp_path / "last.ckpt").exists()))
        raise SystemExit(-1)

    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("PATH", "")  # no scontrol
    previous = signal.signal(signal.SIGUSR2, handler), signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.raises(Preempted) as stop:
            fit(tmp_path, Sender("on_train_batch_end", 2, number), requeue=True)
    finally:
        signal.signal(signal.SIGUSR2, previous[0])
        signal.signal(signal.SIGTERM, previous[1])
    assert called == [(signal.SIGUSR2, True)]
    assert stop.value.code == 128 + number


@pytest.mark.parametrize(
    ("state", "calls"),
    [("RUNNING", ["show", "requeue"]), ("CANCELLED", ["show"]), ("COMPLETING", ["show"]),
     ("COMPLETING Reason=TimeLimit", ["show", "requeue"])],
)  # fmt: skip
def test_slurm_is_asked_to_requeue_what_nobody_cancelled(tmp_path, monkeypatch, state, calls):
    record = tmp_path / "calls"
    script = tmp_path / "bin" / "scontrol"
    script.parent.mkdir()
    script.write_text(f'#!/bin/bash\necho "$1 ${{!#}}" >> {record}\necho JobId=17 JobState={state} Restarts=0\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "19")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(Preempted):
        fit(tmp_path, Sender("on_train_batch_end", 2, signal.SIGTERM), requeue=True)
    assert record.read_text().splitlines() == [f"{call} 17_2" for call in calls]


def test_the_third_start_in_a_row_without_a_step_is_the_last(tmp_path, monkeypatch, caplog):
    path = tmp_path / "17"
    monkeypatch.setenv("LDM_START_FILE", str(path))
    assert [gets_further(0) for _ in range(2)] == [True] * 2
    path.write_text("40\n")
    assert [gets_further(step) for step in (40, 40, 41, 40)] == [True, True, True, False]
    assert "`sbatch --time=... --signal=USR1@...`" in caplog.text


def test_lost_ranks_and_a_time_out_are_told_to_the_job_s_script(tmp_path, monkeypatch):
    monkeypatch.setenv("LDM_START_FILE", str(tmp_path / "17"))
    tell_of_lost([], is_timed_out=False)
    assert not (tmp_path / "17.lost").exists()
    tell_of_lost([1, 3], is_timed_out=False)
    tell_of_lost([], is_timed_out=True)
    assert (tmp_path / "17.lost").read_text() == "1\n3\ntime-out\n"


def test_a_forked_process_ignores_the_signal():
    preemption = Preemption()
    preemption.install()
    try:
        if not (child := os.fork()):
            os.kill(os.getpid(), signal.SIGTERM)
            os._exit(int(preemption._received))
        assert os.waitpid(child, 0)[1] == 0
        assert preemption._received == 0
    finally:
        preemption.uninstall()


def test_a_second_signal_ends_the_process_at_once():
    preemption = Preemption()
    if not (child := os.fork()):
        preemption.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)  # of the same event
        preemption._last_at -= 3.0
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM


def test_sigterm_at_the_limit_that_was_announced_leaves_a_save_its_time():
    preemption = Preemption()
    if not (child := os.fork()):
        preemption.install()
        for number in (signal.SIGUSR1, signal.SIGTERM):
            os.kill(os.getpid(), number)
            preemption._last_at -= 3.0
        os.kill(os.getpid(), signal.SIGTERM if preemption._received == signal.SIGUSR1 else 0)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 128 + signal.SIGTERM
    if not (child := os.fork()):
        preemption.install()
        os.kill(os.getpid(), signal.SIGUSR1)
        preemption._last_at -= 3.0
        os.kill(os.getpid(), signal.SIGTERM)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_work_between_two_looks_is_left_at_an_item(tmp_path):
    done = []

    class Work(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            for item in interruptible(trainer, range(100)):
                done.append(item)
                if item == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        fit(tmp_path, Work())
    assert done == [0, 1, 2, 3]
    assert len(metrics(tmp_path)["train/loss"]) == 1
    assert read_checkpoint(tmp_path / "last.ckpt")["global_step"] == 1


class Talks:
    """With another rank that has nothing to say; `calls` are this rank's."""

    is_alone = False

    def __init__(self):
        self.calls, self.pending = [], 0

    def exchange(self, value):
        self.calls.append(value)
        agreed, self.pending = self.pending, value
        return agreed

    def now(self, value):
        return max(self.exchange(value), self.pending)


@pytest.fixture
def talking(tmp_path, monkeypatch):
    """A callback of two ranks, its trainer, the other rank, and the time in a list."""
    preemption, now = Preemption(), [1.0]
    trainer = trainer_of(tmp_path, [preemption], enable_checkpointing=True)
    monkeypatch.setattr("ldm_train.distributed.time.monotonic", lambda: now[0])
    preemption.setup(trainer, None, "validate")
    preemption._agreement._agreement, preemption._agreement.is_alone = Talks(), False
    trainer.state.fn = "validate"
    return preemption, trainer, preemption._agreement._agreement, now


@pytest.mark.parametrize(("seconds", "looks"), [(0.001, range(8, 20)), (0.6, range(990, 1001))])
def test_ranks_look_for_signals_often_but_not_in_each_step_of_a_millisecond(talking, seconds, looks):
    preemption, trainer, talks, now = talking

    def steps(count):
        for _ in range(count):
            now[0] += seconds
            preemption.leave_if_told(trainer)

    steps(1000)
    assert len(talks.calls) in looks
    preemption._received = signal.SIGTERM
    with pytest.raises(Preempted, match=str(128 + signal.SIGTERM)):
        steps(260)


@pytest.mark.parametrize("hook", ["on_train_start", "on_validation_start", "on_validation_end", None])
def test_after_short_pieces_of_work_the_next_batches_are_looked_at(talking, hook):
    """As after images that were generated in milliseconds: a training step may take seconds."""
    preemption, trainer, talks, now = talking
    for _ in interruptible(trainer, range(100)):
        now[0] += 0.001
    if hook is not None:
        for _ in range(5):
            preemption.leave_if_told(trainer)
        getattr(preemption, hook)(trainer, None)
    for _ in range(2):
        calls = len(talks.calls)
        preemption.leave_if_told(trainer)
        assert len(talks.calls) == calls + 1


def test_an_evaluation_that_was_left_is_done_at_the_next_start(tmp_path, monkeypatch):
    judged, sent = [], []

    def evaluate(self, trainer, pl_module, step):
        self._evaluated_step = self._broken_off = step
        for item in interruptible(trainer, range(10)):
            if item == 5 and not sent:
                sent.append(step)
                os.kill(os.getpid(), signal.SIGUSR1)
        judged.append(step)
        self._broken_off = None

    monkeypatch.setattr(SampleEvaluation, "evaluate", evaluate)
    evaluation = SampleEvaluation.__new__(SampleEvaluation)
    evaluation.every_n_steps, evaluation._evaluated_step, evaluation._broken_off = 4, 0, None
    monkeypatch.setattr(evaluation, "on_train_start", lambda *_: None)  # none before the first step
    with pytest.raises(Preempted):
        fit(tmp_path, evaluation)
    again = SampleEvaluation.__new__(SampleEvaluation)
    again.every_n_steps, again._evaluated_step, again._broken_off = 4, 0, None
    fit(tmp_path, again)
    assert (sent, judged) == ([4], [4, 8, 12])
