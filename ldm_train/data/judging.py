"""Filters, asked about the samples of one shard.

The metadata come from the shard's parquet where it has what the filters read, else from the samples' `.json` members,
so that both give the same selection (`ldm_train.data.parquet`).
"""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ldm_train.data.filters import Filter
from ldm_train.data.parquet import read_table
from ldm_train.data.quarantine import MetadataError
from ldm_train.data.scanning import KINDS, METADATA
from ldm_train.data.shards import ShardReader
from ldm_train.data.storage import Storage


class ShardSamples(NamedTuple):
    """What there is to judge: n samples of a shard.

    Attributes:
        location: the shard.
        keys: their names.
        places: (n, 2) int64 byte offset and size of the `.json`, whose size is -1 where there is none.
    """

    location: str
    keys: list[bytes]
    places: np.ndarray


@dataclass(frozen=True)
class Judge:
    """Says which samples every filter keeps; the first filter that refuses a sample is the one that is counted.

    Attributes:
        filters: the filters.
        storage: where the shards lie.
    """

    filters: Sequence[Filter]
    storage: Storage

    @property
    def fields(self) -> tuple[str, ...]:
        """The metadata fields that the filters read, each once."""
        return tuple(dict.fromkeys(field for filter_ in self.filters for field in filter_.fields))

    def __call__(self, samples: ShardSamples) -> tuple[np.ndarray, Counter[str]]:
        """Which samples of a shard are kept, (n,) bool, and how many are not, by reason."""
        fields = self.fields
        table = read_table(samples.location, fields, self.storage) if fields and samples.keys else {}
        reader = ShardReader((samples.location,), self.storage)
        keep = np.zeros(len(samples.keys), dtype=bool)
        refused: Counter[str] = Counter()
        for row, (name, place) in enumerate(zip(samples.keys, samples.places.tolist(), strict=True)):
            key = name.decode()
            try:
                metadata = table[key] if key in table else read_metadata(reader, 0, *place) if fields else {}
            except (KeyError, ValueError) as error:
                refused[f"metadata: {error.args[0]}"] += 1
                continue
            reason = self._refusal(key, {field: metadata[field] for field in fields if field in metadata})
            keep[row] = reason is None
            if reason is not None:
                refused[reason] += 1
        reader.close()
        return keep, refused

    def _refusal(self, key: str, metadata: dict[str, Any]) -> str | None:
        for filter_ in self.filters:
            try:
                if not filter_(key, metadata):
                    return f"fails: {filter_.description}"
            except KeyError as error:
                return f"no metadata field {error} for {filter_.description}"
            except ValueError as error:
                return f"{error}, for {filter_.description}"
            except TypeError:
                return f"a metadata field of another type than {filter_.description} needs"
        return None


def read_metadata(reader: ShardReader, shard: int, offset: int, size: int) -> dict[str, Any]:
    """A `.json` member; KeyError if there is none (`size` is negative), MetadataError if it is no JSON object."""
    if size < 0:
        raise KeyError(f"no {KINDS[METADATA]}")
    try:
        metadata = json.loads(reader.read(shard, offset, size))
    except RecursionError as error:
        raise MetadataError("nested too deep") from error
    except ValueError as error:
        raise MetadataError(str(error)) from error
    if not isinstance(metadata, dict):
        raise MetadataError("not a JSON object")
    return metadata
