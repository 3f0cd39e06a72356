"""The model that `tools/sample.py` draws from, whatever file it is in, and the adapters on it.

A checkpoint of a run rebuilds its stage itself. A published file, a folder of diffusers or one that
`tools/convert_model.py` has written holds networks and numbers, out of which the same stage is built here:

    U-Net (averaged if it can be), schedule, prediction     ->  denoiser
    text tower                                              ->  conditioner, with its tokenizer and padding
    mask and masked latents among the U-Net's inputs        ->  conditioner of masks besides

with DDIM's 50 published steps and a guidance scale of 7.5, unless told otherwise.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from convert import assembled
from convert_model import Source, read_model
from sources import read_file

from ldm_train.checkpoint import digest, read_checkpoint, strict_load
from ldm_train.conditioning import (
    CLIPTextConditioner,
    CLIPTextEncoder,
    CombinedConditioner,
    Conditioner,
    MaskConditioner,
    NoConditioner,
)
from ldm_train.config import load_run, plain
from ldm_train.data.crops import Shape
from ldm_train.diffusion import ClassifierFreeGuidance, DDIMSampler, Denoiser, DiffusionObjective, NoiseSchedule
from ldm_train.interchange import (
    AdapterBase,
    DiffusionModel,
    Imported,
    build_schedule,
    build_unet,
    compvis,
    read_adapters,
    stable_diffusion,
)
from ldm_train.nn import attach_adapters
from ldm_train.stages import EncodedMoments, LatentDiffusion, LoRAFineTuning, text_shape
from ldm_train.stages.lora import OF_TRAINING, adaptable_networks

LATENT_SIZE, LATENT_SIZE_OF_V = 64, 96
"""Sides of the latents that published models are trained on, where nothing says them: Stable Diffusion 2 predicts v at
768 pixels, all else is of 512."""
SCALE = 7.5
"""The usual scale of guidance of published models."""
RESCALE_OF_ZERO_SNR = 0.7
"""The share of Lin et al. 2024, for schedules that end in pure noise."""


@dataclass(frozen=True)
class Model:
    """A stage in evaluation mode, and what is known of it.

    Attributes:
        stage: generates.
        shape: height and width of its images, unless others are asked for.
        title: its name, for people.
        unet: config node of its U-Net.
        digest: identity of all its weights, adapters of its own included.
    """

    stage: LatentDiffusion
    shape: Shape
    title: str
    unet: dict[str, Any]
    digest: str

    def unet_digest(self) -> str:
        """Identity of its U-Net's weights without adapters, as long as none of files are on it."""
        network = self.stage.denoiser.network
        return self.stage.unet_digest if isinstance(self.stage, LoRAFineTuning) else digest(network)

    def multiple(self) -> int:
        """What height and width of its images must be multiples of."""
        return self.stage.autoencoder.downsampling_factor * getattr(
            self.stage.denoiser.network, "downsampling_factor", 1
        )


def load_model(source: Source, is_raw: bool) -> Model:
    """Read a model.

    Args:
        source: a checkpoint of stage 2 or 3, or anything that `tools/convert_model.py` reads.
        is_raw: take the weights as trained, also where there are averaged ones.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if it is damaged, no model that generates from noise, or one that cannot be sampled from here.
    """
    path = source.path
    if not path.is_dir() and not (path.is_file() and _is_published(path)):
        return _of_run(path, is_raw)
    try:
        found, _ = read_model(source)
        stage = stage_of(found, is_raw).eval()
    except ValueError as error:
        raise ValueError(f"--checkpoint {path} (SOURCE) cannot be used: {error}") from error
    factor = stage.autoencoder.downsampling_factor
    rows, columns = _latent_shape(path, found)
    shape = Shape(rows * factor, columns * factor)
    return Model(stage, shape, path.stem, found.unet.node, digest(stage, without=OF_TRAINING))


def _is_published(path: Path) -> bool:
    content = read_file(path, "--checkpoint")
    return "config" not in content and stable_diffusion.is_whole(compvis.state_of(content))


def _of_run(path: Path, is_raw: bool) -> Model:
    stage, cfg = load_run(path)
    if not isinstance(stage, LatentDiffusion):
        raise ValueError(
            f"{path} is of the run {cfg.name!r}, whose stage {type(stage).__name__} does not generate; allowed are "
            "checkpoints of stage 2 or of a LoRA run; change --checkpoint"
        )
    if is_raw:
        stage.on_load_checkpoint(read_checkpoint(path, "--checkpoint"))
    shape = Shape(int(cfg.image_size), int(cfg.image_size))
    return Model(stage, shape, str(cfg.name), plain(cfg)["unet"], digest(stage, without=OF_TRAINING))


def _latent_shape(path: Path, model: DiffusionModel) -> tuple[int, int]:
    """Height and width of the latents that a model was trained on."""
    config = path / "unet" / "config.json"
    if config.is_file():
        found = json.loads(config.read_text(encoding="utf-8")).get("sample_size")
        if isinstance(found, int):
            return found, found
        if isinstance(found, list) and len(found) == 2:
            return int(found[0]), int(found[1])
    is_sd2 = model.prediction == "v" and model.text_encoder is not None and model.text_encoder.activation == "gelu"
    side = LATENT_SIZE_OF_V if is_sd2 else LATENT_SIZE
    return side, side


