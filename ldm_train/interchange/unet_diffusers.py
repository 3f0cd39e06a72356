"""The `unet/` folder of diffusers: `config.json` and tensors, for `UNet2DConditionModel` and `UNet2DModel`.

The first class has spatial transformers, the second plain attention; one of ours is written as the one that it is. Two
traps of the configs: `attention_head_dim` is the *number* of heads in the first class and the *width* of a head in the
second; and what a config leaves out has a default of the class, which is not always what the models have.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ldm_train.interchange.diffusers import check, whole
from ldm_train.interchange.unet import UNetArchitecture
from ldm_train.interchange.unet_layout import (
    PUBLISHED_TRANSFORMER,
    AttentionNames,
    PlaceNames,
    ResidualNames,
    UNetLayout,
    unet_from_ours,
    unet_to_ours,
)

_CONDITION, _PLAIN = "UNet2DConditionModel", "UNet2DModel"


def _layout(vector: str) -> UNetLayout:
    return UNetLayout(
        places=PlaceNames(
            time_in="time_embedding.linear_1",
            time_out="time_embedding.linear_2",
            vector_in=f"{vector}.linear_1",
            vector_out=f"{vector}.linear_2",
            conv_in="conv_in",
            down_residual="down_blocks.{level}.resnets.{block}",
            down_attention="down_blocks.{level}.attentions.{block}",
            downsample="down_blocks.{level}.downsamplers.0",
            middle_in="mid_block.resnets.0",
            middle_attention="mid_block.attentions.0",
            middle_out="mid_block.resnets.1",
            up_residual="up_blocks.{step}.resnets.{block}",
            up_attention="up_blocks.{step}.attentions.{block}",
            upsample="up_blocks.{step}.upsamplers.0",
            norm_out="conv_norm_out",
            conv_out="conv_out",
        ),
        residual=ResidualNames("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"),
        transformer=PUBLISHED_TRANSFORMER,
        plain_norm="group_norm",
        plain=AttentionNames("to_q", "to_k", "to_v", "to_out.0"),
        attention_words={"transformer": "", "plain": ""},
    )


DIFFUSERS_UNET = _layout("class_embedding")

# Stable Diffusion XL's vector, pooled text and embedded sizes, is assembled by diffusers' forward and has other names.
DIFFUSERS_UNET_XL = _layout("add_embedding")

# Block types by (attention, resampling by residual blocks): contracting, expanding.
_BLOCKS = {
    _CONDITION: {
        (False, False): ("DownBlock2D", "UpBlock2D"),
        (True, False): ("CrossAttnDownBlock2D", "CrossAttnUpBlock2D"),
    },
    _PLAIN: {
        (False, False): ("DownBlock2D", "UpBlock2D"),
        (True, False): ("AttnDownBlock2D", "AttnUpBlock2D"),
        (False, True): ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D"),
        (True, True): ("AttnDownBlock2D", "AttnUpBlock2D"),
    },
}
_MODULATIONS = {"add": "default", "scale_shift": "scale_shift"}
_RESAMPLES = {"convolution": "conv", "residual": "resnet"}

# Keys that change what the network computes, and the values that ours has; a key that a config lacks has the first.
_FIXED: dict[str, tuple[object, ...]] = {
    "act_fn": ("silu", "swish"),
    "center_input_sample": (False,),
    "downsample_padding": (1,),
    "flip_sin_to_cos": (True,),
    "freq_shift": (0,),
    "mid_block_scale_factor": (1,),
    "norm_eps": (1e-5,),
    "time_embedding_type": ("positional",),
}
_FIXED_CONDITION: dict[str, tuple[object, ...]] = {
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default",),
    "class_embed_type": (None, "projection"),
    "class_embeddings_concat": (False,),
    "conv_in_kernel": (3,),
    "conv_out_kernel": (3,),
    "cross_attention_norm": (None,),
    "dual_cross_attention": (False,),
    "encoder_hid_dim": (None,),
    "encoder_hid_dim_type": (None,),
    "mid_block_only_cross_attention": (None, False),
    "mid_block_type": ("UNetMidBlock2DCrossAttn",),
    "num_class_embeds": (None,),
    "only_cross_attention": (False,),
    "resnet_out_scale_factor": (1,),
    "resnet_skip_time_act": (False,),
    "reverse_transformer_layers_per_block": (None,),
    "time_cond_proj_dim": (None,),
    "time_embedding_act_fn": (None,),
    "timestep_post_act": (None,),
}
_FIXED_PLAIN: dict[str, tuple[object, ...]] = {
    "add_attention": (True,),
    "class_embed_type": (None,),
    "mid_block_type": ("UNetMidBlock2D",),
    "num_class_embeds": (None,),
}


def import_diffusers_unet(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], latent_channels: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A U-Net of diffusers.

    Args:
        config: the content of `config.json`.
        tensors: the content of `diffusion_pytorch_model.safetensors`.
        latent_channels: channels of the latents; what the network takes beside them is concatenated.

    Returns:
        The config node that builds it, and its tensors under our names; strangers keep theirs.

    Raises:
        ValueError: if it is one that `UNet` cannot be.
    """
    architecture = unet_architecture_of(config, latent_channels)
    layout = DIFFUSERS_UNET if config.get("addition_embed_type") is None else DIFFUSERS_UNET_XL
    return architecture.node(), unet_to_ours(tensors, layout, architecture)


