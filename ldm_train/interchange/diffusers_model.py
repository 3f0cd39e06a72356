"""A whole model as the folder of a diffusers pipeline: `unet/ vae/ text_encoder/ tokenizer/ scheduler/`.

Each part has a `config.json` and tensors of its own, and `model_index.json` says of which classes they are; so a folder
describes itself. What it has no place for is left out: averages of the U-Net beside its weights (the average *is* the
U-Net then), and layers of the text encoder that are not used.
"""

import json
from dataclasses import replace
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ldm_train.interchange.clip import from_open_clip, to_open_clip
from ldm_train.interchange.diffusers import CONFIG, architecture_of, check, export_diffusers, import_diffusers, whole
from ldm_train.interchange.model import DiffusionModel, Part, TextEncoder
from ldm_train.interchange.schedules import from_scheduler_config, to_scheduler_config
from ldm_train.interchange.tokenizer import tokenizer_files
from ldm_train.interchange.unet_diffusers import export_diffusers_unet, import_diffusers_unet

UNET, AUTOENCODER, TEXT_ENCODER, TOKENIZER, SCHEDULER = "unet", "vae", "text_encoder", "tokenizer", "scheduler"
"""The subfolders."""

INDEX, SCHEDULER_CONFIG, TEXT_TENSORS = "model_index.json", "scheduler_config.json", "model.safetensors"
TEXT_TENSORS_READ = (TEXT_TENSORS, "model.fp16.safetensors")
"""The names of the text encoder's file that are read, the first that is there."""

_MASK_AND_MASKED_LATENTS = 5
_VERSION = "0.42.1"  # of the layout that is written
_EMPTY_LIBRARY = [None, None]
_TEXT_MODEL, _TEXT_MODELS = "CLIPTextModel", ("CLIPTextModel", "CLIPTextModelWithProjection")


class Folder(NamedTuple):
    """The content of a folder.

    Attributes:
        configs: of each subfolder that has one; the pipeline's own under the empty name.
        tensors: of each subfolder that has them.
        texts: of the tokenizer, file name -> content.
    """

    configs: dict[str, dict[str, Any]]
    tensors: dict[str, dict[str, Tensor]]
    texts: dict[str, str]

    def documents(self) -> dict[str, str]:
        """All that is no tensor, path -> content; the index last, by which readers recognise the folder."""
        names = {SCHEDULER: SCHEDULER_CONFIG, "": INDEX}
        result = {f"{TOKENIZER}/{name}": text for name, text in self.texts.items()}
        for part, config in reversed(self.configs.items()):
            path = f"{part}/{names.get(part, CONFIG)}".lstrip("/")
            result[path] = json.dumps(config, indent=2, sort_keys=True) + "\n"
        return result


def import_diffusers_model(folder: Folder, prediction: str | None = None) -> DiffusionModel:
    """A model of diffusers.

    Args:
        folder: its content.
        prediction: what the U-Net predicts; `None` takes what the scheduler's config says.

    Raises:
        ValueError: if a part is one that ours cannot be, or is missing.
    """
    if missing := {UNET, AUTOENCODER} - folder.configs.keys():
        raise ValueError(
            f"the folder has no {' and no '.join(f'{name}/' for name in sorted(missing))}; allowed is a pipeline of "
            "diffusers with both; name another SOURCE"
        )
    latent_channels = architecture_of(folder.configs[AUTOENCODER]).latent_channels
    node, state = import_diffusers_unet(folder.configs[UNET], folder.tensors[UNET], latent_channels)
    first_stage = import_diffusers(folder.configs[AUTOENCODER], folder.tensors[AUTOENCODER])
    schedule, found = from_scheduler_config(folder.configs[SCHEDULER]) if SCHEDULER in folder.configs else (None, None)
    return DiffusionModel(
        unet=Part(node, state),
        average=None,
        autoencoder=Part(first_stage.node, first_stage.state),
        text_encoder=_import_text(folder) if TEXT_ENCODER in folder.configs else None,
        schedule=schedule,
        prediction=prediction or found or "epsilon",
        ignored={},
    )


