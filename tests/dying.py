"""A run that is killed: `+callbacks.dies._target_=tests.dying.Dying`."""

import os
import signal

import lightning as L


class Dying(L.Callback):
    """Kills its process after the first step of a run with this learning rate, each time.

    Args:
        learning_rate: of the run that is meant.
    """

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def on_train_batch_end(self, trainer: L.Trainer, *_: object) -> None:
        if trainer.optimizers[0].defaults["lr"] == self.learning_rate:
            os.kill(os.getpid(), signal.SIGKILL)
