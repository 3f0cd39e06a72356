"""A shard's metadata from the parquet beside it, as far as that says the same as the samples' `.json`.

img2dataset writes `NNNNN.parquet` beside `NNNNN.tar`: a row for each sample it *tried*, with `key`, `status` and the
fields that the `.json` members hold. Reading two columns of it is hundreds of times as fast as reading ten thousand
members. It is believed only where it cannot differ from the json: a null (or NaN) may stand for a field that is null or
for one that is not there, and a column of texts that are all JSON for values of mixed types. There the json is asked.
Reference: https://github.com/rom1504/img2dataset (the layout), https://parquet.apache.org (the format).
"""

import json
import os
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ldm_train.data.locations import beside
from ldm_train.data.storage import ShardReadError, Storage

MetadataTable = dict[str, dict[str, Any]]  # the fields of a sample by its key
_KEY = "key"
# What pyarrow raises on damaged files, among it ValueError for texts that are no UTF-8.
_DAMAGE = (pa.ArrowException, ValueError, RecursionError)


def parquet_of(location: str) -> str:
    """The parquet that img2dataset writes beside a shard."""
    return beside(location, ".parquet")


def read_table(location: str, fields: Sequence[str], storage: Storage) -> MetadataTable:
    """The fields of each sample whose metadata can be taken from the shard's parquet; empty if there is none to trust.

    Args:
        location: the shard.
        fields: metadata fields, all of which a sample in the table has.
        storage: where it lies.
    """
    try:
        with os.fdopen(storage.open(parquet_of(location)), "rb") as file:
            columns = _read_columns(pq.ParquetFile(file), fields)
    except (OSError, ShardReadError, *_DAMAGE):
        return {}
    if columns is None:
        return {}
    keys, *values = columns
    return {
        key: dict(zip(fields, row, strict=True))
        for key, *row in zip(keys, *values, strict=True)
        if not any(value is None or value != value for value in row)
    }


def _read_columns(file: pq.ParquetFile, fields: Sequence[str]) -> list[list[Any]] | None:
    """The column of keys and those of the fields; None if one is missing or cannot be trusted."""
    wanted = [_KEY, *fields]
    schema = file.schema_arrow
    if any(len(schema.get_all_field_indices(name)) != 1 or not _is_plain(schema.field(name).type) for name in wanted):
        return None
    table = file.read(columns=list(dict.fromkeys(wanted)), use_threads=False)
    columns = [table.column(name).to_pylist() for name in wanted]
    return None if any(_may_be_encoded(column) for column in columns[1:]) else columns


def _is_plain(kind: pa.DataType) -> bool:
    """Whether values of a type come out of a parquet as they come out of json."""
    types = pa.types
    return any(
        test(kind)
        for test in (types.is_integer, types.is_floating, types.is_boolean, types.is_string, types.is_large_string)
    )


def _may_be_encoded(column: list[Any]) -> bool:
    """Whether the column holds texts that may stand for other values: all of them are JSON."""
    texts = [value for value in column if value is not None]
    if not texts or not isinstance(texts[0], str):
        return False
    try:
        for text in texts:
            json.loads(text)
    except RecursionError:
        return True
    except ValueError:
        return False
    return True
