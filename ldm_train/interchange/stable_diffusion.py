"""Whole published latent diffusion models in one file: Stable Diffusion 1 and 2 and what has their layout.

    model.diffusion_model.          the U-Net
    model_ema.                      its averages, with names that have lost their dots, and two counters
    first_stage_model.              the autoencoder
    cond_stage_model.transformer.   Stable Diffusion 1: the text encoder under transformers' names
    cond_stage_model.model.         Stable Diffusion 2: under open_clip's
    betas, alphas_cumprod, ...      twelve tables of the schedule
    scale_factor                    scale of the latents, where it was measured in training

A dotless name cannot be split again without guessing (`input_blocks110weight`), so the table of averages is built from
the U-Net's names. The prediction, and what else the layout has no place for, is in our record beside the tensors; a
file without one is taken for a model that predicts the noise.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ldm_train.interchange.clip import POSITION_IDS, PREFIX, from_open_clip, to_open_clip
from ldm_train.interchange.compvis import contents, export_compvis, import_compvis, state_of
from ldm_train.interchange.latents import SCALE_FACTOR, shortest_factor, statistics
from ldm_train.interchange.model import Average, DiffusionModel, Part, TextEncoder
from ldm_train.interchange.schedules import build_schedule, published_tables, schedule_of_betas
from ldm_train.interchange.unet import UNetArchitecture
from ldm_train.interchange.unet_layout import COMPVIS_UNET, unet_from_ours, unet_names, unet_to_ours

_NETWORK = "diffusion_model."
_UNET, _AVERAGE, _AUTOENCODER = f"model.{_NETWORK}", "model_ema.", "first_stage_model."
_CLIP, _OPEN_CLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
_DECAY, _UPDATES = f"{_AVERAGE}decay", f"{_AVERAGE}num_updates"
_TABLES = frozenset(published_tables(build_schedule({"_target_": "ldm_train.diffusion.linear_schedule"})))
_LAYER = "encoder.layers."


class Widths(NamedTuple):
    """What the tensors of a published U-Net tell, see `UNetArchitecture`; `in_channels` with concatenated ones."""

    channels: int
    in_channels: int
    out_channels: int
    context_dim: int | None
    vector_dim: int | None


def is_whole(state: Iterable[str]) -> bool:
    """Whether names are those of a whole model."""
    return any(str(name).startswith(_UNET) for name in state)


def widths_of(state: Mapping[str, Tensor]) -> Widths:
    """What the U-Net in a whole model's state dict is like.

    Raises:
        ValueError: if its outermost layers are missing.
    """
    names = {"conv_in": f"{_UNET}input_blocks.0.0.weight", "conv_out": f"{_UNET}out.2.weight"}
    if missing := [name for name in names.values() if name not in state]:
        raise ValueError(
            f"the file holds no {missing[0]}; allowed is a whole published latent diffusion model; change SOURCE"
        )
    conv_in, conv_out = (state[name].shape for name in names.values())
    context = (value.shape[1] for name, value in state.items() if name.endswith("attn2.to_k.weight"))
    vector = state.get(f"{_UNET}label_emb.0.0.weight")
    return Widths(conv_in[0], conv_in[1], conv_out[0], next(context, None), None if vector is None else vector.shape[1])


def import_stable_diffusion(
    checkpoint: Mapping[str, Any],
    unet: Mapping[str, Any],
    autoencoder: Mapping[str, Any],
    prediction: str | None = None,
) -> DiffusionModel:
    """A model of the published layout.

    Args:
        checkpoint: the file's dictionary, or a flat one of tensors.
        unet: the config node of the U-Net it has.
        autoencoder: that of its autoencoder.
        prediction: what the U-Net predicts; `None` takes what the file says, or else `epsilon`.

    Raises:
        ValueError: if something in the file is not what the layout says.
    """
    state, found = state_of(checkpoint), contents(checkpoint)
    architecture = UNetArchitecture.of(unet)
    first_stage = import_compvis(found, autoencoder)
    average = _average(state, architecture)
    text_encoder = _text_encoder(state, found.record.get("text_encoder"))
    betas = state.get("betas")
    own = unet_to_ours(_under(state, _UNET), COMPVIS_UNET, architecture)
    return DiffusionModel(
        unet=Part(dict(unet), own),
        average=average,
        autoencoder=Part(first_stage.node, first_stage.state),
        text_encoder=text_encoder,
        schedule=found.record.get("schedule") or (None if betas is None else schedule_of_betas(betas)),
        prediction=prediction or found.record.get("prediction", "epsilon"),
        ignored=_ignored(state, has_average=average is not None, has_text=text_encoder is not None),
    )


def export_stable_diffusion(model: DiffusionModel) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A model in the published layout.

    Returns:
        The tensors, and the record that keeps what the layout has no place for, of plain values.

    Raises:
        ValueError: if the layout cannot hold such a model, or its schedule is unknown.
    """
    architecture = UNetArchitecture.of(model.unet.node)
    _check_publishable(architecture)
    if model.schedule is None:
        raise ValueError(
            "the noise schedule of the model is unknown; allowed is one of conf/schedule; name it with --schedule"
        )
    first_stage, record = export_compvis(model.autoencoder.node, model.autoencoder.state)
    network = unet_from_ours(model.unet.state, COMPVIS_UNET, architecture)
    tensors = {f"{_UNET}{name}": value for name, value in network.items()}
    if model.average is not None:
        averaged = unet_from_ours(model.average.state, COMPVIS_UNET, architecture)
        tensors |= {_dotless(name): value for name, value in averaged.items()}
        tensors |= {
            _DECAY: torch.tensor(model.average.decay, dtype=torch.float32),
            _UPDATES: torch.tensor(model.average.num_updates, dtype=torch.int32),
        }
    tensors |= {f"{_AUTOENCODER}{name}": value for name, value in first_stage.items()}
    tensors |= published_tables(build_schedule(model.schedule)) | _scale_factor(model.autoencoder.state)
    record |= {"unet": model.unet.node, "schedule": model.schedule, "prediction": model.prediction}
    if model.text_encoder is not None:
        tensors |= _published_text(model.text_encoder)
        record["text_encoder"] = model.text_encoder.settings()
    return tensors, record


