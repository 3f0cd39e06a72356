"""Which text goes with an image: found in the sample, and, where there are several, drawn anew in each epoch.

A source is any object with `kinds`, the members of a sample that it reads, `draws`, how many numbers it needs, and a
call. Sources nest: tags may be shuffled whatever they come from, and one source of several be taken at random. A
caption that is short, long, translated or generated each teaches something else (Betker et al. 2023, "Improving image
generation with better captions", section 3: a share of the original captions is kept); to leave out the caption
altogether is the conditioner's affair (`drop_rate`).

The numbers are functions of (seed, epoch, sample id), uniform on [0, 1). All zeros give the plain caption: the first
of several, its tags complete and in their order. That is what validation reads.

A missing member or field is an error: the sample counts as bad. An empty text is a valid caption.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

from ldm_train.data.index import CAPTION, METADATA
from ldm_train.data.quarantine import CaptionError


class Texts(NamedTuple):
    """What a sample says about its image, as far as the source asks for it.

    Attributes:
        caption: the `.txt`, or None.
        metadata: the `.json`, or None.
    """

    caption: str | None = None
    metadata: Mapping[str, Any] | None = None


class CaptionSource(Protocol):
    """What the data set asks of a source of captions.

    Attributes:
        kinds: the members it reads, `CAPTION` and `METADATA` of `ldm_train.data.index`.
        draws: how many numbers it needs; 0 if the caption is always the same.
    """

    kinds: frozenset[int]
    draws: int

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """The caption of a sample; KeyError or ValueError if there is none."""
        ...


class TextCaption:
    """The `.txt` as a whole."""

    kinds = frozenset({CAPTION})
    draws = 0

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """The text without the blanks around it."""
        assert texts.caption is not None
        return texts.caption.strip()


class TextLines:
    """One line of the `.txt`, all that are not blank being equally likely."""

    kinds = frozenset({CAPTION})
    draws = 1

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """The drawn line; empty if there is none."""
        assert texts.caption is not None
        lines = [line.strip() for line in texts.caption.splitlines() if line.strip()]
        return _pick(lines, draws[0]) if lines else ""


class FieldCaption:
    """A metadata field: a text, or a list of texts, which are equally likely.

    Args:
        field: a field of the sample's `.json`.
    """

    kinds = frozenset({METADATA})
    draws = 1

    def __init__(self, field: str) -> None:
        self.field = field

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """The text, or the drawn one, without the blanks around it.

        Raises:
            KeyError: if the sample has no such field.
            CaptionError: if it holds something else, or nothing.
        """
        assert texts.metadata is not None
        if self.field not in texts.metadata:
            raise KeyError(f"no metadata field {self.field!r}, which `data.caption.field` names")
        value = texts.metadata[self.field]
        choices = value if isinstance(value, list) else [value]
        if not choices or not all(isinstance(choice, str) for choice in choices):
            raise CaptionError(f"metadata field {self.field!r} is {value!r}, neither a text nor a list of texts")
        return _pick(choices, draws[0]).strip()


class WeightedCaptions:
    """One of several sources, drawn in proportion to their weights: say, a generated caption with probability 0.9.

    Args:
        sources: the sources; the first is the one for validation.
        weights: what they count, from 0; they need not sum to 1. The first is above 0.

    Raises:
        ValueError: if there is no source, or not a weight for each.
    """

    def __init__(self, sources: Sequence[CaptionSource], weights: Sequence[float]) -> None:
        if not sources or len(weights) != len(sources) or min(weights) < 0.0 or not weights[0] > 0.0:
            raise ValueError(
                f"there are {len(sources)} sources with the weights {list(weights)}; allowed are one source or more, "
                "each with a weight from 0, the first above 0; change `data.caption.weights`"
            )
        self.sources, self.weights = list(sources), list(weights)
        self.kinds = frozenset[int]().union(*(source.kinds for source in sources))
        self.draws = 1 + max(source.draws for source in sources)
        self._ends = list(accumulate(weights))

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """The caption of the drawn source."""
        place = draws[0] * self._ends[-1]
        source = next(source for source, end in zip(self.sources, self._ends, strict=True) if place < end)
        return source(texts, draws[1:])


class ShuffledTags:
    """Captions that are lists of tags, in another order in each epoch, some left out.

    The order of tags means nothing, but a text encoder reads it; shuffled, no tag owns a place, and a prompt may name
    them in any order. The tags in front, often the subject or a trigger word, stay where they are and are never left
    out.

    Args:
        source: where the tags come from.
        keep: how many tags in front stay.
        drop_rate: the share of the other tags that is left out, each on its own.
        separator: what stands between tags; they are joined by it and a blank.
        max_tags: tags beyond so many stay at the end, in their order, and are never left out.

    Raises:
        ValueError: if an argument is out of its range.
    """

    def __init__(
        self,
        source: CaptionSource,
        keep: int = 1,
        drop_rate: float = 0.0,
        separator: str = ",",
        max_tags: int = 64,
    ) -> None:
        _check(keep >= 0, "keep", keep, "numbers from 0")
        _check(0.0 <= drop_rate < 1.0, "drop_rate", drop_rate, "0 to below 1")
        _check(bool(separator.strip()), "separator", repr(separator), "characters that are not blanks")
        _check(max_tags > keep, "max_tags", max_tags, f"numbers above `keep`, {keep}")
        self.source, self.keep, self.drop_rate, self.separator = source, keep, drop_rate, separator.strip()
        self.max_tags, self.kinds = max_tags, source.kinds
        self.draws = source.draws + 2 * (max_tags - keep)

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """The tags in their drawn order."""
        caption = self.source(texts, draws[: self.source.draws])
        tags = [tag for part in caption.split(self.separator) if (tag := part.strip())]
        front, movable, rest = tags[: self.keep], tags[self.keep : self.max_tags], tags[self.max_tags :]
        numbers = draws[self.source.draws :]
        order, drops = numbers[: len(movable)], numbers[len(numbers) // 2 :]
        # Zeros keep every tag, for a number below 1 - rate does, and the stable sort keeps their order.
        left = [(place, tag) for place, drop, tag in zip(order, drops, movable, strict=False) if drop < self._kept]
        moved = [tag for _, tag in sorted(left, key=lambda pair: pair[0])]
        return f"{self.separator} ".join([*front, *moved, *rest])

    @property
    def _kept(self) -> float:
        return 1.0 - self.drop_rate


class PlainCaption:
    """A source without chance, for validation: its first caption as it stands.

    Args:
        source: the source.
    """

    draws = 0

    def __init__(self, source: CaptionSource) -> None:
        self.source, self.kinds = source, source.kinds

    def __call__(self, texts: Texts, draws: Sequence[float]) -> str:
        """What the source gives for zeros."""
        return self.source(texts, (0.0,) * self.source.draws)


def _pick(choices: Sequence[str], draw: float) -> str:
    return choices[int(draw * len(choices))]


def _check(is_allowed: bool, key: str, found: object, allowed: str) -> None:
    if not is_allowed:
        raise ValueError(f"{key} is {found}; allowed are {allowed}; change `data.caption.{key}`")
