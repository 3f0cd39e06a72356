"""A whole latent diffusion model between the formats: plain values and tensors, nothing that runs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor

from ldm_train.interchange.clip import names, text_tower

PREDICTIONS = ("epsilon", "v", "x_0")
_HEAD_CHANNELS = 64  # of OpenAI's and OpenCLIP's text towers, whatever their width
_LISTED = 4


class Part(NamedTuple):
    """A network: the config node that builds it and its tensors under our names; strangers keep theirs."""

    node: dict[str, Any]
    state: dict[str, Tensor]


class Average(NamedTuple):
    """The U-Net's averaged weights.

    Attributes:
        state: under our names.
        num_updates: how often they were updated.
        decay: of the average.
    """

    state: dict[str, Tensor]
    num_updates: int
    decay: float


@dataclass(frozen=True)
class TextEncoder:
    """A text tower of CLIP.

    Attributes:
        tensors: under open_clip's names, with what its file held beside the tower (a projection, a scale).
        num_layers: layers of the published tower.
        num_heads: its attention heads.
        activation: `quick_gelu` for OpenAI's, `gelu` for OpenCLIP's.
        layer: whose hidden states condition the U-Net; `penultimate` needs no weights of the last.
    """

    tensors: dict[str, Tensor]
    num_layers: int
    num_heads: int
    activation: Literal["gelu", "quick_gelu"]
    layer: Literal["last", "penultimate"]

    def __post_init__(self) -> None:
        tower = text_tower(self.tensors)
        spare = set(names(self.num_layers)) - set(names(self.used_layers))
        differing = sorted((set(names(self.used_layers)) ^ tower.tensors.keys()) - spare)
        if differing:
            raise ValueError(
                f"{len(differing)} tensors of the text encoder are missing or unknown, among them "
                f"{', '.join(differing[:_LISTED])}; allowed are exactly those of {self.used_layers} layers of CLIP; "
                "name another SOURCE"
            )

    @property
    def used_layers(self) -> int:
        """Layers up to the one whose hidden states are taken."""
        return self.num_layers - (self.layer == "penultimate")

    @property
    def held_layers(self) -> int:
        """Layers that `tensors` has: all, or those that are used."""
        return text_tower(self.tensors).num_layers

    @property
    def width(self) -> int:
        """D, channels of the hidden states."""
        return self.tensors["ln_final.weight"].shape[0]

    def settings(self) -> dict[str, Any]:
        """What no tensor tells, of plain values."""
        return {key: getattr(self, key) for key in ("num_layers", "num_heads", "activation", "layer")}

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], settings: Mapping[str, Any] | None, *, is_openai: bool) -> "TextEncoder":
        """A text encoder of a file.

        Args:
            tensors: under open_clip's names.
            settings: what the file says, if it does.
            is_openai: OpenAI's, as in Stable Diffusion 1, used by its last layer; otherwise OpenCLIP's, as in 2, used
                by the last but one.

        Raises:
            ValueError: if the tensors are not those of a text tower.
        """
        tower = text_tower(tensors)
        guessed: dict[str, Any] = {
            "num_layers": tower.num_layers,
            "num_heads": max(1, tower.tensors["token_embedding.weight"].shape[1] // _HEAD_CHANNELS),
            "activation": "quick_gelu" if is_openai else "gelu",
            "layer": "last" if is_openai else "penultimate",
        }
        found = {key: (settings or {}).get(key, value) for key, value in guessed.items()}
        return cls(dict(tensors), **found)


@dataclass(frozen=True)
class DiffusionModel:
    """Everything that a published latent diffusion model consists of.

    Attributes:
        unet: the network, weights as trained.
        average: its averaged weights, if there are any.
        autoencoder: the first stage, statistics of its latents included.
        text_encoder: the frozen text encoder, if it has one of CLIP's.
        schedule: config node of the noise schedule; `None` if it is none that has a name.
        prediction: `epsilon`, `v` or `x_0`.
        ignored: what the source held besides, first part of the name -> number of tensors.
    """

    unet: Part
    average: Average | None
    autoencoder: Part
    text_encoder: TextEncoder | None
    schedule: dict[str, Any] | None
    prediction: str
    ignored: dict[str, int]

    def __post_init__(self) -> None:
        if self.prediction not in PREDICTIONS:
            raise ValueError(
                f"the prediction is {self.prediction!r}; allowed are {', '.join(PREDICTIONS)}; change --prediction, or "
                "name another SOURCE"
            )
