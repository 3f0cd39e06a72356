"""Text conditioners: captions to context tokens.

Captions become byte-pair tokens of CLIP's vocabulary (open_clip's tokenizer), N of them with marks around:

    tokens = start, caption, end, padding ...

A longer caption is cut and keeps the end mark; a dropped one is the empty caption, whose tokens are start and end.

`TransformerTextConditioner` is trained with the diffusion model, as in the first text-conditional latent diffusion
models (Rombach et al. 2022, section 4.3.1): an embedding and a bidirectional transformer.

    context = LayerNorm(Transformer(E tokens + P)),   E: vocabulary x D embedding,  P: positions
    vector  = mean of the context over the caption's own tokens

Padding is hidden from the transformer and from the mean. CLIP's frozen encoder is in `ldm_train.conditioning.clip`.
Letters: B batch, N tokens, D width.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import open_clip
import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.conditioning.memory import StateMemory
from ldm_train.nn import FirstStage

_MARKS = 2  # start and end
_INITIAL_STD = 0.02


class Tokens(NamedTuple):
    """B captions as numbers.

    Attributes:
        number: (B, N) int64.
        is_own: (B, N) bool, false for padding.
    """

    number: Tensor
    is_own: Tensor


class TextConditioner(Conditioner, ABC):
    """What text conditioners share: the tokenizer, and the empty caption as their null condition.

    Args:
        context_length: N, tokens kept of a caption, start and end marks included; longer ones are cut.
        padding: the token number after the end mark; `None` repeats the end mark.
        drop_rate: the share of training captions replaced by the empty one.
        remember: captions whose states are kept while the encoder does not learn, see `StateMemory`; `None` keeps none.

    Attributes:
        context_length: N.
        tokenizer: open_clip's.

    Raises:
        ValueError: if the marks alone do not fit.
    """

    def __init__(self, context_length: int, padding: int | None, drop_rate: float, remember: int | None = None) -> None:
        super().__init__(drop_rate)
        self._memory = None if remember is None else StateMemory(remember)
        if context_length < _MARKS:
            raise ValueError(
                f"context_length is {context_length}; allowed are numbers from {_MARKS}, which the start and end marks "
                "take (77 is CLIP's); change `conditioner.context_length`"
            )
        self.context_length = context_length
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)
        self.padding = self.tokenizer.eot_token_id if padding is None else padding

    @abstractmethod
    def encode(self, tokens: Tokens) -> Conditioning:
        """The states of B captions."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the encoder is."""

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """Encode B captions; `drop` (B,) bool marks those replaced by the empty one."""
        if self._memory is None or any(parameter.requires_grad for parameter in self.parameters()):
            return self.encode(self.tokens(batch, drop, self.device))
        return self._memory(self, batch["caption"], drop)

    def tokens(self, batch: ImageTextBatch, drop: Tensor | None, device: torch.device) -> Tokens:
        """The captions of a batch; `drop` (B,) bool marks those replaced by the empty one."""
        if drop is None:
            return self.tokens_of(batch["caption"], device)
        # On the device: to look which captions are dropped would make the host wait for it in every step.
        given, empty = (self.tokens_of(captions, device) for captions in (batch["caption"], [""]))
        pairs = zip(empty, given, strict=True)
        return Tokens(*(torch.where(drop.to(device)[:, None], null, own) for null, own in pairs))

    def tokens_of(self, captions: list[str], device: torch.device) -> Tokens:
        """B captions as they are."""
        encoded = [self.tokenizer.encode(caption) for caption in captions]
        kept = self.context_length - _MARKS
        start, end = self.tokenizer.sot_token_id, self.tokenizer.eot_token_id
        rows = [[start, *caption[:kept], end] for caption in encoded]
        number = torch.tensor([row + [self.padding] * (self.context_length - len(row)) for row in rows])
        length = torch.tensor([len(row) for row in rows])
        is_own = torch.arange(self.context_length) < length[:, None]
        if device.type == "cuda":  # else the host waits for its stream where a batch is large
            number, is_own = number.pin_memory(), is_own.pin_memory()
        return Tokens(number.to(device, non_blocking=True), is_own.to(device, non_blocking=True))

    def token_count(self, caption: str) -> int:
        """How many tokens a caption takes, start and end marks included; above `context_length` it is cut."""
        return len(self.tokenizer.encode(caption)) + _MARKS


class TransformerTextConditioner(TextConditioner):
    """A text encoder trained from scratch together with the U-Net.

    Args:
        context_dim: width D of the context tokens.
        context_length: N, tokens kept of a caption, start and end marks included; longer ones are cut.
        num_layers: transformer layers.
        num_heads: attention heads; must divide `context_dim`.
        token_dim: width of the token embedding, mapped to D by a matrix; smaller than D where most of a large
            vocabulary is rarely seen (Lan et al. 2020, section 3.1). `None` means D.
        drop_rate: the share of training captions replaced by the empty one.
        remember: captions whose states are kept where the encoder is frozen, as beside adapters; `None` keeps none.

    Raises:
        ValueError: if the heads do not divide the width.
    """

    def __init__(
        self,
        context_dim: int,
        context_length: int = 77,
        num_layers: int = 4,
        num_heads: int = 4,
        token_dim: int | None = None,
        drop_rate: float = 0.1,
        remember: int | None = None,
    ) -> None:
        super().__init__(context_length, 0, drop_rate, remember)
        if context_dim % num_heads:
            raise ValueError(
                f"context_dim {context_dim} cannot be split into {num_heads} heads; allowed are divisors of it; change "
                "`conditioner.num_heads` or `conditioner.context_dim`"
            )
        self.context_dim = self.vector_dim = context_dim
        token_dim = token_dim or context_dim
        self.embedding = nn.Embedding(self.tokenizer.vocab_size, token_dim)
        self.widen = nn.Linear(token_dim, context_dim, bias=False) if token_dim != context_dim else nn.Identity()
        self.position = nn.Parameter(torch.empty(context_length, context_dim))
        layer = nn.TransformerEncoderLayer(
            context_dim, num_heads, 4 * context_dim, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.transformer = nn.TransformerEncoder(layer, num_layers, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(context_dim)
        # Embedded tokens start at unit scale after widening, so that words differ from the first step on.
        nn.init.normal_(self.embedding.weight, std=1.0 if token_dim != context_dim else context_dim**-0.5)
        nn.init.normal_(self.position, std=_INITIAL_STD)

    @property
    def device(self) -> torch.device:
        """Where the encoder is."""
        return self.position.device

    def encode(self, tokens: Tokens) -> Conditioning:
        """All tokens' states, and the mean over each caption's own."""
        embedded = self.widen(self.embedding(tokens.number)) + self.position  # (B, N, D)
        context = self.norm(self.transformer(embedded, src_key_padding_mask=~tokens.is_own))
        own = tokens.is_own[..., None]
        vector = (context * own).sum(1) / own.sum(1)
        return Conditioning(context=context, vector=vector)
