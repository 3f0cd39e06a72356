"""Which samples take part: predicates on a sample's key and metadata, asked once when the index is built.

A filter is any object with a `description`, which enters the index's fingerprint (another filter is another data
set), the metadata `fields` it reads, and a call that says whether to keep a sample. It is given these fields alone,
for they may come from the shard's parquet, where a column is read without the others. A metadata field the sample
lacks is a `KeyError`: the index refuses the sample and counts why, so that a misspelt field is not mistaken for a
filter that lets everything pass.

Fields of LAION's sets: `similarity` of image and caption (CLIP's cosine), `punsafe` and `pwatermark` (probabilities),
`AESTHETIC_SCORE` or `aesthetic` (0 to 10), `NSFW`, `LICENSE`, `LANGUAGE`; img2dataset adds `caption`, `url`, `width`
and `height` of the stored image, `original_width` and `original_height`.
Reference: Schuhmann et al., "LAION-5B" (2022); https://github.com/rom1504/img2dataset (the names of the fields).
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Filter(Protocol):
    """What the index asks of a filter."""

    @property
    def description(self) -> str:
        """What is kept, for a person and for the fingerprint: filters that differ must say so here."""

    @property
    def fields(self) -> tuple[str, ...]:
        """The metadata fields that are read; the call is given no others."""

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample called `key` is kept; KeyError for a missing field, ValueError for a useless value."""


class FieldIn:
    """Keeps samples whose metadata field is one of the values.

    Args:
        field: a field of the sample's `.json`.
        values: what it may be.
    """

    def __init__(self, field: str, values: Sequence[Any]) -> None:
        self.field, self.values, self.fields = field, list(values), (field,)
        self.description = f"{field} in {self.values}"

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        return metadata[self.field] in self.values


class FieldNotIn(FieldIn):
    """Keeps samples whose metadata field is none of the values; arguments as in `FieldIn`."""

    def __init__(self, field: str, values: Sequence[Any]) -> None:
        super().__init__(field, values)
        self.description = f"{field} not in {self.values}"

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        return not super().__call__(key, metadata)


class MinimumSize:
    """Keeps images whose short side has enough pixels, by the `width` and `height` of the metadata.

    Args:
        pixels: the least short side.
    """

    fields = ("width", "height")

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.description = f"short side >= {pixels}"

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        return min(_number(metadata, "width"), _number(metadata, "height")) >= self.pixels


class AspectRatio:
    """Keeps images that are not too long: long side / short side, by the `width` and `height` of the metadata.

    Args:
        max_ratio: the largest ratio, at least 1.

    Raises:
        ValueError: if the ratio is below 1.
    """

    fields = ("width", "height")

    def __init__(self, max_ratio: float) -> None:
        if not max_ratio >= 1.0:
            raise ValueError(
                f"max_ratio is {max_ratio}; allowed are ratios of long to short side, 1 or more; change the "
                "AspectRatio in `data.filters`"
            )
        self.max_ratio = max_ratio
        self.description = f"aspect ratio <= {max_ratio}"

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        short, long = sorted((_number(metadata, "width"), _number(metadata, "height")))
        return short > 0 and long <= self.max_ratio * short


class CaptionLength:
    """Keeps samples whose caption has a number of characters, blanks at both ends not counted.

    Args:
        min: the fewest characters.
        max: the most; None sets no limit.
        field: the metadata field that holds the caption.

    Raises:
        ValueError: if no length lies between the two.
    """

    def __init__(self, min: int = 1, max: int | None = None, field: str = "caption") -> None:
        if max is not None and max < min:
            raise ValueError(
                f"min is {min} and max is {max}; allowed is a max of at least min; change the CaptionLength in "
                "`data.filters`"
            )
        self.min, self.max, self.field, self.fields = min, max, field, (field,)
        self.description = f"{min} <= characters of {field}" + ("" if max is None else f" <= {max}")

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        text = metadata[self.field]
        if text is None:
            raise KeyError(self.field)
        if not isinstance(text, str):
            raise ValueError(f"{self.field} is no text")
        length = len(text.strip())
        return length >= self.min and (self.max is None or length <= self.max)


class Maximum:
    """Keeps samples whose metadata field is a number not above a value: `Maximum("pwatermark", 0.5)`.

    A field that is null or not a number (NaN) counts as missing.

    Args:
        field: a field of the sample's `.json`.
        value: the largest number that is kept.
        keep_missing: keep samples without the field, which are refused and counted otherwise.
    """

    def __init__(self, field: str, value: float, keep_missing: bool = False) -> None:
        self.field, self.value, self.keep_missing, self.fields = field, value, keep_missing, (field,)
        self.description = f"{field} <= {value}" + (" or missing" if keep_missing else "")

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        try:
            return self._is_kept(_number(metadata, self.field))
        except KeyError:
            if self.keep_missing:
                return True
            raise

    def _is_kept(self, number: float) -> bool:
        return number <= self.value


class Minimum(Maximum):
    """Keeps samples whose metadata field is a number not below a value: `Minimum("similarity", 0.3)`.

    Args:
        field: a field of the sample's `.json`.
        value: the smallest number that is kept.
        keep_missing: keep samples without the field, which are refused and counted otherwise.
    """

    def __init__(self, field: str, value: float, keep_missing: bool = False) -> None:
        super().__init__(field, value, keep_missing)
        self.description = f"{field} >= {value}" + (" or missing" if keep_missing else "")

    def _is_kept(self, number: float) -> bool:
        return number >= self.value


def _number(metadata: Mapping[str, Any], field: str) -> float:
    """A field's number; KeyError where there is none, ValueError where it is something else."""
    value = metadata[field]
    if value is None or value != value:
        raise KeyError(field)
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value):
        raise ValueError(f"{field} is no number")
    return value
