"""Text conditioners: captions to context tokens.

`TransformerTextConditioner` is trained with the diffusion model, as in the first text-conditional latent diffusion
models (Rombach et al. 2022, section 4.3.1): byte-pair tokens (open_clip's tokenizer), an embedding, a bidirectional
transformer.

    context = LayerNorm(Transformer(E tokens + P)),   E: vocabulary x d embedding,  P: positions
    vector  = mean of the context over the caption's own tokens

Padding is hidden from the transformer and from the mean. A dropped caption is the empty caption.
Letters: B batch, N tokens, D width.
"""

import open_clip
import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner

_INITIAL_STD = 0.02


class TransformerTextConditioner(Conditioner):
    """A text encoder trained from scratch together with the U-Net.

    Args:
        context_dim: width D of the context tokens.
        context_length: N, tokens kept of a caption, start and end marks included; longer ones are cut.
        num_layers: transformer layers.
        num_heads: attention heads; must divide `context_dim`.
        token_dim: width of the token embedding, mapped to D by a matrix; smaller than D where most of a large
            vocabulary is rarely seen (Lan et al. 2020, section 3.1). `None` means D.
        drop_rate: the share of training captions replaced by the empty one.
    """

    def __init__(
        self,
        context_dim: int,
        context_length: int = 77,
        num_layers: int = 4,
        num_heads: int = 4,
        token_dim: int | None = None,
        drop_rate: float = 0.1,
    ) -> None:
        super().__init__(drop_rate)
        if context_dim % num_heads:
            raise ValueError(
                f"context_dim {context_dim} cannot be split into {num_heads} heads; allowed are divisors of it; change "
                "`conditioner.num_heads` or `conditioner.context_dim`"
            )
        self.context_dim = context_dim
        self.tokenizer = open_clip.tokenizer.SimpleTokenizer(context_length=context_length)
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

    def forward(self, batch: ImageTextBatch, drop: Tensor | None = None) -> Conditioning:
        """Encode B captions; `drop` (B,) bool marks those replaced by the empty one."""
        captions = batch["caption"]
        if drop is not None:
            captions = ["" if dropped else caption for caption, dropped in zip(captions, drop.tolist(), strict=True)]
        tokens = self.tokenizer(captions).to(self.position.device)  # (B, N)
        # The end mark has the largest number of all tokens; what follows it is padding.
        own = torch.arange(tokens.shape[1], device=tokens.device) <= tokens.argmax(dim=1, keepdim=True)  # (B, N)
        embedded = self.widen(self.embedding(tokens)) + self.position  # (B, N, D)
        context = self.norm(self.transformer(embedded, src_key_padding_mask=~own))
        vector = (context * own[..., None]).sum(1) / own.sum(1, keepdim=True)
        return Conditioning(context=context, vector=vector)

    def token_count(self, caption: str) -> int:
        """How many tokens a caption takes, start and end marks included; above `context_length` it is cut."""
        return len(self.tokenizer.encode(caption)) + 2
