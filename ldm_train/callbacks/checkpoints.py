"""What a run leaves behind to go on from: checkpoints, the record of its config, and adapter files.

`checkpoints/last.ckpt` is always complete: a save writes a temporary file, flushes it, keeps the old one as
`previous.ckpt` and takes its name. Saves happen after an optimizer step, never inside a validation, so raw weights are
saved as raw and averaged ones as averaged.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint

from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.checkpoint import replace_durably
from ldm_train.interchange import AdapterBase, AdapterMetadata, write_adapters
from ldm_train.stages import LoRAFineTuning, text_shape


class CheckpointWriter(Checkpoint):
    """Writes `last.ckpt` every so many optimizer steps and at the end, and keeps the one before.

    Args:
        directory: where checkpoints go.
        every_n_steps: optimizer steps between saves.
    """

    def __init__(self, directory: str, every_n_steps: int) -> None:
        if every_n_steps < 1:
            raise ValueError(
                f"every_n_steps is {every_n_steps}; allowed are whole numbers from 1; change "
                "`callbacks.checkpoint.every_n_steps`"
            )
        self.directory = Path(directory)
        self.every_n_steps = every_n_steps
        self._saved_step = -1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """The state a run resumes from needs no second save."""
        self._saved_step = trainer.global_step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # noqa: ANN401
        """Save when an optimizer step has just completed the interval."""
        # The last step is saved at the very end, after calibration, evaluation and export: a run that is killed in the
        # midst of these goes back a few steps and does them again.
        if trainer.global_step % self.every_n_steps == 0 and trainer.global_step != trainer.max_steps:
            self._save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Save the final state."""
        self._save(trainer, again=True)

    def _save(self, trainer: L.Trainer, again: bool = False) -> None:
        if trainer.global_step == self._saved_step and not again:
            return
        last, temporary = self.directory / "last.ckpt", self.directory / ".last.ckpt.tmp"
        # Collective: every rank takes part, rank 0 writes. `False` means: optimizers, loops and callbacks too.
        trainer.save_checkpoint(temporary, weights_only=False)
        if trainer.is_global_zero:
            if last.exists() and trainer.global_step != self._saved_step:
                previous = self.directory / "previous.ckpt"
                previous.unlink(missing_ok=True)
                os.link(last, previous)
            replace_durably(temporary, last)
        self._saved_step = trainer.global_step


class RunRecord(L.Callback):
    """Puts the resolved config into every checkpoint, so that one file rebuilds the stage.

    Args:
        config: plain dictionaries, lists and values.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the config."""
        checkpoint["config"] = self.config


class AdapterExport(L.Callback):
    """Writes the adapters alone, averaged if they are averaged, as safetensors at the end of training.

    The file says which architecture and which weights the adapters belong to (`ldm_train.interchange.AdapterMetadata`);
    `tools/lora.py convert` gives it the layout of another program.

    Args:
        path: the file to write.
        unet: config node of the U-Net.
        trigger_words: words of the captions that call for what was learned, for people.
    """

    def __init__(self, path: str, unet: Mapping[str, Any], trigger_words: Sequence[str | None] = ()) -> None:
        self.path, self.unet = Path(path), unet
        self.trigger_words = tuple(word for word in trigger_words if word is not None)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file on rank 0."""
        if not trainer.is_global_zero or not isinstance(pl_module, LoRAFineTuning):
            return
        base = AdapterBase(self.unet, text_shape(pl_module))
        with evaluation_weights(trainer, pl_module):
            write_adapters(
                self.path, pl_module.adapters(), AdapterMetadata(base, pl_module.unet_digest, self.trigger_words)
            )
