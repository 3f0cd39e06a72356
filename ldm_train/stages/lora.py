"""Stage 3: fine-tune a trained latent diffusion model by low-rank adapters (Hu et al. 2022).

Stage 2 with other parameters: load the base model, put adapters into the U-Net, freeze all else, save adapters alone.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from ldm_train.checkpoint import check_digest, digest, drop_prefixes, load_averaged, read_checkpoint, strict_load
from ldm_train.conditioning import Conditioner
from ldm_train.diffusion import ClassifierFreeGuidance, Denoiser, DiffusionObjective, Sampler
from ldm_train.nn import FirstStage, inject_lora, lora_disabled, lora_layers, lora_state_dict
from ldm_train.stages.latent_diffusion import LatentDiffusion
from ldm_train.stages.moments import Moments
from ldm_train.stages.optimization import OptimizerFactory, SchedulerFactory

OF_TRAINING = ("objective.",)
"""Prefixes of what an objective remembers: of this training, and no part of the base model."""


class LoRAFineTuning(LatentDiffusion):
    """Trains adapters of a frozen latent diffusion model.

    Args:
        base_checkpoint: a checkpoint of stage 2; its averaged weights are taken where it has them.
        targets: which linear layers of the U-Net are adapted, see `ldm_train.nn.inject_lora`.
        rank: r.
        alpha: the scale in W' = W + alpha B A.
        denoiser: as in stage 2, as are all arguments that follow.
        autoencoder: as in stage 2.
        conditioner: as in stage 2; frozen.
        objective: as in stage 2.
        sampler: as in stage 2.
        guidance: as in stage 2.
        optimizer: as in stage 2.
        lr_scheduler: as in stage 2.
        moments: as in stage 2.
        posterior: as in stage 2.
        seed: as in stage 2.
        compile_network: as in stage 2; adapters included.
    """

    def __init__(
        self,
        base_checkpoint: str,
        targets: str | Sequence[str],
        rank: int,
        alpha: float,
        denoiser: Denoiser,
        autoencoder: FirstStage,
        conditioner: Conditioner,
        objective: DiffusionObjective,
        sampler: Sampler,
        guidance: ClassifierFreeGuidance,
        optimizer: OptimizerFactory,
        lr_scheduler: SchedulerFactory | None,
        moments: Moments,
        posterior: Literal["sample", "mode"],
        seed: int,
        compile_network: bool = False,
    ) -> None:
        super().__init__(
            denoiser,
            autoencoder,
            conditioner,
            objective,
            sampler,
            guidance,
            optimizer,
            lr_scheduler,
            moments,
            posterior,
            seed,
            compile_network,
        )
        base = read_checkpoint(Path(base_checkpoint), key="stage.base_checkpoint")
        base["state_dict"] = drop_prefixes(base["state_dict"], OF_TRAINING) | self._of_training()
        super().on_load_checkpoint(base)
        load_averaged(self, base)
        self.base_digest = digest(self, without=OF_TRAINING)
        self.conditioner.requires_grad_(False)
        self.adapted = inject_lora(self.denoiser.network, targets, rank, alpha)

    def adapter_state(self) -> dict[str, Tensor]:
        """The adapters alone, named by the U-Net's layers."""
        return lora_state_dict(self.denoiser.network)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Inside, the stage is the base model."""
        return lora_disabled(self.denoiser.network)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters and the base model's identity."""
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {*self._of_training()}
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["frozen"] = {"base": self.base_digest}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters of other layers or another base model."""
        found = checkpoint.get("frozen", {}).get("base")
        check_digest("base model", self.base_digest, found, "stage.base_checkpoint")
        kept = {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {*self._of_training()}
        frozen = tuple(name for name in self.state_dict() if name not in kept)
        strict_load(self, checkpoint["state_dict"], allowed_missing=frozen)

    def _of_training(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith(OF_TRAINING)}

    def num_adapters(self) -> int:
        """How many layers are adapted."""
        return sum(1 for _ in lora_layers(self.denoiser.network))