def stage_of(model: DiffusionModel, is_raw: bool) -> LatentDiffusion:
    """The stage that a whole model makes.

    Args:
        model: as it was read; its U-Net is averaged or not as it comes.
        is_raw: take the weights as trained, also where there are averaged ones.

    Raises:
        ValueError: if its schedule is unknown, or it is conditioned on something that is not in its file.
    """
    if model.schedule is None:
        raise ValueError(
            "the betas of the model are those of no schedule in conf/schedule; allowed is one of them; name it with "
            "--schedule"
        )
    network = build_unet(model.unet.node)
    strict_load(network, model.unet.state if is_raw or model.average is None else model.average.state)
    first_stage = assembled(Imported(*model.autoencoder, ignored={}))
    schedule, conditioner = build_schedule(model.schedule), _conditioner_of(model, first_stage.latent_channels)
    is_learned = model.unet.node["out_channels"] == 2 * first_stage.latent_channels
    return LatentDiffusion(
        denoiser=Denoiser(network, schedule, model.prediction, "learned" if is_learned else "posterior"),  # type: ignore[arg-type]
        autoencoder=first_stage,
        conditioner=conditioner,
        objective=DiffusionObjective(),
        sampler=_published_sampler(schedule),
        guidance=_published_guidance(schedule, conditioner),
        optimizer=partial(torch.optim.AdamW, lr=0.0),
        lr_scheduler=None,
        moments=EncodedMoments(),
        posterior="mode",
        seed=0,
    )


def _published_sampler(schedule: NoiseSchedule) -> DDIMSampler:
    if schedule.has_zero_terminal_snr:
        return DDIMSampler(50, spacing="trailing")
    return DDIMSampler(50, spacing="leading", final_alpha="first")


def _published_guidance(schedule: NoiseSchedule, conditioner: Conditioner) -> ClassifierFreeGuidance:
    if conditioner.context_dim is None:
        return ClassifierFreeGuidance(1.0)
    return ClassifierFreeGuidance(SCALE, RESCALE_OF_ZERO_SNR if schedule.has_zero_terminal_snr else 0.0)


def _conditioner_of(model: DiffusionModel, latent_channels: int) -> Conditioner:
    """What gives the U-Net what it takes.

    Raises:
        ValueError: if nothing in the file does.
    """
    node, text = model.unet.node, model.text_encoder
    context, vector, concat = (node.get(key) for key in ("context_dim", "vector_dim", "concat_channels"))
    width = None if text is None else text.width
    parts: dict[str, Conditioner] = {}
    if context is not None and text is not None:
        padding = "end" if text.activation == "quick_gelu" else "zero"
        encoder = CLIPTextEncoder(
            text.width, **text.settings(), context_length=len(text.tensors["positional_embedding"])
        )
        strict_load(encoder.tower, {name: text.tensors[name] for name in encoder.tower.state_dict()})
        parts["text"] = CLIPTextConditioner(encoder, text.width, padding, vector)  # type: ignore[arg-type]
    if concat == latent_channels + 1:
        parts["mask"] = MaskConditioner(seed=0, concat_channels=concat)
    found = (context, vector, concat or 0)
    allowed = (width if context is not None else None, vector if vector == width else None, 0)
    if found != (*allowed[:2], concat if "mask" in parts else 0) or (context is not None and text is None):
        raise ValueError(
            f"the U-Net takes a context of width {context}, a vector of {vector} and {concat or 0} further channels, "
            f"which the file's text encoder (width {width}) does not give; allowed are models of captions by one text "
            "encoder of CLIP, with a mask or not, and models of nothing; name the run's own checkpoint"
        )
    if not parts:
        return NoConditioner()
    return next(iter(parts.values())) if len(parts) == 1 else CombinedConditioner(parts)


@dataclass(frozen=True)
class AddedAdapters:
    """Adapters that were put on a model.

    Attributes:
        path: where they came from.
        weight: how much of them is added; 0 none, 1 as trained.
        sha256: of the file.
        trigger_words: words of the captions they were trained with.
        warnings: why they may not suit the model, or were read with a guess.
    """

    path: Path
    weight: float
    sha256: str
    trigger_words: tuple[str, ...]
    warnings: tuple[str, ...]


def add_adapters(model: Model, wanted: Sequence[tuple[Path, float]]) -> list[AddedAdapters]:
    """Put the adapters of files, of any layout, on a model, each with its weight.

    Raises:
        FileNotFoundError: if a file is not there.
        ValueError: if one cannot be read, or was made for other layers.
    """
    networks = adaptable_networks(model.stage)
    base, own = AdapterBase(model.unet, text_shape(model.stage)), model.unet_digest()
    added = []
    for number, (path, weight) in enumerate(wanted):
        try:
            file = read_adapters(path, base)
            attach_adapters(networks, f"file_{number}", file.adapters, weight)
        except ValueError as error:
            raise ValueError(f"--lora {path} does not fit the model of --checkpoint: {error}") from error
        except FileNotFoundError as error:
            raise FileNotFoundError(f"no adapters for --lora: {error}") from error
        warnings = []
        if (trained_on := file.metadata.base_digest) and trained_on != own:  # files of others name none
            warnings += [
                f"{path} was trained on the U-Net {trained_on[:12]}, this one is {own[:12]}: the pictures may be poor"
            ]
        if file.assumed_scales:
            warnings += [
                f"{path}: {file.assumed_scales} adapters say no alpha; it is taken for their rank, a scale of 1"
            ]
        added.append(AddedAdapters(path, weight, file_digest(path), file.metadata.trigger_words, tuple(warnings)))
    return added


def file_digest(path: Path) -> str:
    """SHA-256 of a file, or of all files of a folder."""
    result = sha256()
    for file in sorted(path.iterdir()) if path.is_dir() else [path]:
        if file.is_file():
            result.update(file.read_bytes())
    return result.hexdigest()
