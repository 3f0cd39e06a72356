"""Stage 3: fine-tune a trained latent diffusion model by low-rank adapters (Hu et al. 2022).

Stage 2 with other parameters: load the base model, put adapters into the U-Net, and into the text encoder if wanted,
freeze all else, save adapters alone. Adapters are named by `unet.` and a layer of the U-Net, or `text_encoder.` and a
layer of CLIP's text tower.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ldm_train.checkpoint import check_digest, digest, drop_prefixes, load_averaged, read_checkpoint, strict_load
from ldm_train.conditioning import CLIPTextEncoder, Conditioner
from ldm_train.diffusion import ClassifierFreeGuidance, Denoiser, DiffusionObjective, Sampler
from ldm_train.interchange import TextShape
from ldm_train.nn import (
    Adaptation,
    FirstStage,
    LowRank,
    ScaleMode,
    adapted_layers,
    adapters_of,
    inject_adapters,
    lora_disabled,
)
from ldm_train.stages.base_model import check_finite, load_foreign_base
from ldm_train.stages.latent_diffusion import LatentDiffusion
from ldm_train.stages.moments import Moments
from ldm_train.stages.optimization import OptimizerFactory, SchedulerFactory

OF_TRAINING = ("objective.",)
"""Prefixes of what an objective remembers: of this training, and no part of the base model."""
UNET, TEXT_ENCODER = "unet", "text_encoder"
"""What the names of adapters begin with."""

_NAME = "default"
_INHERITED = ("rank", "alpha", "scale_mode", "dropout", "dora")
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def adaptable_networks(stage: LatentDiffusion) -> nn.ModuleDict:
    """The networks of a stage that can have adapters: `unet`, and `text_encoder` where there is one of CLIP's.

    The dictionary holds the networks themselves; the functions of `ldm_train.nn.lora` take it as a module.
    """
    networks: dict[str, nn.Module] = {UNET: stage.denoiser.network}
    towers = [part.tower for part in stage.conditioner.modules() if isinstance(part, CLIPTextEncoder)]
    if len(towers) == 1:
        networks[TEXT_ENCODER] = towers[0]
    return nn.ModuleDict(networks)


def text_shape(stage: LatentDiffusion) -> TextShape | None:
    """The shape of the text tower that can have adapters; `None` where there is none."""
    encoders = [part for part in stage.conditioner.modules() if isinstance(part, CLIPTextEncoder)]
    if len(encoders) != 1:
        return None
    return TextShape(len(encoders[0].tower.transformer.resblocks), encoders[0].width)


class LoRAFineTuning(LatentDiffusion):
    """Trains adapters of a frozen latent diffusion model.

    Args:
        base_checkpoint: a checkpoint of stage 2, or a published model or folder, see `ldm_train.stages.base_model`;
            averaged weights are taken where there are any.
        targets: which layers of the U-Net are adapted, see `ldm_train.nn.Adaptation`, as for the seven that follow.
        rank: r.
        alpha: the number that the scale s in W' = W + s B A is made of.
        scale_mode: how: `direct`, s = alpha; `alpha_over_rank`; or `rank_stabilised`.
        dropout: of what the adapters see in training.
        rank_pattern: regular expression of layer names -> rank.
        alpha_pattern: regular expression of layer names -> alpha.
        dora: adapt the direction and the length of the weights.
        text_encoder: the same keys for the layers of CLIP's text tower, where those left out but the patterns are as
            for the U-Net; `None` leaves it frozen.
        base_precision: of the U-Net's frozen weights; `bfloat16` takes half of their memory. Adapters are float32.
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

    Attributes:
        adapted: the adapters' names.
        base_digest: identity of the base model, for checkpoints.
        unet_digest: identity of its U-Net alone, for files of adapters.

    Raises:
        ValueError: if the adapters or the base model do not fit; see `LatentDiffusion` as well.
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
        scale_mode: ScaleMode = "direct",
        dropout: float = 0.0,
        rank_pattern: Mapping[str, int] | None = None,
        alpha_pattern: Mapping[str, float] | None = None,
        dora: bool = False,
        text_encoder: Mapping[str, Any] | None = None,
        base_precision: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        adaptation = Adaptation(
            targets, rank, alpha, scale_mode, dropout, rank_pattern or {}, alpha_pattern or {}, dora
        )
        if base_precision not in _PRECISIONS:
            raise ValueError(
                f"base_precision is {base_precision!r}; allowed are {' and '.join(_PRECISIONS)}; change "
                "`stage.base_precision`"
            )
        is_foreign = load_foreign_base(Path(base_checkpoint), denoiser, autoencoder, conditioner)
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
        if not is_foreign:
            self._load_run(Path(base_checkpoint))
        self.base_digest = digest(self, without=OF_TRAINING)
        self.unet_digest = digest(self.denoiser.network)
        self.conditioner.requires_grad_(False)
        self.denoiser.network.to(_PRECISIONS[base_precision])
        self.adaptations = {UNET: adaptation}
        if text_encoder is not None:
            self.adaptations[TEXT_ENCODER] = _of_text_encoder(text_encoder, adaptation)
        self.adapted = self._inject()
        self._has_dropout |= any(adaptation.dropout > 0 for adaptation in self.adaptations.values())

    def _load_run(self, path: Path) -> None:
        base = read_checkpoint(path, key="stage.base_checkpoint")
        _check_stage(path, base)
        base["state_dict"] = drop_prefixes(base["state_dict"], OF_TRAINING) | self._of_training()
        super().on_load_checkpoint(base)
        load_averaged(self, base)
        check_finite(self.denoiser.network)

    def _inject(self) -> list[str]:
        networks = adaptable_networks(self)
        if missing := self.adaptations.keys() - networks.keys():
            raise ValueError(
                f"adapters of the {missing.pop()} are asked for, and {type(self.conditioner).__name__} has not one "
                "text encoder of CLIP's; allowed is a conditioner with exactly one (`conditioner=clip_l14`); change "
                "`stage.text_encoder` to null, or `conditioner`"
            )
        return [
            f"{network}.{layer}"
            for network, adaptation in self.adaptations.items()
            for layer in inject_adapters(networks[network], adaptation, _NAME)
        ]

    def adapters(self) -> dict[str, LowRank]:
        """The adapters alone; the tensors are those in use."""
        return adapters_of(adaptable_networks(self), _NAME)

    def adapters_disabled(self) -> AbstractContextManager[None]:
        """Inside, the stage is the base model."""
        return lora_disabled(adaptable_networks(self))

    def train(self, mode: bool = True) -> "LoRAFineTuning":
        """Switch what stage 2 switches, and the adapters, whose dropout is of training also in a frozen part."""
        super().train(mode)
        for layer in adapted_layers(self).values():
            layer.adapters.train(mode)
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the adapters, their scales and the base model's identity."""
        kept = self._kept()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}
        checkpoint["frozen"] = {"base": self.base_digest}
        checkpoint["scales"] = self.scales()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse adapters of other layers or scales, or another base model."""
        found = checkpoint.get("frozen", {}).get("base")
        check_digest("base model", self.base_digest, found, "stage.base_checkpoint")
        kept = self._kept()
        frozen = tuple(name for name in self.state_dict() if name not in kept)
        strict_load(self, checkpoint["state_dict"], allowed_missing=frozen)
        theirs, own = checkpoint.get("scales", {}), self.scales()
        if other := [name for name, scale in theirs.items() if own.get(name) != scale]:
            raise ValueError(
                f"the checkpoint's adapter of {other[0]} has the scale {theirs[other[0]]}, this run's "
                f"{own.get(other[0])}; allowed are equal ones; change `stage.alpha`, `stage.scale_mode` or "
                "`stage.alpha_pattern`"
            )

    def scales(self) -> dict[str, float]:
        """The resolved scale s of every adapter in W' = W + s B A."""
        return {
            f"{network}.{layer}": adapter.alpha
            for network, module in adaptable_networks(self).items()
            for layer, adapted in adapted_layers(module).items()
            for adapter in adapted.of_adapters()
        }

    def facts(self) -> dict[str, object]:
        """What the start-up summary tells besides sizes: how many layers, which ranks, and the resolved scales."""
        found: dict[str, object] = {}
        adapters = self.adapters()
        for network, adaptation in self.adaptations.items():
            own = {name: change for name, change in adapters.items() if name.startswith(f"{network}.")}
            ranks, scales = ({getattr(change, what) for change in own.values()} for what in ("rank", "alpha"))
            kind = "m (W + s B A) / |W + s B A|" if adaptation.dora else "W + s B A"
            found[f"adapters of {network}"] = f"{len(own)} layers, rank {_listed(ranks)}"
            found[f"scale of {network}"] = (
                f"W' = {kind} with s = {_listed(scales)} ({adaptation.scale_mode}, alpha {adaptation.alpha:g})"
            )
        return found

    def num_adapters(self) -> int:
        """How many layers are adapted."""
        return len(self.adapted)

    def _kept(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad} | {*self._of_training()}

    def _of_training(self) -> dict[str, Tensor]:
        return {name: value for name, value in self.state_dict().items() if name.startswith(OF_TRAINING)}


def _of_text_encoder(given: Mapping[str, Any], unets: Adaptation) -> Adaptation:
    allowed = [name for name in Adaptation.__dataclass_fields__ if name != "key"]
    if strangers := sorted(given.keys() - set(allowed)):
        raise ValueError(
            f"`stage.text_encoder` has the key {strangers[0]!r}; allowed are {', '.join(allowed)}; change "
            "`stage.text_encoder`"
        )
    inherited = {name: getattr(unets, name) for name in _INHERITED}
    return Adaptation(**(inherited | dict(given) | {"key": "stage.text_encoder"}))


def _check_stage(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Refuse the checkpoint of another stage, by what it alone has."""
    is_adapted = "scales" in checkpoint
    if is_adapted or not any(name.startswith("denoiser.") for name in checkpoint["state_dict"]):
        raise ValueError(
            f"{path} is of stage {3 if is_adapted else 1}; allowed is stage 2, or a published model; change "
            "`stage.base_checkpoint`"
        )


def _listed(numbers: set[int] | set[float]) -> str:
    return ", ".join(f"{number:.4g}" for number in sorted(numbers))
