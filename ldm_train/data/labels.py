"""Class labels: what makes a number out of a sample's metadata, for class-conditional models.

Labels are read with the sample and not with the index, so that asking for them costs nothing at the start and changes
no order of the data. A sample whose label is unknown counts as one that cannot be decoded: it is named in the
quarantine and replaced, and a misspelt field ends the run within its first batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from ldm_train.data.quarantine import LabelError


class Label(Protocol):
    """What the data set asks of a labelling: classes are numbered from 0 to `num_classes` - 1."""

    num_classes: int

    def __call__(self, metadata: Mapping[str, Any]) -> int:
        """The class of a sample, by its metadata."""
        ...


class FieldLabel:
    """The class is a metadata field.

    Args:
        field: a field of the sample's `.json`.
        classes: the values it may have, in the order of their numbers; or, for fields that hold the number itself, how
            many classes there are.

    Raises:
        ValueError: if there are no classes, or a class is named twice.
    """

    def __init__(self, field: str, classes: Sequence[str | int] | int) -> None:
        values = range(classes) if isinstance(classes, int) else classes
        self._numbers = {value: number for number, value in enumerate(values)}
        if not values or len(self._numbers) < len(values):
            raise ValueError(
                f"classes is {classes!r}; allowed are different values of the field, or how many integers it may be, "
                "at least one; change `data.label.classes`"
            )
        self.field, self.num_classes = field, len(values)

    def __call__(self, metadata: Mapping[str, Any]) -> int:
        """The class of a sample.

        Raises:
            KeyError: if the sample has no such field.
            LabelError: if the field's value is none of the classes.
        """
        if self.field not in metadata:
            raise KeyError(f"no metadata field {self.field!r}, which `data.label.field` names")
        value = metadata[self.field]
        # True == 1 in Python, but it is no class that somebody has numbered.
        if isinstance(value, bool) or not isinstance(value, str | int) or value not in self._numbers:
            raise LabelError(
                f"{self.field} is {value!r}, which is no class; add it to `data.label.classes`, or leave such samples "
                "out by `data.filters`"
            )
        return self._numbers[value]
