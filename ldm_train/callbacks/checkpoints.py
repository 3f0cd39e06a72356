"""What a run leaves behind to go on from: checkpoints, the record of its config, and adapter files.

`checkpoints/last.ckpt` is always complete: a save writes a temporary file, flushes it, keeps the old one as
`previous.ckpt` and takes its name. Saves happen after an optimizer step, never inside a validation, so raw weights are
saved as raw and averaged ones as averaged.
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from safetensors.torch import save_file
from torch import Tensor

from ldm_train.callbacks.ema import evaluation_weights
from ldm_train.checkpoint import atomic_write, replace_durably
from ldm_train.nn import LowRank
from ldm_train.stages import LoRAFineTuning


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

    Args:
        path: the file to write.
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Write the file on rank 0."""
        if not trainer.is_global_zero or not isinstance(pl_module, LoRAFineTuning):
            return
        with evaluation_weights(trainer, pl_module):
            state = {name: value.clone() for name, value in adapter_tensors(pl_module.adapters()).items()}
        metadata = {"format": "ldm_train.lora", "base": pl_module.base_digest, "layers": json.dumps(pl_module.adapted)}
        with atomic_write(self.path) as temporary:
            save_file(state, temporary, metadata=metadata)


def adapter_tensors(adapters: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """Adapters as tensors on the CPU: `<layer>.down`, `.up`, `.alpha`, and `.magnitude` where there is one."""
    state: dict[str, Tensor] = {}
    for name, change in adapters.items():
        parts = {"down": change.down, "up": change.up, "magnitude": change.magnitude}
        state |= {f"{name}.{part}": value.cpu().contiguous() for part, value in parts.items() if value is not None}
        state[f"{name}.alpha"] = torch.tensor(change.alpha)
    return state


def adapters_in(state: Mapping[str, Tensor]) -> dict[str, LowRank]:
    """The adapters in the tensors that `adapter_tensors` gives.

    Raises:
        ValueError: if there is none.
    """
    names = [key.removesuffix(".down") for key in state if key.endswith(".down")]
    if not names:
        raise ValueError(
            f"no LoRA adapter among {len(state)} tensors; allowed is a file of a LoRA run, with `<layer>.down`, "
            "`<layer>.up` and `<layer>.alpha`; change --lora"
        )
    return {
        name: LowRank(
            state[f"{name}.down"], state[f"{name}.up"], float(state[f"{name}.alpha"]), state.get(f"{name}.magnitude")
        )
        for name in names
    }
