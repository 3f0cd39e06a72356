"""Reads a W&B run's record file (`run-<id>.wandb`) back; wandb 0.31 ships its definitions but no reader.

The file is a LevelDB log: a 7-byte header, then blocks of 32 768 bytes of chunks

    crc32 (4 bytes), length (2, little-endian), kind (1: full, 2: first, 3: middle, 4: last), data (length)

where less than 7 bytes left in a block are padding. The data of a full chunk, or of a first to a last, is a `Record`
protocol buffer.
"""

import json
import time
from collections.abc import Iterator
from pathlib import Path

from wandb.proto import wandb_internal_pb2

_BLOCK, _FILE_HEADER, _CHUNK_HEADER = 32768, 7, 7
_FULL, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


def records(path: str | Path) -> Iterator[wandb_internal_pb2.Record]:
    """All records of a file in order; a chunk that a kill cut short ends it."""
    data = Path(path).read_bytes()
    assert data[:4] == b":W&B", f"{path} is no W&B record file"
    position, parts = _FILE_HEADER, b""
    while position + _CHUNK_HEADER <= len(data):
        left = _BLOCK - position % _BLOCK
        if left < _CHUNK_HEADER:
            position += left
            continue
        length = int.from_bytes(data[position + 4 : position + 6], "little")
        kind = data[position + 6]
        chunk = data[position + _CHUNK_HEADER : position + _CHUNK_HEADER + length]
        position += _CHUNK_HEADER + length
        if kind not in (_FULL, _FIRST, _MIDDLE, _LAST) or len(chunk) < length:
            return
        parts = chunk if kind in (_FULL, _FIRST) else parts + chunk
        if kind in (_FULL, _LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record


def history(path: str | Path) -> list[dict[str, object]]:
    """The logged rows: key -> value, as `wandb.log` got them."""
    rows = []
    for record in records(path):
        if record.HasField("history"):
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def run_record(path: str | Path) -> wandb_internal_pb2.RunRecord:
    """The run itself: id, project, name, tags."""
    return next(record.run for record in records(path) if record.HasField("run"))


def record_files(run_dir: str | Path, timeout: float = 20.0) -> list[Path]:
    """The record files below a run directory, one for each start, oldest first.

    `finish` returns before W&B's own process has written its last block: this waits for the record of the end. A run
    that was killed has none, and is returned as it is after the timeout.
    """
    paths = sorted(Path(run_dir).glob("wandb/*run-*/run-*.wandb"))
    end = time.monotonic() + timeout
    while not all(_has_ended(path) for path in paths) and time.monotonic() < end:
        time.sleep(0.05)
    return paths


def _has_ended(path: Path) -> bool:
    return any(record.HasField("exit") for record in records(path))
