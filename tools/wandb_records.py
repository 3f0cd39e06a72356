"""W&B's record files: read back, and written with steps that go on where another file ends.

`run-<id>.wandb` is a LevelDB log behind a header of 7 bytes (`:W&B`, 0xBEE1, version 0): blocks of 32,768 bytes hold
chunks

    crc32 of kind and data (4 bytes), length of the data (2), kind (1), data

where a record is one chunk (kind 1), or a first, middle ones and a last (2, 3, 4); less than 7 bytes left in a block
are padding. All numbers are little-endian. A record is a protocol buffer.

A run that starts again offline begins a new file, in which W&B counts its rows (`_step`) from 0 again: rows of two
files would then have one number.
"""

import json
import struct
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

_BLOCK, _CHUNK_HEADER = 32768, 7
_HEADER = struct.pack("<4sHB", b":W&B", 0xBEE1, 0)
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4
_STEP = "_step"

Record = wandb_internal_pb2.Record


def read_records(path: Path) -> Iterator[Record]:
    """All records of a file in order; one that a kill cut short ends it.

    Raises:
        ValueError: if it is no record file.
    """
    data = path.read_bytes()
    if data[:4] != _HEADER[:4]:
        raise ValueError(f"{path} is no W&B record file; allowed are run-<id>.wandb; remove it, or restore it")
    position, parts = len(_HEADER), b""
    while position + _CHUNK_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER:
            position += left
            continue
        check, length, kind = struct.unpack_from("<IHB", data, position)
        chunk = data[position + _CHUNK_HEADER : position + _CHUNK_HEADER + length]
        position += _CHUNK_HEADER + length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or zlib.crc32(bytes([kind]) + chunk) != check:
            return
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            record = Record()
            record.ParseFromString(parts)
            yield record


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records to a new file."""
    with path.open("wb") as file:
        file.write(_HEADER)
        position = len(_HEADER)
        for record in records:
            for chunk in _chunks(record.SerializeToString(), position):
                file.write(chunk)
                position += len(chunk)


def _chunks(data: bytes, position: int) -> Iterator[bytes]:
    is_first = True
    while True:
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER:
            yield b"\0" * left
            position += left
            continue
        part, data = data[: left - _CHUNK_HEADER], data[left - _CHUNK_HEADER :]
        kind = {(True, False): _FULL, (True, True): _FIRST, (False, True): _MIDDLE, (False, False): _LAST}[
            is_first, bool(data)
        ]
        yield struct.pack("<IHB", zlib.crc32(bytes([kind]) + part), len(part), kind) + part
        position += _CHUNK_HEADER + len(part)
        is_first = False
        if not data:
            return


def num_steps(records: Iterable[Record]) -> int:
    """One more than the largest number of a row; 0 where there is none."""
    return max((step_of(record) + 1 for record in records if record.HasField("history")), default=0)


def step_of(record: Record) -> int:
    """The number of a row."""
    for item in record.history.item:
        if _names(item, _STEP):
            return int(json.loads(item.value_json))
    return int(record.history.step.num)


def shifted(records: Iterable[Record], offset: int, after: int = -1) -> Iterator[Record]:
    """The records with all steps larger by `offset`, without the rows whose step is then at most `after`."""
    for record in records:
        record = _shifted(record, offset)
        if not record.HasField("history") or step_of(record) > after:
            yield record


def _shifted(record: Record, offset: int) -> Record:
    copy = Record()
    copy.CopyFrom(record)
    items = [*copy.history.item] if copy.HasField("history") else []
    items += [*copy.summary.update] if copy.HasField("summary") else []
    for item in items:
        if _names(item, _STEP):
            item.value_json = json.dumps(int(json.loads(item.value_json)) + offset)
    if copy.HasField("history") and copy.history.HasField("step"):
        copy.history.step.num += offset
    return copy


def _names(item: wandb_internal_pb2.HistoryItem, key: str) -> bool:
    return item.key == key or list(item.nested_key) == [key]
