"""The `vae/` folder of diffusers: `config.json` and tensors, for `AutoencoderKL` and `VQModel`.

The config describes the architecture, so nothing else is needed to read one; the names are those of diffusers 0.42,
with the older ones of attention layers understood. Latent statistics are in the config, see
`ldm_train.interchange.latents`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ldm_train.interchange.architecture import Architecture, Imported
from ldm_train.interchange.latents import SCALE_FACTOR
from ldm_train.interchange.latents import from_diffusers as latents_from_config
from ldm_train.interchange.latents import to_diffusers as config_of_latents
from ldm_train.interchange.layout import AttentionNames, Layout, ResidualNames, SideNames, from_ours, names, to_ours
from ldm_train.nn.pyramid import Pyramid

CONFIG, TENSORS = "config.json", "diffusion_pytorch_model.safetensors"
"""The files of the folder, as written."""

TENSORS_READ = (TENSORS, "diffusion_pytorch_model.fp16.safetensors")
"""The names of the tensors' file that are read, the first that is there; the second has them in half precision."""

DIFFUSERS = Layout(
    encoder=SideNames(
        conv_in="encoder.conv_in",
        residual="encoder.down_blocks.{level}.resnets.{block}",
        attention="encoder.down_blocks.{level}.attentions.{block}",
        resample="encoder.down_blocks.{level}.downsamplers.0.conv",
        middle_in="encoder.mid_block.resnets.0",
        middle_attention="encoder.mid_block.attentions.0",
        middle_out="encoder.mid_block.resnets.1",
        norm_out="encoder.conv_norm_out",
        conv_out="encoder.conv_out",
    ),
    decoder=SideNames(
        conv_in="decoder.conv_in",
        residual="decoder.up_blocks.{step}.resnets.{block}",
        attention="decoder.up_blocks.{step}.attentions.{block}",
        resample="decoder.up_blocks.{step}.upsamplers.0.conv",
        middle_in="decoder.mid_block.resnets.0",
        middle_attention="decoder.mid_block.attentions.0",
        middle_out="decoder.mid_block.resnets.1",
        norm_out="decoder.conv_norm_out",
        conv_out="decoder.conv_out",
    ),
    residual=ResidualNames("norm1", "conv1", "norm2", "conv2", "conv_shortcut"),
    attention=AttentionNames("group_norm", "to_q", "to_k", "to_v", "to_out.0"),
    to_moments="quant_conv",
    from_latents="post_quant_conv",
    codebook="quantize.embedding.weight",
    linear_attention=True,
)

# Older files, still on the hub, whose attention was another class.
DIFFUSERS_OLD = replace(DIFFUSERS, attention=AttentionNames("group_norm", "query", "key", "value", "proj_attn"))

_KL, _VQ = "AutoencoderKL", "VQModel"
_DOWN, _UP = ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"), ("UpDecoderBlock2D", "AttnUpDecoderBlock2D")
# The scale factor of a config that names none: what diffusers assumes for the first, and for the second the published
# models' own, whose latents are not scaled. (Diffusers assumes Stable Diffusion's there too, for want of a config that
# says otherwise.)
_UNNAMED_SCALE = {_KL: SCALE_FACTOR, _VQ: 1.0}


