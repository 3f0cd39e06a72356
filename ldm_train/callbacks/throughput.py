"""How fast a run is, what it waits for, and how strong its gradients are.

- `train/images_per_second`: images over all ranks per second of training; sampling, validation and checkpoints are
  pauses and do not count.
- `train/data_wait_share`: the share of that time in which the loop waited for a batch. Near 0 the device is the limit;
  far above 0 the loader is: more `data.num_workers`.
- `train/images_seen`: images over all ranks since the start of the run, also across resumes; the clock to compare runs.
- `train/learning_rate`: of the first parameter group, as used by the step.
- `train/grad_norm`: the Euclidean norm of all gradients before clipping.

Of data modules that count what their workers do (`meters()`), over all ranks:

- `data/images_per_second_per_worker`: images that a loading process made, since the last logged step, per second in
  which it worked. Times the number of workers it is what loading could deliver; `train/images_per_second` is what was
  asked of it.
- `data/bad/<kind>`: samples so far that could not be used, by what was wrong, see `ldm_train.data.quarantine`.
- `data/cache/<counter>`: what the cache of remote shards did so far.

All are logged every `trainer.log_every_n_steps` optimizer steps. Nothing else waits for the device: on a step that is
logged the monitor waits once, so that the time includes the work that was queued. The ranks' meters are added in one
reduction then, and in none between.
"""

import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext

import lightning as L
import torch
from lightning.pytorch.profilers import PassThroughProfiler, Profiler
from torch.optim import Optimizer

from ldm_train import distributed
from ldm_train.batch import ImageTextBatch


class FetchTimer(Profiler):
    """A profiler that passes everything on and times the loop's waits for a training batch.

    Lightning tells profilers, and nobody else, when it starts and stops to wait. It tells them of each hook of each
    callback as well, in a context that costs more than most of these hooks do: where nobody listens there is none.

    Args:
        inner: the profiler that the trainer had.

    Attributes:
        began: when the last wait started, on `time.perf_counter`.
        waited: seconds waited since the last reset.
    """

    _ACTION = "train_dataloader_next"

    def __init__(self, inner: Profiler) -> None:
        super().__init__()
        self.inner = inner
        self._nobody = nullcontext("") if isinstance(inner, PassThroughProfiler) else None
        self.began: float | None = None
        self.waited = 0.0

    def profile(self, action_name: str) -> AbstractContextManager[str]:  # type: ignore[override]
        """The context of an action."""
        if self._nobody is None or action_name.endswith(self._ACTION):
            return super().profile(action_name)
        return self._nobody

    def start(self, action_name: str) -> None:
        """Starts the clock if the action is the wait."""
        if action_name.endswith(self._ACTION):
            self.began = time.perf_counter()
        self.inner.start(action_name)

    def stop(self, action_name: str) -> None:
        """Stops it."""
        self.inner.stop(action_name)
        if action_name.endswith(self._ACTION) and self.began is not None:
            self.waited += time.perf_counter() - self.began

    def summary(self) -> str:
        """The inner profiler's."""
        return self.inner.summary()

    def describe(self) -> None:
        """The inner profiler's."""
        self.inner.describe()

    def teardown(self, stage: str | None) -> None:
        """The inner profiler's."""
        self.inner.teardown(stage)


class ThroughputMonitor(L.Callback):
    """Logs the figures above; list it first, so that what other callbacks do after a step counts as a pause."""

    def __init__(self) -> None:
        self.images_seen = 0
        self._reset()

    def _reset(self) -> None:
        self._images, self._seconds = 0, 0.0

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Puts the timer around the trainer's profiler."""
        inner = trainer.profiler  # type: ignore[attr-defined]
        self._timer = inner if isinstance(inner, FetchTimer) else FetchTimer(inner)
        trainer.profiler = self._timer  # type: ignore[attr-defined]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts to count; a resumed run has made its first steps already."""
        self._last_step, self._timer.waited = trainer.global_step, 0.0
        self._work = (0.0, 0.0)
        self._reset()

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Optimizer) -> None:
        """Logs what the step is about to use: gradients before clipping, the learning rate before its update."""
        if not is_logged(trainer, trainer.global_step + 1):
            return
        groups = optimizer.param_groups
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        pl_module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
        pl_module.log("train/learning_rate", torch.tensor(float(groups[0]["lr"])))

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: ImageTextBatch, batch_idx: int
    ) -> None:
        """Adds the batch; logs at the end of a logged step."""
        images = len(batch["sample_id"]) * trainer.world_size
        self.images_seen += images
        self._images += images
        # A batch inside an accumulation ends no step, and must not log the one before it once more.
        stepped, self._last_step = trainer.global_step != self._last_step, trainer.global_step
        logged = stepped and is_logged(trainer, trainer.global_step)
        if logged and pl_module.device.type == "cuda":
            torch.cuda.synchronize(pl_module.device)
        if self._timer.began is not None:
            self._seconds += time.perf_counter() - self._timer.began
        if logged:
            self._log(pl_module)
            self._log_meters(trainer, pl_module)

    def _log_meters(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        meters = getattr(trainer.datamodule, "meters", None)  # type: ignore[attr-defined]
        if meters is None:
            return
        totals = _over_ranks(meters(), pl_module.device)
        images, seconds = totals.pop("images_made"), totals.pop("busy_seconds")
        if seconds > self._work[1]:
            rate = (images - self._work[0]) / (seconds - self._work[1])
            pl_module.log("data/images_per_second_per_worker", rate)
        self._work = images, seconds
        for name, total in totals.items():
            pl_module.log(f"data/{name}", total)

    def _log(self, pl_module: L.LightningModule) -> None:
        if self._seconds > 0:
            pl_module.log("train/images_per_second", self._images / self._seconds)
            pl_module.log("train/data_wait_share", min(1.0, self._timer.waited / self._seconds))
        pl_module.log("train/images_seen", float(self.images_seen))
        self._timer.waited = 0.0
        self._reset()

    def state_dict(self) -> dict[str, int]:
        """The clock."""
        return {"images_seen": self.images_seen}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """The clock of the run that is resumed."""
        self.images_seen = state_dict["images_seen"]


def _over_ranks(totals: Mapping[str, float], device: torch.device) -> dict[str, float]:
    """The sum of each number over the ranks, which all have the same names."""
    values = torch.tensor(list(totals.values()), dtype=torch.float64)
    if distributed.world_size() > 1:
        values = distributed.all_reduce_sum(values.to(device))
    return dict(zip(totals, values.tolist(), strict=True))


def is_logged(trainer: L.Trainer, step: int) -> bool:
    """Whether Lightning writes the figures of this optimizer step."""
    every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
    return every > 0 and step % every == 0