def _under(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}


def _dotless(name: str) -> str:
    """`input_blocks.0.0.weight` as `model_ema.diffusion_modelinput_blocks00weight`."""
    return _AVERAGE + f"{_NETWORK}{name}".replace(".", "")


def _average(state: Mapping[str, Tensor], architecture: UNetArchitecture) -> Average | None:
    found = {name for name in state if name.startswith(_AVERAGE)}
    if not found:
        return None
    table = {_dotless(name): name for name in unet_names(COMPVIS_UNET, architecture)}
    if strangers := sorted(found ^ {*table, _DECAY, _UPDATES}):
        raise ValueError(
            f"{len(strangers)} averaged tensors are missing or unknown, the first is {strangers[0]}; allowed is one "
            "for each of the U-Net's, with the dots of its name left out; change --unet or SOURCE"
        )
    published = {name: state[dotless] for dotless, name in table.items()}
    own = unet_to_ours(published, COMPVIS_UNET, architecture)
    return Average(own, int(state[_UPDATES]), round(float(state[_DECAY]), 7))


def _text_encoder(state: Mapping[str, Tensor], settings: Mapping[str, Any] | None) -> TextEncoder | None:
    if own := _under(state, _OPEN_CLIP):
        return TextEncoder.of(own, settings, is_openai=False)
    own = _under(state, f"{_CLIP}{PREFIX}")
    if not own:
        return None
    layers = {name.removeprefix(_LAYER).split(".")[0] for name in own if name.startswith(_LAYER)}
    return TextEncoder.of(to_open_clip(own, len(layers)), settings, is_openai=True)


def _published_text(text_encoder: TextEncoder) -> dict[str, Tensor]:
    if text_encoder.activation == "gelu":
        return {f"{_OPEN_CLIP}{name}": value for name, value in text_encoder.tensors.items()}
    tensors = from_open_clip(text_encoder.tensors, text_encoder.held_layers)
    positions = torch.arange(len(text_encoder.tensors["positional_embedding"]))[None]
    return {f"{_CLIP}{name}": value for name, value in (tensors | {PREFIX + POSITION_IDS: positions}).items()}


def _scale_factor(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The buffer of a measured scale; the one that Stable Diffusion's configs say is in none of its files."""
    found = statistics(state)
    if found is None or any(found[0]) or len(set(found[1])) > 1:
        return {}
    factor = shortest_factor(found[1][0])
    return {} if factor == SCALE_FACTOR else {"scale_factor": torch.tensor(factor)}


def _ignored(state: Mapping[str, Tensor], *, has_average: bool, has_text: bool) -> dict[str, int]:
    known = (_UNET, _AUTOENCODER, *([_AVERAGE] if has_average else []), *([_CLIP, _OPEN_CLIP] if has_text else []))
    rest = (name for name in state if not name.startswith(known) and name not in (*_TABLES, "scale_factor"))
    return dict(Counter(name.split(".")[0] for name in rest))


def _check_publishable(architecture: UNetArchitecture) -> None:
    if architecture.attention == "transformer" and architecture.context_dim is None:
        raise ValueError(
            "the transformers have no context; the published layout knows only transformers with one, and plain "
            "attention; change `unet.attention` or `unet.context_dim`, or choose another format"
        )
