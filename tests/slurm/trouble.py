"""Trouble of one rank at one step: `+callbacks.trouble._target_=tests.slurm.trouble.Dies`, or `Raises`, or `Hangs`."""

import os
import signal
import time
from pathlib import Path

import lightning as L


class Trouble(L.Callback):
    """What happens, happens once: a file says that it has.

    Args:
        rank: whose; null: of all.
        step: before which batch.
        marker: the file; null: it happens in every start of the job.
    """

    def __init__(self, rank: int | None, step: int, marker: str | None = None) -> None:
        self.rank, self.step, self.marker = rank, step, marker

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        if self.rank not in (None, trainer.global_rank) or trainer.global_step != self.step:
            return
        if self.marker is not None:
            if Path(self.marker).exists():
                return
            Path(self.marker).touch()
        self.happen()


class Dies(Trouble):
    """As by the kernel, for memory."""

    def happen(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class Raises(Trouble):
    """As by a mistake in the code."""

    def happen(self) -> None:
        raise ValueError("a made-up mistake")


class Hangs(Trouble):
    """As in a deadlock."""

    def happen(self) -> None:
        time.sleep(600)
