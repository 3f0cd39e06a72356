"""What the files of others say about an autoencoder, and what ours must be for them to hold it.

Between the formats an autoencoder travels as two plain things: `node`, the config node that builds it (the content of
`conf/autoencoder/*.yaml`, resolved), and `state`, its state dict under our names. `Architecture` is what of the node
decides the names and shapes of tensors; how it was trained is no part of it.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ldm_train.nn import Autoencoder, KLRegularizer, VectorQuantizer
from ldm_train.nn.pyramid import Pyramid
from ldm_train.nn.regularizer import Regularizer

_AUTOENCODER = "ldm_train.nn.Autoencoder"
_KL, _VQ = "ldm_train.nn.KLRegularizer", "ldm_train.nn.VectorQuantizer"
# Nodes come out of files as well: only these classes are ever built from one.
_REGULARIZERS: dict[str, type[Regularizer]] = {_KL: KLRegularizer, _VQ: VectorQuantizer}


@dataclass(frozen=True)
class Imported:
    """An autoencoder read from somewhere.

    Attributes:
        node: the config node that builds it.
        state: its tensors under our names, `latent_mean` and `latent_std` included; strangers keep their names.
        ignored: what the file held besides, first part of the name -> number of tensors.
    """

    node: dict[str, Any]
    state: dict[str, Tensor]
    ignored: dict[str, int]


@dataclass(frozen=True)
class Architecture:
    """Everything that decides the names and shapes of an autoencoder's tensors.

    Attributes:
        shape: the pyramids.
        latent_channels: C.
        in_channels: channels of an image.
        codebook_size: codes of a vector quantiser, `None` for the Kullback-Leibler kind.
    """

    shape: Pyramid
    latent_channels: int
    in_channels: int
    codebook_size: int | None

    @classmethod
    def of(cls, node: Mapping[str, Any]) -> "Architecture":
        """The architecture of a config node.

        Raises:
            ValueError: if the formats of others cannot hold it.
        """
        arguments, regularizer = _arguments(node)
        if regularizer.get("distance", "euclidean") != "euclidean":
            raise ValueError(
                f"the codebook's distance is {regularizer['distance']}; the published layouts know only euclidean, a "
                "reader would look up other codes; change `autoencoder.regularizer.distance`"
            )
        shape = Pyramid(
            channels=arguments["channels"],
            channel_multipliers=tuple(arguments["channel_multipliers"]),
            num_res_blocks=arguments["num_res_blocks"],
            attention_factors=tuple(arguments["attention_factors"]),
            middle_attention=arguments["middle_attention"],
            norm_groups=arguments["norm_groups"],
        )
        return cls(shape, arguments["latent_channels"], arguments["in_channels"], regularizer.get("codebook_size"))

    def node(self) -> dict[str, Any]:
        """A config node that builds it, with the regularizer's other options at their defaults."""
        regularizer: dict[str, Any] = {"_target_": _KL}
        if self.codebook_size is not None:
            regularizer = {
                "_target_": _VQ,
                "codebook_size": self.codebook_size,
                "latent_channels": self.latent_channels,
            }
        return {
            "_target_": _AUTOENCODER,
            "regularizer": regularizer,
            "latent_channels": self.latent_channels,
            "channels": self.shape.channels,
            "channel_multipliers": list(self.shape.channel_multipliers),
            "num_res_blocks": self.shape.num_res_blocks,
            "attention_factors": list(self.shape.attention_factors),
            "middle_attention": self.shape.middle_attention,
            "norm_groups": self.shape.norm_groups,
            "in_channels": self.in_channels,
        }

    @property
    def moments(self) -> int:
        """Channels that the encoder produces."""
        return self.latent_channels * (2 if self.codebook_size is None else 1)


def build(node: Mapping[str, Any]) -> Autoencoder:
    """The autoencoder of a config node, with fresh weights.

    Unlike Hydra it builds this package's own classes from plain values and nothing else, so that a node may come from
    a stranger's file.

    Raises:
        ValueError: if the node names other classes, or arguments that they do not take.
    """
    arguments, regularizer = _arguments(node)
    kind = _REGULARIZERS[node["regularizer"]["_target_"]]
    return Autoencoder(**(arguments | {"regularizer": kind(**regularizer)}))


def check_targets(node: object) -> None:
    """Refuse a node that is none, or names a class that `build` does not know, however deep.

    Raises:
        ValueError: with the class and what is allowed.
    """
    require(node, [_AUTOENCODER], "autoencoder")
    assert isinstance(node, Mapping)
    require(node.get("regularizer"), list(_REGULARIZERS), "autoencoder.regularizer")
    known = {_AUTOENCODER, *_REGULARIZERS}
    if strangers := sorted({str(target) for target in _targets(node)} - known):
        raise ValueError(
            f"`autoencoder` names the class {strangers[0]}; allowed here: {', '.join(sorted(known))}; change "
            "`autoencoder`"
        )


def _targets(value: object) -> Iterator[object]:
    if isinstance(value, Mapping):
        yield from ([value["_target_"]] if "_target_" in value else [])
        value = list(value.values())
    if isinstance(value, list | tuple):
        for entry in value:
            yield from _targets(entry)


def _arguments(node: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """All arguments of the autoencoder and of its regularizer, defaults filled in."""
    require(node, [_AUTOENCODER], "autoencoder")
    arguments = bound(Autoencoder, node, "autoencoder")
    for key in ("channel_multipliers", "attention_factors", "checkpoint_factors"):
        whole_numbers(f"autoencoder.{key}", arguments[key])
    regularizer = arguments["regularizer"]
    require(regularizer, list(_REGULARIZERS), "autoencoder.regularizer")
    kind = _REGULARIZERS[regularizer["_target_"]]
    return arguments, bound(kind, regularizer, "autoencoder.regularizer")


def whole_numbers(key: str, found: object) -> None:
    """Refuse what is no list of whole numbers, with a `ValueError` that names the config key."""
    if not isinstance(found, list | tuple) or any(type(value) is not int for value in found):
        raise ValueError(f"`{key}` is {found!r}; allowed is a list of whole numbers; change it")


def require(node: object, allowed: list[str], key: str) -> None:
    """Refuse a node that names none of the allowed classes, with a `ValueError` that names the config key."""
    found = node.get("_target_") if isinstance(node, Mapping) else node
    if found not in allowed:
        raise ValueError(f"`{key}._target_` is {found!r}; allowed here: {', '.join(allowed)}; change `{key}`")


def bound(target: Callable[..., object], node: Mapping[str, Any], key: str) -> dict[str, Any]:
    """All arguments that a node means for its target, defaults filled in; a `ValueError` if it does not take them."""
    given = {name: value for name, value in node.items() if name != "_target_"}
    try:
        call = inspect.signature(target).bind(**given)
    except TypeError as error:
        names = ", ".join(inspect.signature(target).parameters)
        raise ValueError(f"`{key}` cannot be built: {error}; its keys are {names}; change `{key}`") from error
    call.apply_defaults()
    return call.arguments