def import_diffusers(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Imported:
    """An autoencoder of diffusers.

    Args:
        config: the content of `config.json`.
        tensors: the content of `diffusion_pytorch_model.safetensors`.

    Raises:
        ValueError: if it is one that `Autoencoder` cannot be.
    """
    architecture = architecture_of(config)
    layout = max((DIFFUSERS, DIFFUSERS_OLD), key=lambda layout: len(tensors.keys() & names(layout, architecture)))
    complete = {**tensors, **_absent_convolutions(config, architecture)}
    scale = _UNNAMED_SCALE[config["_class_name"]]
    latents = latents_from_config(config, architecture.latent_channels, scale)
    return Imported(architecture.node(), to_ours(complete, layout, architecture) | latents, {})


def export_diffusers(node: Mapping[str, Any], state: Mapping[str, Tensor]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """An autoencoder for diffusers.

    Args:
        node: its config node.
        state: its complete state dict.

    Returns:
        The contents of `config.json` and `diffusion_pytorch_model.safetensors`.

    Raises:
        ValueError: if diffusers has no such autoencoder.
    """
    architecture = Architecture.of(node)
    return config_of(architecture) | config_of_latents(state), from_ours(state, DIFFUSERS, architecture)


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """The architecture that a diffusers config describes.

    Raises:
        ValueError: if it is one that `Autoencoder` cannot be.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config.json holds {type(config).__name__}; allowed is what diffusers writes; name another SOURCE"
        )
    check("_class_name", config.get("_class_name"), (_KL, _VQ))
    if missing := {"down_block_types", "up_block_types", "block_out_channels", "latent_channels"} - config.keys():
        raise ValueError(
            f"config.json lacks {', '.join(sorted(missing))}; allowed is what diffusers writes; name another SOURCE"
        )
    down, up, widths = (config[key] for key in ("down_block_types", "up_block_types", "block_out_channels"))
    is_list_of_widths = isinstance(widths, list) and widths and all(type(w) is int and w > 0 for w in widths)
    if not is_list_of_widths or not isinstance(down, list) or len(down) != len(widths):
        raise ValueError(
            f"`block_out_channels` of config.json is {widths} and `down_block_types` of config.json is {down}; allowed "
            "are a list of positive numbers and one as long of names; name another SOURCE"
        )
    for name in down:
        check("down_block_types", name, _DOWN)
    check("up_block_types", up, [[_UP[_DOWN.index(name)] for name in reversed(down)]])
    check("act_fn", config.get("act_fn", "silu"), ("silu", "swish"))
    check("norm_type", config.get("norm_type", "group"), ("group",))
    check("out_channels", config.get("out_channels", 3), (config.get("in_channels", 3),))
    multiples = [[width // widths[0] * widths[0] for width in widths]]
    check("block_out_channels", widths, multiples)
    latent_channels = whole(config, "latent_channels", 4)
    if config["_class_name"] == _VQ:
        check("vq_embed_dim", config.get("vq_embed_dim") or latent_channels, (latent_channels,))
    return Architecture(
        shape=Pyramid(
            channels=widths[0],
            channel_multipliers=tuple(width // widths[0] for width in widths),
            num_res_blocks=whole(config, "layers_per_block", 1),
            attention_factors=tuple(2**level for level, name in enumerate(down) if name == _DOWN[1]),
            middle_attention=_flag(config, "mid_block_add_attention"),
            norm_groups=whole(config, "norm_num_groups", 32),
        ),
        latent_channels=latent_channels,
        in_channels=whole(config, "in_channels", 3),
        codebook_size=whole(config, "num_vq_embeddings", 256) if config["_class_name"] == _VQ else None,
    )


def config_of(architecture: Architecture) -> dict[str, Any]:
    """The diffusers config of an architecture, without its latents' statistics.

    Raises:
        ValueError: if diffusers cannot describe it.
    """
    shape = architecture.shape
    if shape.channel_multipliers[0] != 1:
        raise ValueError(
            f"the first channel multiplier is {shape.channel_multipliers[0]}; diffusers knows only 1, where the first "
            "convolution is as wide as the first level; change `autoencoder.channel_multipliers`"
        )
    kind = _KL if architecture.codebook_size is None else _VQ
    config = {
        "_class_name": kind,
        "act_fn": "silu",
        "block_out_channels": [level.width for level in shape.levels],
        "down_block_types": [_DOWN[level.attention] for level in shape.levels],
        "in_channels": architecture.in_channels,
        "latent_channels": architecture.latent_channels,
        "layers_per_block": shape.num_res_blocks,
        "mid_block_add_attention": shape.middle_attention,
        "norm_num_groups": shape.norm_groups,
        "out_channels": architecture.in_channels,
        "sample_size": 256,  # what the published ones were trained on; read by the tiling of diffusers alone
        "up_block_types": [_UP[level.attention] for level in reversed(shape.levels)],
    }
    if architecture.codebook_size is not None:
        config |= {"num_vq_embeddings": architecture.codebook_size, "vq_embed_dim": architecture.latent_channels}
    return config


def _absent_convolutions(config: Mapping[str, Any], architecture: Architecture) -> dict[str, Tensor]:
    """Identities for the 1x1 convolutions that some autoencoders go without (`use_quant_conv: false`)."""
    widths = {"quant_conv": architecture.moments, "post_quant_conv": architecture.latent_channels}
    result: dict[str, Tensor] = {}
    for name, width in widths.items():
        if not _flag(config, f"use_{name}"):
            result |= {f"{name}.weight": torch.eye(width)[:, :, None, None], f"{name}.bias": torch.zeros(width)}
    return result


def whole(config: Mapping[str, Any], key: str, default: int) -> int:
    """A whole number from 1 that a config says; a `ValueError` that names the key if it says something else."""
    found = config.get(key, default)
    if type(found) is not int or found < 1:
        raise ValueError(f"`{key}` of config.json is {found!r}; allowed are whole numbers from 1; name another SOURCE")
    return found


def _flag(config: Mapping[str, Any], key: str) -> bool:
    check(key, found := config.get(key, True), (True, False))
    return bool(found)


def check(key: str, found: object, allowed: Sequence[object]) -> None:
    """Refuse a config's value that is none of the allowed ones, with a `ValueError` that names the key."""
    if found not in allowed:
        choices = " or ".join(map(str, allowed))
        raise ValueError(f"`{key}` of config.json is {found}; allowed here: {choices}; name another SOURCE")
