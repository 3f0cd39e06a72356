"""Which samples take part: predicates on a sample's key and metadata, asked once when the index is built.

A filter is any object with a `description`, which enters the index's fingerprint (another filter is another data
set), and a call that says whether to keep a sample. A metadata field the sample lacks is a `KeyError`: the index
refuses the sample and counts why, so that a misspelt field is not mistaken for a filter that lets everything pass.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol


class Filter(Protocol):
    """What the index asks of a filter."""

    @property
    def description(self) -> str:
        """What is kept, for a person and for the fingerprint."""

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample called `key` is kept."""


class FieldIn:
    """Keeps samples whose metadata field is one of the values.

    Args:
        field: a field of the sample's `.json`.
        values: what it may be.
    """

    def __init__(self, field: str, values: Sequence[Any]) -> None:
        self.field, self.values = field, list(values)
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

    def __init__(self, pixels: int) -> None:
        self.pixels = pixels
        self.description = f"short side >= {pixels}"

    def __call__(self, key: str, metadata: Mapping[str, Any]) -> bool:
        """Whether the sample is kept."""
        return min(metadata["width"], metadata["height"]) >= self.pixels
