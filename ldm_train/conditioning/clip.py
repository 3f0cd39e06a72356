"""The frozen text encoder of CLIP as a conditioner (Radford et al. 2021; Rombach et al. 2022, Stable Diffusion).

A causal transformer over N = 77 tokens, of which the hidden states of all tokens are the context:

    h_0 = E tokens + P,   h_l = layer_l(h_{l-1}),   context = LayerNorm(h_L)

Stable Diffusion 1 takes OpenAI's ViT-L/14 (123,060,480 parameters) and h_L of its 12 layers; Stable Diffusion 2 takes
OpenCLIP's ViT-H/14 and h_{L-1}, the last layer but one of 24, with the same final norm (as Saharia et al. 2022 found
for generation). The projection into the space shared with images has no part in either. Nothing hides the padding: the
U-Net attends to all 77 tokens, so what they are padded with matters. A U-Net that takes the caption as a whole as well
gets the context at the end mark, the one token that has seen all of the caption.

`CLIPTextEncoder` is open_clip's network. It is random until somebody loads weights, see
`ldm_train.stages.load_text_encoder`; nothing is ever downloaded.
Letters: B batch, N tokens, D width, L layers.
"""

from typing import Literal

import torch
from open_clip.transformer import QuickGELU, TextTransformer
from torch import Tensor, nn

from ldm_train.batch import Conditioning
from ldm_train.conditioning.text import TextConditioner, Tokens

Activation = Literal["gelu", "quick_gelu"]
Layer = Literal["last", "penultimate"]
Padding = Literal["end", "zero"]
Precision = Literal["float32", "bfloat16", "float16"]

_VOCABULARY = 49408
_ACTIVATIONS: dict[str, type[nn.Module]] = {"gelu": nn.GELU, "quick_gelu": QuickGELU}
_UNUSED_LAYERS = {"last": 0, "penultimate": 1}
_PADDING = {"end": None, "zero": 0}
_PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class CLIPTextEncoder(nn.Module):
    """CLIP's text transformer up to the layer that is used; frozen, and always in evaluation mode.

    Args:
        width: D.
        num_layers: L, layers of the published network.
        num_heads: attention heads; no file of weights tells them, so a wrong number goes unnoticed.
        activation: `quick_gelu`, x sigmoid(1.702 x), for OpenAI's weights; `gelu` for most of OpenCLIP's.
        layer: whose hidden states are taken: `last`, or `penultimate`, without the last layer.
        context_length: N.
        precision: of the frozen weights and the arithmetic; half of it takes half of the memory.

    Attributes:
        tower: open_clip's network, with the layers that are used alone.
        num_layers: L.

    Raises:
        ValueError: for an unknown choice, or heads that do not divide the width.
    """

    def __init__(
        self,
        width: int,
        num_layers: int,
        num_heads: int,
        activation: Activation = "gelu",
        layer: Layer = "last",
        context_length: int = 77,
        precision: Precision = "float32",
    ) -> None:
        super().__init__()
        _check("activation", activation, tuple(_ACTIVATIONS))
        _check("layer", layer, tuple(_UNUSED_LAYERS))
        _check("precision", precision, tuple(_PRECISIONS))
        if num_heads < 1 or width % num_heads:
            raise ValueError(
                f"width {width} cannot be split into {num_heads} heads; allowed are divisors of it; change "
                "`conditioner.encoder.encoder.num_heads`"
            )
        used = num_layers - _UNUSED_LAYERS[layer]
        if used < 1:
            raise ValueError(
                f"num_layers is {num_layers}, of which layer {layer!r} leaves {used}; allowed is at least one; change "
                "`conditioner.encoder.encoder.num_layers`"
            )
        self.width, self.num_layers, self.num_heads = width, num_layers, num_heads
        self.activation, self.context_length = activation, context_length
        self.tower = TextTransformer(
            context_length=context_length,
            vocab_size=_VOCABULARY,
            width=width,
            heads=num_heads,
            layers=used,
            output_dim=None,
            pool_type="none",
            act_layer=_ACTIVATIONS[activation],
        ).to(_PRECISIONS[precision])
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> "CLIPTextEncoder":
        """Stays in evaluation mode."""
        return super().train(False)

    def forward(
        self,
        tokens: Tensor,  # (B, N) int64
    ) -> Tensor:  # (B, N, D) float32
        """The hidden states of all tokens after the final norm."""
        with torch.autocast(tokens.device.type, enabled=False):  # so that training and sampling see the same states
            return self.tower(tokens).float()


class CLIPTextConditioner(TextConditioner):
    """Captions to the hidden states of a frozen CLIP text encoder.

    Args:
        encoder: with its weights.
        context_dim: D; must be the encoder's width.
        padding: what follows the end mark: `end`, the same mark again (Stable Diffusion 1), or `zero`, token 0 (Stable
            Diffusion 2, and CLIP itself).
        vector_dim: D, for a vector of the caption as a whole; `None` gives none, as in Stable Diffusion.
        drop_rate: the share of training captions replaced by the empty one.
        remember: captions whose states are kept, for small data sets; `None` keeps none.

    Raises:
        ValueError: if the widths differ, or for an unknown padding.
    """

    frozen_parts = ("encoder",)

    def __init__(
        self,
        encoder: CLIPTextEncoder,
        context_dim: int,
        padding: Padding = "end",
        vector_dim: int | None = None,
        drop_rate: float = 0.1,
        remember: int | None = None,
    ) -> None:
        _check("padding", padding, tuple(_PADDING), "conditioner")
        super().__init__(encoder.context_length, _PADDING[padding], drop_rate, remember)
        for name, stated in (("context_dim", context_dim), ("vector_dim", vector_dim)):
            if stated not in (encoder.width, None):
                raise ValueError(
                    f"{name} is {stated}, the encoder's width {encoder.width}; allowed are equal ones; change "
                    f"`conditioner.{name}` or `conditioner.encoder.encoder.width`"
                )
        self.context_dim, self.vector_dim = context_dim, vector_dim
        self.encoder = encoder

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.encoder.tower.positional_embedding.device

    def encode(self, tokens: Tokens) -> Conditioning:
        """All tokens' states, and if wanted that at the end mark."""
        context = self.encoder(tokens.number)
        if self.vector_dim is None:
            return Conditioning(context=context)
        end = tokens.is_own.sum(1) - 1  # (B,)
        return Conditioning(context=context, vector=context[torch.arange(len(end), device=end.device), end])


def _check(name: str, value: str, allowed: tuple[str, ...], node: str = "conditioner.encoder.encoder") -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; allowed are {', '.join(allowed)}; change `{node}.{name}`")