def export_diffusers_unet(
    node: Mapping[str, Any], state: Mapping[str, Tensor], sample_size: int = 64
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A U-Net for diffusers.

    Args:
        node: its config node.
        state: its complete state dict.
        sample_size: side of the latents that pipelines of diffusers make unless told otherwise.

    Returns:
        The contents of `config.json` and `diffusion_pytorch_model.safetensors`.

    Raises:
        ValueError: if diffusers has no such U-Net.
    """
    architecture = UNetArchitecture.of(node)
    config = unet_config_of(architecture) | {"sample_size": sample_size}
    return config, unet_from_ours(state, DIFFUSERS_UNET, architecture)


def unet_architecture_of(config: Mapping[str, Any], latent_channels: int) -> UNetArchitecture:
    """The architecture that a diffusers config describes.

    Raises:
        ValueError: if it is one that `UNet` cannot be.
    """
    if not isinstance(config, Mapping):
        raise ValueError(
            f"config.json holds {type(config).__name__}; allowed is what diffusers writes; name another SOURCE"
        )
    check("_class_name", config.get("_class_name"), (_CONDITION, _PLAIN))
    kind = config["_class_name"]
    is_plain = kind == _PLAIN
    for key, allowed in (_FIXED | (_FIXED_PLAIN if is_plain else _FIXED_CONDITION)).items():
        check(key, config.get(key, allowed[0]), allowed)
    widths = _wholes(config, "block_out_channels", None)
    check("block_out_channels", list(widths), [[width // widths[0] * widths[0] for width in widths]])
    check("time_embedding_dim", config.get("time_embedding_dim"), (None, 4 * widths[0]))
    resample = "residual" if is_plain and config.get("downsample_type", "conv") == "resnet" else "convolution"
    attends = _attending(config, _BLOCKS[kind], resample == "residual", len(widths))
    in_channels = whole(config, "in_channels", 4)
    if in_channels < latent_channels:
        raise ValueError(
            f"`in_channels` of config.json is {in_channels}; allowed are numbers from {latent_channels}, the channels "
            "of the autoencoder's latents; name another SOURCE"
        )
    modulation = config.get("resnet_time_scale_shift", "default")
    check("resnet_time_scale_shift", modulation, tuple(_MODULATIONS.values()))
    return UNetArchitecture(
        in_channels=latent_channels,
        out_channels=whole(config, "out_channels", 4),
        concat_channels=in_channels - latent_channels,
        channels=widths[0],
        channel_multipliers=tuple(width // widths[0] for width in widths),
        num_res_blocks=whole(config, "layers_per_block", 2),
        attention_factors=tuple(2**level for level, there in enumerate(attends) if there),
        attention="plain" if is_plain else "transformer",
        context_dim=None if is_plain else whole(config, "cross_attention_dim", 1280),
        vector_dim=None if is_plain else _vector_dim(config),
        heads=_heads(config, widths, is_plain),
        depths=(1,) * len(widths) if is_plain else _wholes(config, "transformer_layers_per_block", len(widths), 1),
        linear_projection=not is_plain and bool(config.get("use_linear_projection", False)),
        time_modulation="add" if modulation == "default" else "scale_shift",
        resample="residual" if resample == "residual" else "convolution",
        norm_groups=whole(config, "norm_num_groups", 32),
    )


def _attending(
    config: Mapping[str, Any], blocks: Mapping[tuple[bool, bool], tuple[str, str]], is_residual: bool, count: int
) -> list[bool]:
    """Whether each level attends; the expanding side must mirror the contracting one."""
    names = {blocks[attends, is_residual][0]: attends for attends in (False, True) if (attends, is_residual) in blocks}
    down, up = config.get("down_block_types"), config.get("up_block_types")
    if not isinstance(down, list | tuple) or len(down) != count:
        raise ValueError(
            f"`down_block_types` of config.json is {down}; allowed is one name for each of the {count} widths in "
            "`block_out_channels`; name another SOURCE"
        )
    for name in down:
        check("down_block_types", name, tuple(names))
    attends = [names[name] for name in down]
    mirrored = [blocks[there, is_residual][1] for there in reversed(attends)]
    check("up_block_types", list(up) if isinstance(up, list | tuple) else up, (mirrored,))
    if is_residual:
        check("upsample_type", config.get("upsample_type", "conv"), ("resnet",))
    return attends


def _vector_dim(config: Mapping[str, Any]) -> int | None:
    kinds = (config.get("class_embed_type"), config.get("addition_embed_type"))
    if kinds == (None, None):
        return None
    return whole(config, "projection_class_embeddings_input_dim", 0)


def _heads(config: Mapping[str, Any], widths: Sequence[int], is_plain: bool) -> tuple[int, ...]:
    if is_plain:
        width_of_head = whole(config, "attention_head_dim", 8)
        return tuple(width // width_of_head for width in widths)
    return _wholes(config, "attention_head_dim", len(widths), 8)


def unet_config_of(architecture: UNetArchitecture) -> dict[str, Any]:
    """The diffusers config of an architecture.

    Raises:
        ValueError: if diffusers cannot describe it.
    """
    _check_describable(architecture)
    is_plain, levels = architecture.attention == "plain", range(len(architecture.widths))
    kind = _PLAIN if is_plain else _CONDITION
    is_residual = architecture.resample == "residual"
    blocks = [_BLOCKS[kind][architecture.attends(level), is_residual] for level in levels]
    fixed = {key: allowed[0] for key, allowed in _FIXED.items()}
    config = fixed | {
        "_class_name": kind,
        "block_out_channels": architecture.widths,
        "down_block_types": [down for down, _ in blocks],
        "in_channels": architecture.in_channels + architecture.concat_channels,
        "layers_per_block": architecture.num_res_blocks,
        "norm_num_groups": architecture.norm_groups,
        "out_channels": architecture.out_channels,
        "resnet_time_scale_shift": _MODULATIONS[architecture.time_modulation],
        "up_block_types": [up for _, up in reversed(blocks)],
    }
    if is_plain:
        return config | {
            "attention_head_dim": architecture.widths[-1] // architecture.heads[-1],
            # Without it, diffusers leaves the middle's normalisation out where time scales and shifts.
            "attn_norm_num_groups": architecture.norm_groups,
            "downsample_type": _RESAMPLES[architecture.resample],
            "upsample_type": _RESAMPLES[architecture.resample],
        }
    config |= {
        "attention_head_dim": _shortest(architecture.heads),
        "cross_attention_dim": architecture.context_dim,
        "transformer_layers_per_block": _shortest(architecture.depths),
        "use_linear_projection": architecture.linear_projection,
    }
    if architecture.vector_dim is not None:
        config |= {
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": architecture.vector_dim,
        }
    return config


def _shortest(values: Sequence[int]) -> int | list[int]:
    return values[0] if len(set(values)) == 1 else list(values)


def _check_describable(architecture: UNetArchitecture) -> None:
    def refuse(found: str, allowed: str, key: str) -> None:
        raise ValueError(f"{found}; diffusers knows only {allowed}; change `unet.{key}`, or choose another format")

    if architecture.channel_multipliers[0] != 1:
        found = f"the first channel multiplier is {architecture.channel_multipliers[0]}"
        refuse(found, "1, where the first convolution is as wide as the first level", "channel_multipliers")
    if architecture.attention == "plain":
        widths = {architecture.widths[level] // architecture.heads[level] for level in architecture.attending}
        if len(widths) > 1:
            found = f"the heads of plain attention are {sorted(widths)} channels wide"
            refuse(found, "one width of a head for all levels", "head_channels")
        if architecture.vector_dim is not None:
            refuse("a vector joins the time embedding of a U-Net with plain attention", "none there", "vector_dim")
        return
    if architecture.context_dim is None:
        refuse("the transformers have no context", "transformers with one", "context_dim")
    if architecture.resample == "residual":
        refuse("residual blocks join the levels of transformers", "convolutions there", "resample")


def _wholes(config: Mapping[str, Any], key: str, count: int | None, default: int | None = None) -> tuple[int, ...]:
    """A number for each level; one number stands for all, where the count is known."""
    found = config.get(key, default)
    values = [found] * count if count is not None and type(found) is int else found
    is_list = isinstance(values, list | tuple) and len(values) > 0 and all(type(v) is int and v > 0 for v in values)
    if not is_list or len(values) != (count or len(values)):
        allowed = "a list of whole numbers from 1" + ("" if count is None else f", {count} of them, or one for all")
        raise ValueError(f"`{key}` of config.json is {found!r}; allowed is {allowed}; name another SOURCE")
    return tuple(values)
