"""Sheets to look at: what the autoencoder makes of an image, and what adapters change.

The images are always the same, so that two sheets can be laid side by side.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor

from ldm_train.batch import ImageTextBatch
from ldm_train.callbacks.drawing import blocks_of_rows, labelled_rows
from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.callbacks.generation import generated
from ldm_train.callbacks.tracking import save_picture
from ldm_train.metrics import to_uint8


class ReconstructionGrid(L.Callback):
    """Stage 1: the first validation images above their reconstructions, `reconstructions/step_<step>.png`.

    Args:
        run_dir: the run's directory.
        num_images: how many images, from the first validation batches of rank 0.
    """

    def __init__(self, run_dir: str, num_images: int = 16) -> None:
        self.directory = Path(run_dir) / "reconstructions"
        self.num_images = num_images
        self._pairs: list[tuple[Tensor, Tensor]] = []
        self._loaded_step = 0

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, int]) -> None:
        """The step that `task=validate` judges."""
        self._loaded_step = checkpoint["global_step"]

    def on_validation_batch_end(
        self,
        trainer: L.Trainer,
        pl_module: L.LightningModule,
        outputs: Tensor | Mapping[str, Any] | None,
        batch: ImageTextBatch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps the first images and what `validation_step` made of them; validation shows them in a fixed order."""
        missing = self.num_images - sum(len(images) for images, _ in self._pairs)
        if missing > 0:
            assert isinstance(outputs, Tensor)
            self._pairs.append((to_uint8(batch["image"][:missing]), to_uint8(outputs[:missing])))

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws."""
        pairs, self._pairs = self._pairs, []
        if trainer.sanity_checking or not trainer.is_global_zero or not pairs:
            return
        images, decoded = (torch.cat(side) for side in zip(*pairs, strict=True))
        step = self._loaded_step if trainer.state.fn == "validate" else trainer.global_step
        title = f"Step {step}: validation images above their reconstructions"
        picture = labelled_rows(*blocks_of_rows({"image": images, "decoded": decoded}, []), title)
        save_picture(trainer, picture, self.directory / f"step_{step:07d}.png", "val/reconstructions", step)


class AdapterGrid(L.Callback):
    """Stage 3: reference, base model and adapted model, for the same captions and noise; `lora/before_after.png`.

    Args:
        run_dir: the run's directory.
        num_images: how many of the training captions.
        data_set: of this one of the mixture alone; `None`: of all.
    """

    def __init__(self, run_dir: str, num_images: int = 8, data_set: str | None = None) -> None:
        self.path = Path(run_dir) / "lora" / "before_after.png"
        self.num_images, self.data_set = num_images, data_set

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Refuse a data set that is not there before the first step, and not after the last."""
        if self.data_set is not None:
            trainer.datamodule.corpus.rows_of(self.data_set)  # type: ignore[attr-defined]

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the trained adapters."""
        self.draw(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws in `task=validate`."""
        if trainer.state.fn == "validate":
            self.draw(trainer, pl_module)

    def draw(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Draws the sheet, on rank 0."""
        if not trainer.is_global_zero:
            return
        count = self.num_images
        batch = next(iter(trainer.datamodule.reference_batches(count, count, self.data_set)))  # type: ignore[attr-defined]
        with evaluation_weights(trainer, pl_module):
            after = generated(trainer, pl_module, batch)
            with pl_module.adapters_disabled():  # type: ignore[operator]
                before = generated(trainer, pl_module, batch)
        images = {"reference": to_uint8(batch["image"]), "before": before, "after": after}
        title = "The same captions and noise, before and after the adapters"
        picture = labelled_rows(*blocks_of_rows(images, batch["caption"]), title)
        save_picture(trainer, picture, self.path, "val/before_after", trainer.global_step)
