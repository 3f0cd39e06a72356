"""Shards in img2dataset's layout: what the readers in this package expect, and the one place that writes it.

    00000.tar            <key>.json  <key>.txt  <key>.webp | png | jpg     with <key> = 5 digits of shard, 4 of sample
                         and <key>.seg.png where a sample has a segmentation map
    00000_stats.json     how many samples the shard must hold
    00000.parquet        one row of metadata per sample, the same values as in the json

The bytes depend on the samples alone (no clock, no user name), so that writing twice gives the same files.
Reference: https://github.com/rom1504/img2dataset (the layout), https://github.com/webdataset/webdataset (the format).
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import pyarrow as pa
import pyarrow.parquet as pq
from webdataset.writer import TarWriter

MAX_SAMPLES_PER_SHARD = 10_000
SHARD_FILE = re.compile(r"\d{5,}(\.tar|_stats\.json|\.parquet)")


@dataclass(frozen=True)
class ShardSample:
    """One captioned image as it will lie in a shard.

    Attributes:
        image: the encoded image.
        extension: of the image's member: `jpg`, `png` or `webp`.
        caption: the text; may be empty.
        metadata: further json fields; `key`, `caption` and `status` are added by the writer.
        segmentation: the PNG with the classes of the pixels; None where there is none.
    """

    image: bytes
    extension: str
    caption: str
    metadata: dict[str, Any] = field(default_factory=dict)
    segmentation: bytes | None = None


class ShardWriter:
    """Writes samples, in the order they come, into numbered shards.

    Args:
        folder: an existing folder; files of the same names are overwritten.
        samples_per_shard: 1 to 10000, for the key has four digits for the sample.

    Raises:
        ValueError: if `samples_per_shard` is out of range.
    """

    def __init__(self, folder: Path, samples_per_shard: int = MAX_SAMPLES_PER_SHARD) -> None:
        if not 1 <= samples_per_shard <= MAX_SAMPLES_PER_SHARD:
            raise ValueError(
                f"samples_per_shard is {samples_per_shard}; allowed: 1 to {MAX_SAMPLES_PER_SHARD}; "
                "change --samples-per-shard."
            )
        self.folder = folder
        self.samples_per_shard = samples_per_shard
        self.num_shards = 0
        self._stream: BinaryIO | None = None
        self._rows: list[dict[str, Any]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._finish_shard()
        elif self._stream is not None:
            self._stream.close()

    def write(self, sample: ShardSample) -> str:
        """Append a sample and return its key."""
        if len(self._rows) == self.samples_per_shard:
            self._finish_shard()
        if self._stream is None:
            self._start_shard()
        key = f"{self.num_shards:05d}{len(self._rows):04d}"
        fixed = {"key": key, "caption": sample.caption, "status": "success"}
        row = fixed | sample.metadata | fixed
        members: dict[str, Any] = {
            "__key__": key,
            sample.extension: sample.image,
            "txt": sample.caption.encode(),
            "json": _json(row).encode(),
        }
        if sample.segmentation is not None:
            members["seg.png"] = sample.segmentation
        self._tar.write(members)
        self._rows.append(row)
        return key

    def _start_shard(self) -> None:
        self._stream = (self.folder / f"{self.num_shards:05d}.tar").open("wb")
        self._tar = TarWriter(self._stream, user="", group="", mtime=0, encoder=False)

    def _finish_shard(self) -> None:
        if self._stream is None:
            return
        self._tar.close()
        self._stream.close()
        self._stream = None
        name = f"{self.num_shards:05d}"
        pq.write_table(metadata_table(self._rows), self.folder / f"{name}.parquet", compression="zstd")
        stats = {
            "count": len(self._rows),
            "successes": len(self._rows),
            "failed_to_download": 0,
            "failed_to_resize": 0,
            "status_dict": {"success": len(self._rows)},
        }
        (self.folder / f"{name}_stats.json").write_text(json.dumps(stats, indent=4) + "\n", encoding="utf-8")
        self._rows = []
        self.num_shards += 1


def metadata_table(rows: list[dict[str, Any]]) -> pa.Table:
    """A table of the rows: objects and lists as their json, as are columns whose values share no type."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    return pa.table({name: _column([row.get(name) for row in rows]) for name in names})


def _column(values: list[Any]) -> pa.Array:
    values = [_json(value) if isinstance(value, dict | list) else value for value in values]
    kinds = {type(value) for value in values if value is not None}
    try:
        if bool in kinds and len(kinds) > 1:  # in a column of numbers true would become 1
            raise pa.ArrowTypeError("mixed types")
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array([None if value is None else _json(value) for value in values])


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)
