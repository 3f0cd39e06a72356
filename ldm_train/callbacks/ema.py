"""Keeps an exponential moving average of the trainable weights and shows it wherever the model is judged.

The average is updated once per optimizer step, whatever the gradient accumulation. It stands in for the raw weights
from `on_validation_start` to `on_validation_end` and inside `evaluation_weights`; after that the raw weights are back
bit for bit. A checkpoint holds both: raw weights in `state_dict`, always, even when it is written while the averages
are swapped in; averages in `ema`, see `ExponentialMovingAverage.state_dict`.

List this callback before those that save or sample at the end of a training step, so that they see the step's average.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from ldm_train.batch import ImageTextBatch
from ldm_train.nn import ExponentialMovingAverage


class EMACallback(L.Callback):
    """Averages the trainable parameters of the LightningModule; frozen parts are neither copied nor saved.

    Args:
        decay: the average's decay per optimizer step; null with `half_life_images`.
        half_life_images: the images after which old weights count half; null with `decay`. Both null: no average.
        device: `cpu` keeps the averages on the host, which spares a GPU's memory; null keeps them beside the weights.

    Raises:
        ValueError: see `ExponentialMovingAverage.check`.
    """

    def __init__(
        self, decay: float | None = 0.9999, half_life_images: float | None = None, device: str | None = None
    ) -> None:
        if decay is not None or half_life_images is not None:
            ExponentialMovingAverage.check(decay, half_life_images, device)
        self.decay, self.half_life_images, self.device = decay, half_life_images, device
        self.average: ExponentialMovingAverage | None = None
        self._loaded: Mapping[str, Any] | None = None
        self._swapped = ExitStack()
        self._last_step = 0
        self._images = 0

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Starts from the present weights, or from the checkpoint's average."""
        self._create(pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """A resumed run has made its first steps already."""
        self._last_step, self._images = trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: object, batch: ImageTextBatch, batch_idx: int
    ) -> None:
        """Updates the average if the batch ended an optimizer step."""
        self._images += len(batch["sample_id"]) * trainer.world_size
        if trainer.global_step != self._last_step:
            if self.average is not None:
                self.average.update(pl_module, images=self._images)
            self._last_step, self._images = trainer.global_step, 0

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Swaps the averages in; the sanity check counts as a validation."""
        self._create(pl_module)
        self._swapped.enter_context(self.swap(pl_module))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Gives the raw weights back."""
        self._swapped.close()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Gives the raw weights back when a validation broke off."""
        self._swapped.close()

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds the averages under their own key."""
        if self.average is not None:
            checkpoint["ema"] = self.average.state_dict()

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keeps the checkpoint's averages until the parameters are on their device."""
        self._loaded = checkpoint.get("ema")

    @contextmanager
    def swap(self, pl_module: L.LightningModule) -> Iterator[None]:
        """Within the context the module computes with the averages; its `state_dict()` stays that of the raw weights.

        A context inside another one does nothing, and neither does one before the average exists.
        """
        average = self.average
        if average is None or average.raw is not None:
            yield
            return

        def put_raw_values(module: nn.Module, state: dict[str, Tensor], prefix: str, metadata: object) -> None:
            raw = average.raw or {}
            state.update({prefix + name: value for name, value in raw.items() if prefix + name in state})

        with average.swap(pl_module):
            hook = pl_module.register_state_dict_post_hook(put_raw_values)
            try:
                yield
            finally:
                hook.remove()

    def _create(self, pl_module: L.LightningModule) -> None:
        if self.decay is None and self.half_life_images is None:
            return
        if self.average is None:
            # What no picture depends on, as the discriminator of stage 1, needs no average.
            without = getattr(pl_module, "not_averaged", ())
            self.average = ExponentialMovingAverage(pl_module, self.decay, self.half_life_images, without, self.device)
        if self._loaded is not None:
            self.average.load_state_dict(self._loaded)
            self._loaded = None


@contextmanager
def evaluation_weights(trainer: L.Trainer, pl_module: L.LightningModule) -> Iterator[None]:
    """The state in which a model is judged: averaged weights if there are any, evaluation mode, no gradients.

    Weights and the modes of all submodules are as before afterwards.
    """
    training = {module: module.training for module in pl_module.modules()}
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, EMACallback):
                stack.enter_context(callback.swap(pl_module))
        pl_module.eval()
        try:
            yield
        finally:
            for module, mode in training.items():
                module.training = mode
