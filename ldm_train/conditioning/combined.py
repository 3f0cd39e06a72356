"""Several conditions at once, each entering in its own way.

    context = the parts' contexts, one after the other along the tokens
    vector  = the parts' vectors, side by side
    concat  = the parts' maps, one on the other along the channels

In training each part is dropped on its own, at its own rate, and all of them together at the rate of the whole, so that
one network learns every conditional: p(x | a, b), p(x | a), p(x | b) and p(x) (Brooks et al. 2023, section 3.2).
Letters: B batch, P parts.
"""

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ldm_train.batch import Conditioning, ImageTextBatch
from ldm_train.conditioning.conditioner import Conditioner
from ldm_train.nn import FirstStage
from ldm_train.randomness import Stream, uniform


class CombinedConditioner(Conditioner):
    """Conditioners side by side.

    Args:
        parts: name -> conditioner; the order is that of tokens, widths and channels.
        drop_rate: the share of training examples that lose all conditions at once, besides what each part drops.
        context_dim: width of the context tokens, the same in all parts that give some; `None` takes what they say.
        vector_dim: width of all vectors together; `None` likewise.
        concat_channels: channels of all maps together; `None` likewise.

    Raises:
        ValueError: if there is no part, parts do not fit together, or a stated width is not the parts'.
    """

    def __init__(
        self,
        parts: Mapping[str, Conditioner],
        drop_rate: float = 0.0,
        context_dim: int | None = None,
        vector_dim: int | None = None,
        concat_channels: int | None = None,
    ) -> None:
        super().__init__(drop_rate)
        nested = [name for name, part in parts.items() if isinstance(part, CombinedConditioner)]
        if not parts or nested:
            found = f"has parts of its own in {nested[0]!r}" if nested else "has no parts"
            raise ValueError(
                f"the combined conditioner {found}; allowed is at least one plain conditioner; change "
                "`conditioner.parts`"
            )
        self.parts = nn.ModuleDict(dict(parts))
        self.frozen_parts = tuple(
            f"parts.{name}.{frozen}" for name, part in parts.items() for frozen in part.frozen_parts
        )
        self.needs_pixels = any(part.needs_pixels for part in parts.values())
        widths = {name: part.context_dim for name, part in parts.items() if part.context_dim is not None}
        if len(set(widths.values())) > 1:
            raise ValueError(
                f"the parts give context of the widths {widths}; allowed is one and the same; change the `context_dim` "
                "of a part of `conditioner.parts`, or let it enter as a vector"
            )
        self.context_dim = _stated("context_dim", context_dim, next(iter(widths.values()), None))
        vectors = [part.vector_dim for part in parts.values() if part.vector_dim is not None]
        self.vector_dim = _stated("vector_dim", vector_dim, sum(vectors) or None)
        channels = sum(part.concat_channels for part in parts.values())
        self.concat_channels = _stated("concat_channels", concat_channels, channels) or 0

    def check(self, first_stage: FirstStage) -> None:
        """Every part looks for itself."""
        for part in self._parts():
            part.check(first_stage)

    def draw_drop(self, seed: int, epoch: int, sample_id: Tensor) -> Tensor:
        """Which examples lose which parts, a function of (seed, epoch, sample id): (B, P) bool."""
        draws = uniform(seed, epoch, sample_id, Stream.CONDITION_DROP, (1 + len(self.parts),))
        own = [draw < part.drop_rate for draw, part in zip(draws[:, 1:].unbind(1), self._parts(), strict=True)]
        return (draws[:, :1] < self.drop_rate) | torch.stack(own, dim=1)

    def forward(self, batch: ImageTextBatch, first_stage: FirstStage, drop: Tensor | None = None) -> Conditioning:
        """Condition on every part; `drop` (B,) bool drops all of an example, (B, P) bool each of its parts."""
        drops = list(drop.unbind(1)) if drop is not None and drop.ndim > 1 else [drop] * len(self.parts)
        given = [part(batch, first_stage, mask) for part, mask in zip(self._parts(), drops, strict=True)]
        return Conditioning(*(_joined(entries) for entries in zip(*given, strict=True)))

    def show(self, batch: ImageTextBatch, first_stage: FirstStage) -> Tensor | None:
        """The pictures (B, 3, H, W) of the first part that has some."""
        pictures = (part.show(batch, first_stage) for part in self._parts())
        return next((picture for picture in pictures if picture is not None), None)

    def describe(self, batch: ImageTextBatch) -> list[str]:
        """What the parts say, each thing once."""
        said = zip(*(part.describe(batch) for part in self._parts()), strict=True)
        return [", ".join(dict.fromkeys(filter(None, words))) for words in said]

    def _parts(self) -> list[Conditioner]:
        return [cast(Conditioner, part) for part in self.parts.values()]


def _joined(entries: Sequence[Tensor | None]) -> Tensor | None:
    # Tokens (B, N, D), vectors (B, E) and maps (B, C, h, w): what grows is the axis after the batch in each.
    present = [entry for entry in entries if entry is not None]
    return torch.cat(present, dim=1) if present else None


def _stated(name: str, stated: int | None, made: int | None) -> int | None:
    if stated is not None and stated != made:
        raise ValueError(
            f"{name} is {stated}, the parts together make {made}; allowed is what they make, or null; change "
            f"`conditioner.{name}` or `conditioner.parts`"
        )
    return made