def export_diffusers_model(model: DiffusionModel, sample_size: int = 64) -> Folder:
    """A model for diffusers; the U-Net's averaged weights if it has any.

    Args:
        model: the model.
        sample_size: side of the latents that pipelines make unless told otherwise.

    Raises:
        ValueError: if diffusers has no such model, or the schedule is unknown.
    """
    if model.schedule is None:
        raise ValueError(
            "the noise schedule of the model is unknown; allowed is one of conf/schedule; name it with --schedule"
        )
    weights = model.unet.state if model.average is None else model.average.state
    unet_config, unet = export_diffusers_unet(model.unet.node, weights, sample_size)
    vae_config, vae = export_diffusers(model.autoencoder.node, model.autoencoder.state)
    configs = {
        "": _index(model, vae_config["_class_name"]),
        UNET: unet_config,
        AUTOENCODER: vae_config,
        SCHEDULER: to_scheduler_config(model.schedule, model.prediction),
    }
    tensors, texts = {UNET: unet, AUTOENCODER: vae}, {}
    if (text := model.text_encoder) is not None:
        padding: Literal["end", "zero"] = "end" if text.activation == "quick_gelu" else "zero"
        texts = tokenizer_files(padding, len(text.tensors["positional_embedding"]))
        tensors[TEXT_ENCODER] = from_open_clip(text.tensors, text.used_layers)
        tensors[TEXT_ENCODER].pop("text_projection.weight", None)
        configs[TEXT_ENCODER] = _text_config(text)
    return Folder(configs, tensors, texts)


def _index(model: DiffusionModel, autoencoder: str) -> dict[str, Any]:
    parts: dict[str, Any] = {
        UNET: ["diffusers", "UNet2DModel" if model.unet.node.get("attention") == "plain" else "UNet2DConditionModel"],
        AUTOENCODER: ["diffusers", autoencoder],
        SCHEDULER: ["diffusers", "DDIMScheduler"],
    }
    kind = "DiffusionPipeline"
    if model.text_encoder is not None:
        parts |= {TEXT_ENCODER: ["transformers", _TEXT_MODEL], TOKENIZER: ["transformers", "CLIPTokenizer"]}
        parts |= {"feature_extractor": _EMPTY_LIBRARY, "safety_checker": _EMPTY_LIBRARY}
        parts |= {"requires_safety_checker": False}
        is_inpainting = model.unet.node.get("concat_channels", 0) == _MASK_AND_MASKED_LATENTS
        kind = "StableDiffusionInpaintPipeline" if is_inpainting else "StableDiffusionPipeline"
    return {"_class_name": kind, "_diffusers_version": _VERSION} | parts


def _text_config(text: TextEncoder) -> dict[str, Any]:
    vocabulary, positions = (len(text.tensors[name]) for name in ("token_embedding.weight", "positional_embedding"))
    return {
        "architectures": [_TEXT_MODEL],
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": text.activation,
        "hidden_size": text.width,
        "intermediate_size": len(text.tensors["transformer.resblocks.0.mlp.c_fc.bias"]),
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": positions,
        "model_type": "clip_text_model",
        "num_attention_heads": text.num_heads,
        "num_hidden_layers": text.used_layers,
        "pad_token_id": 1,
        "projection_dim": text.width,
        "vocab_size": vocabulary,
    }


def _import_text(folder: Folder) -> TextEncoder:
    config = folder.configs[TEXT_ENCODER]
    check("architectures", (config.get("architectures") or [_TEXT_MODEL])[0], _TEXT_MODELS)
    check("hidden_act", activation := config.get("hidden_act", "quick_gelu"), ("quick_gelu", "gelu"))
    layers = whole(config, "num_hidden_layers", 12)
    tensors = to_open_clip(folder.tensors[TEXT_ENCODER], layers)
    settings = {"num_layers": layers, "num_heads": whole(config, "num_attention_heads", 12)}
    found = TextEncoder.of(tensors, settings, is_openai=True)
    # OpenCLIP's towers are used by their last layer but one, and the last is not in a pipeline's folder.
    is_openai = activation == "quick_gelu"
    return found if is_openai else replace(found, activation="gelu", layer="penultimate", num_layers=layers + 1)
