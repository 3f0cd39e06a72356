"""What decides the names and shapes of a U-Net's tensors, and the network that a config node describes.

Between the formats a U-Net travels, as an autoencoder does, as two plain things: `node`, the config node that builds
it (the content of `conf/unet/*.yaml`, resolved), and its state dict under our names.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from ldm_train.interchange.architecture import bound, require, whole_numbers
from ldm_train.nn import UNet

_UNET = "ldm_train.nn.UNet"
Attention = Literal["transformer", "plain"]


@dataclass(frozen=True)
class UNetArchitecture:
    """Everything that decides the names and shapes of a U-Net's tensors, and how many heads share them.

    Attributes:
        in_channels: channels of the latents.
        out_channels: channels of the prediction.
        concat_channels: channels of the maps that are concatenated to the latents.
        channels: width of the first convolution.
        channel_multipliers: width of each level in units of `channels`.
        num_res_blocks: residual blocks a level (one more when expanding).
        attention_factors: downsampling factors at which attention stands; the middle always has one.
        attention: spatial transformers, or the plain self-attention of unconditional models.
        context_dim: width of the context, `None` without cross-attention.
        vector_dim: width of the vector that joins the time embedding, or `None`.
        heads: attention heads of each level; the middle has those of the last.
        depths: transformer blocks of each level's transformers; the middle has those of the last.
        linear_projection: transformers project tokens by linear layers instead of 1x1 convolutions.
        time_modulation: the time embedding is added, or scales and shifts.
        resample: levels are joined by convolutions, or by residual blocks.
        norm_groups: groups of all normalisations.
    """

    in_channels: int
    out_channels: int
    concat_channels: int
    channels: int
    channel_multipliers: tuple[int, ...]
    num_res_blocks: int
    attention_factors: tuple[int, ...]
    attention: Attention
    context_dim: int | None
    vector_dim: int | None
    heads: tuple[int, ...]
    depths: tuple[int, ...]
    linear_projection: bool
    time_modulation: Literal["add", "scale_shift"]
    resample: Literal["convolution", "residual"]
    norm_groups: int

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> "UNetArchitecture":
        """The architecture of a config node.

        Raises:
            ValueError: if the node describes no U-Net.
        """
        arguments = _arguments(node)
        multipliers = tuple(arguments["channel_multipliers"])
        depth, head_channels = arguments["transformer_depth"], arguments["head_channels"]
        widths = [arguments["channels"] * multiplier for multiplier in multipliers]
        heads = [width // head_channels if head_channels else arguments["num_heads"] for width in widths]
        same = {name: arguments[name] for name in cls.__dataclass_fields__ if name in arguments}
        return cls(
            **same
            | {
                "channel_multipliers": multipliers,
                "attention_factors": tuple(arguments["attention_factors"]),
                "heads": tuple(heads),
                "depths": (depth,) * len(multipliers) if isinstance(depth, int) else tuple(depth),
            }
        )

    def node(self) -> dict[str, Any]:
        """A config node that builds it, with the options that no tensor knows of at their defaults.

        Raises:
            ValueError: if neither the number of heads nor their width is the same everywhere.
        """
        node: dict[str, Any] = {"_target_": _UNET, **{name: getattr(self, name) for name in _SAME}}
        heads = {self.heads[level] for level in self.attending}
        width = {self.widths[level] // self.heads[level] for level in self.attending}
        if len(heads) > 1 and len(width) > 1:
            raise ValueError(
                f"the levels have {list(self.heads)} attention heads for widths {self.widths}; allowed is one number "
                "of heads, or one width of a head, for all levels; name another SOURCE"
            )
        node |= {"num_heads": heads.pop()} if len(heads) == 1 else {"head_channels": width.pop()}
        is_uniform = len(set(self.depths)) == 1
        return node | {
            "channel_multipliers": list(self.channel_multipliers),
            "attention_factors": list(self.attention_factors),
            "transformer_depth": self.depths[0] if is_uniform else list(self.depths),
        }

    @property
    def widths(self) -> list[int]:
        """Channels of each level."""
        return [self.channels * multiplier for multiplier in self.channel_multipliers]

    @property
    def attending(self) -> list[int]:
        """Levels whose heads are used, the last for the middle as well."""
        levels = range(len(self.channel_multipliers))
        return [level for level in levels if self.attends(level) or level == levels[-1]]

    def attends(self, level: int) -> bool:
        """Whether the residual blocks of a level are followed by attention."""
        return 2**level in self.attention_factors


_DERIVED = ("channel_multipliers", "attention_factors", "heads", "depths")
_SAME = [name for name in UNetArchitecture.__dataclass_fields__ if name not in _DERIVED]


def build_unet(node: Mapping[str, Any]) -> UNet:
    """The U-Net of a config node, with fresh weights; nothing but this package's own class is ever built.

    Raises:
        ValueError: if the node names another class, or arguments that it does not take.
    """
    return UNet(**_arguments(node))


def check_unet_target(node: object) -> None:
    """Refuse a node that is none, or names another class than the U-Net, however deep.

    Raises:
        ValueError: with the class and what is allowed.
    """
    require(node, [_UNET], "unet")
    for key, value in cast(Mapping[str, Any], node).items():
        if isinstance(value, Mapping) or (isinstance(value, list) and any(isinstance(v, Mapping) for v in value)):
            raise ValueError(f"`unet.{key}` is {value!r}; allowed are plain values; change `unet.{key}`")


def _arguments(node: Mapping[str, Any]) -> dict[str, Any]:
    check_unet_target(node)
    arguments = bound(UNet, node, "unet")
    for key in ("channel_multipliers", "attention_factors"):
        whole_numbers(f"unet.{key}", arguments[key])
    if not isinstance(arguments["transformer_depth"], int):
        whole_numbers("unet.transformer_depth", arguments["transformer_depth"])
    return arguments
