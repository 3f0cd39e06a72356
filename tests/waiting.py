"""No process may wait for its device in a training step: `+callbacks.waiting._target_=tests.waiting.NoBarrier`.

A barrier is the wait that a machine without a GPU can show: in NCCL's the process stands until its device is done.
"""

import lightning as L
import torch.distributed as dist


class NoBarrier(L.Callback):
    """Refuses barriers from the beginning of each batch to the end of its backward pass."""

    def on_train_batch_start(self, *_: object) -> None:
        self._barrier, dist.barrier = dist.barrier, _refuse

    def on_after_backward(self, *_: object) -> None:
        dist.barrier = self._barrier


def _refuse(*_: object, **__: object) -> None:
    raise AssertionError("a barrier in a training step")
