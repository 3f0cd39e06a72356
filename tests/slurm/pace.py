"""Slows a run down, each rank differently, and says where it is: `+callbacks.pace._target_=tests.slurm.pace.Pace`."""

import time

import lightning as L


class Pace(L.Callback):
    """Sleeps before each batch; rank r sleeps 1 + r times as long, so that signals find ranks in different places.

    Args:
        seconds: on rank 0.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        self.seconds = seconds

    def on_train_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        time.sleep(self.seconds * (1 + trainer.global_rank))

    def on_validation_start(self, trainer: L.Trainer, *_: object) -> None:
        print(f"rank {trainer.global_rank} validates step {trainer.global_step}", flush=True)

    def on_validation_batch_start(self, trainer: L.Trainer, *_: object) -> None:
        time.sleep(self.seconds * (1 + trainer.global_rank))

    def on_validation_end(self, trainer: L.Trainer, *_: object) -> None:
        print(f"rank {trainer.global_rank} has validated step {trainer.global_step}", flush=True)
