"""The layout of the published autoencoders (Rombach et al. 2022; Esser et al. 2021): `.ckpt` and `.safetensors`.

A file is a flat dictionary of tensors, or a Lightning checkpoint around it under `state_dict`, in some copies nested
twice. It holds an autoencoder, or a whole latent diffusion model with the autoencoder under `first_stage_model.`. The
training's loss networks (`loss.`) and averages (`model_ema.`) may stand beside it; both are left out.

The layout has no place for the latents' statistics but the tensor `scale_factor` of some whole models. Our files carry
them, and the config node, in a record beside the tensors, where other readers do not look.
"""

import json
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ldm_train.interchange.architecture import Architecture, Imported
from ldm_train.interchange.latents import latent_state, scaled, statistics, uncalibrated
from ldm_train.interchange.layout import AttentionNames, Layout, ResidualNames, SideNames, from_ours, to_ours

RECORD = "ldm_train"
"""The entry of a file that holds our record: at the top of a `.ckpt`, in the metadata of a `.safetensors`."""

COMPVIS = Layout(
    encoder=SideNames(
        conv_in="encoder.conv_in",
        residual="encoder.down.{level}.block.{block}",
        attention="encoder.down.{level}.attn.{block}",
        resample="encoder.down.{level}.downsample.conv",
        middle_in="encoder.mid.block_1",
        middle_attention="encoder.mid.attn_1",
        middle_out="encoder.mid.block_2",
        norm_out="encoder.norm_out",
        conv_out="encoder.conv_out",
    ),
    decoder=SideNames(
        conv_in="decoder.conv_in",
        residual="decoder.up.{level}.block.{block}",
        attention="decoder.up.{level}.attn.{block}",
        resample="decoder.up.{level}.upsample.conv",
        middle_in="decoder.mid.block_1",
        middle_attention="decoder.mid.attn_1",
        middle_out="decoder.mid.block_2",
        norm_out="decoder.norm_out",
        conv_out="decoder.conv_out",
    ),
    residual=ResidualNames("norm1", "conv1", "norm2", "conv2", "nin_shortcut"),
    attention=AttentionNames("norm", "q", "k", "v", "proj_out"),
    to_moments="quant_conv",
    from_latents="post_quant_conv",
    codebook="quantize.embedding.weight",
    linear_attention=False,
)

_NESTED = 2  # dictionaries under `state_dict`, one in the other
_WHOLE_MODEL = "first_stage_model."
_TRAINING_ONLY = ("loss.", "model_ema.")


class _Unread:
    """Stands in for a class that published checkpoints mention and whose content nobody needs."""


# Lightning 1 used the classes of callbacks as keys of a dictionary, and safe reading stops at a name it does not know.
# An empty class under the name lets it pass, and nothing of Lightning runs.
SAFE_GLOBALS = [
    (_Unread, "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"),
    (_Unread, "pytorch_lightning.callbacks.early_stopping.EarlyStopping"),
]
"""For `torch.serialization.safe_globals` around the reading of a published `.ckpt`."""


class Contents(NamedTuple):
    """What a file holds.

    Attributes:
        tensors: the autoencoder's, without prefix.
        record: ours, if there is one.
        scale_factor: the whole model's, if it has one.
        ignored: what else is in it, first part of the name -> number of tensors.
    """

    tensors: dict[str, Tensor]
    record: dict[str, Any]
    scale_factor: float | None
    ignored: dict[str, int]


def contents(checkpoint: Mapping[str, Any]) -> Contents:
    """Find the autoencoder in a checkpoint's dictionary, or in a flat one of tensors.

    Raises:
        ValueError: if there is something else than tensors.
    """
    state = state_of(checkpoint)
    prefix = _WHOLE_MODEL if any(name.startswith(_WHOLE_MODEL) for name in state) else ""
    kept = [name for name in state if name.startswith(prefix) and not name.startswith(_TRAINING_ONLY, len(prefix))]
    ignored = Counter(name.split(".")[0] for name in state.keys() - set(kept))
    scale_factor = _number(state["scale_factor"]) if prefix and "scale_factor" in state else None
    record = checkpoint.get(RECORD, {})
    if not isinstance(record, Mapping):
        raise ValueError(
            f"the entry {RECORD!r} is {type(record).__name__}; allowed is a dictionary, or none; write the file again"
        )
    tensors = {name.removeprefix(prefix): state[name] for name in kept}
    return Contents(tensors, dict(record), scale_factor, dict(ignored))


def state_of(checkpoint: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors of a checkpoint's dictionary, however deep they lie.

    Raises:
        ValueError: if there is something else than tensors.
    """
    state: Mapping[str, Any] = checkpoint
    for _ in range(_NESTED):
        if isinstance(state.get("state_dict"), Mapping):
            state = state["state_dict"]
    check_tensors(state)
    return state


def check_tensors(state: Mapping[Any, object]) -> None:
    """Refuse what is no dictionary of named tensors.

    Raises:
        ValueError: with the first entry that is none.
    """
    strangers = (name for name, value in state.items() if not isinstance(name, str) or not isinstance(value, Tensor))
    if (stranger := next(strangers, None)) is not None:
        raise ValueError(
            f"the entry {stranger!r} is no named tensor; allowed is a dictionary of names and tensors, or a checkpoint "
            "with one under `state_dict`; name another file"
        )


def _number(tensor: Tensor) -> float:
    if tensor.numel() != 1:
        raise ValueError(
            f"`scale_factor` has the shape {tuple(tensor.shape)}; allowed is one number; name another file"
        )
    return float(tensor)


def import_compvis(found: Contents, node: Mapping[str, Any]) -> Imported:
    """An autoencoder of the published layout.

    Args:
        found: the content of its file.
        node: the config node of the architecture it has.

    Returns:
        It; its latents calibrated if the file says how they are scaled.

    Raises:
        ValueError: if the layout cannot hold such an autoencoder, or its statistics are no positive numbers.
    """
    architecture = Architecture.of(node)
    channels = architecture.latent_channels
    mean, std = found.record.get("latent_mean"), found.record.get("latent_std")
    if mean is not None and std is not None:
        latents = latent_state(mean, std)
    else:
        latents = uncalibrated(channels) if found.scale_factor is None else scaled(found.scale_factor, channels)
    return Imported(dict(node), to_ours(found.tensors, COMPVIS, architecture) | latents, found.ignored)


def export_compvis(node: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An autoencoder in the published layout.

    Args:
        node: its config node.
        state: its complete state dict.

    Returns:
        The tensors, and the record that keeps what the layout has no place for, of plain values.

    Raises:
        ValueError: if the layout cannot hold such an autoencoder.
    """
    mean, std = statistics(state) or (None, None)
    record = {"autoencoder": dict(node), "latent_mean": mean, "latent_std": std}
    return from_ours(state, COMPVIS, Architecture.of(node)), record


def as_metadata(record: Mapping[str, Any]) -> dict[str, str]:
    """The record as metadata of a safetensors file, which holds strings alone."""
    return {"format": "pt", RECORD: json.dumps(record)}


def from_metadata(metadata: Mapping[str, str] | None) -> dict[str, Any]:
    """The entry of a safetensors file's record, as `contents` looks for it; empty where there is none.

    Raises:
        ValueError: if it is damaged.
    """
    if not metadata or RECORD not in metadata:
        return {}
    try:
        return {RECORD: json.loads(metadata[RECORD])}
    except json.JSONDecodeError as error:
        raise ValueError(
            f"the metadata {RECORD!r} is damaged ({error}); allowed is JSON, or none; write the file again"
        ) from error
