"""Writing a latent cache: shard by shard, each complete or absent, by any number of processes that never talk.

A process writes a shard under a temporary name, renames it, and then writes the shard's record beside it. So a shard
with a record is whole, one without is made again, and whoever finds the last record writes the manifest. Which process
makes which shard does not change a byte.

Layout: see `ldm_train.data.latents`.
"""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor
from webdataset.writer import TarWriter

from ldm_train.checkpoint import atomic_write
from ldm_train.data.latent_encoding import Entry
from ldm_train.data.latents import EXTENSION, MANIFEST, VERSION, LatentSettings

_COPIED = ("_stats.json", ".parquet")  # what img2dataset writes beside a shard, and stays true of it


@dataclass
class ValueRange:
    """Count, extremes and sums of values that come in pieces; sums are in float64."""

    count: int = 0
    low: float = 0.0
    high: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: Tensor) -> None:
        """Take values of any shape and floating-point type into account."""
        flat = values.double()
        low, high = flat.aminmax()
        self.merge(ValueRange(flat.numel(), float(low), float(high), float(flat.sum()), float(flat.square().sum())))

    def merge(self, other: "ValueRange") -> None:
        """Take all that another one has seen into account."""
        if not self.count or not other.count:
            self.low, self.high = self.low + other.low, self.high + other.high  # one of them is nothing
        else:
            self.low, self.high = min(self.low, other.low), max(self.high, other.high)
        self.count += other.count
        self.total += other.total
        self.squares += other.squares

    def summary(self) -> dict[str, float]:
        """Extremes, mean and standard deviation; zeros of nothing."""
        if not self.count:
            return {"min": 0.0, "max": 0.0, "mean": 0.0, "std": 0.0}
        mean = self.total / self.count
        variance = max(0.0, self.squares / self.count - mean**2)
        return {"min": self.low, "max": self.high, "mean": mean, "std": math.sqrt(variance)}


@dataclass
class ShardRecord:
    """What became of one source shard.

    Attributes:
        name: of the shard, relative to the folder that holds all of them.
        source_size: bytes of the source shard.
        settings: what the values depend on besides the images.
        size: bytes of the cached shard.
        samples: how many it holds, damaged ones included.
        damaged: key and reason of each sample whose image could not be decoded.
        left_out: what in the source shard is no sample, a line each.
        shapes: `<k C>x<h>x<w>` -> number of samples.
        images: the values that were encoded.
        moments: the values that were stored.
    """

    name: str
    source_size: int
    settings: LatentSettings
    size: int = 0
    samples: int = 0
    damaged: list[dict[str, str]] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    shapes: dict[str, int] = field(default_factory=dict)
    images: ValueRange = field(default_factory=ValueRange)
    moments: ValueRange = field(default_factory=ValueRange)

    @classmethod
    def read(cls, path: Path) -> "ShardRecord | None":
        """The record in a file; `None` if there is none that can be read."""
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("version") != VERSION:
                return None
            content["settings"] = LatentSettings(**content["settings"])
            for part in ("images", "moments"):
                content[part] = ValueRange(**content[part])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        with atomic_write(path) as temporary:
            _write_json(temporary, {"version": VERSION, **asdict(self)})


def shard_names(paths: Sequence[str]) -> tuple[Path, list[str]]:
    """The folder that holds all of some shards, and their names relative to it."""
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    return Path(root), [os.path.relpath(path, root) for path in paths]


class LatentCacheWriter:
    """The folder of a cache while it is being made.

    Args:
        folder: where it will lie; made if it is not there.
        paths: all source shards, those of other processes included.
        settings: of this cache.
        description: further facts for the manifest, such as the autoencoder's config.

    Raises:
        ValueError: if the folder is that of the source shards, which would be overwritten.
    """

    def __init__(
        self, folder: Path, paths: Sequence[str], settings: LatentSettings, description: dict[str, Any]
    ) -> None:
        self.folder, self.paths, self.settings, self.description = folder, tuple(paths), settings, description
        self.root, self.names = shard_names(paths)
        if folder.resolve() == self.root.resolve():
            raise ValueError(
                f"{folder} holds the source shards, which the cache's would replace; allowed is another folder; change "
                "--output"
            )

    def record_path(self, name: str) -> Path:
        """Where a shard's record lies."""
        return self.folder / f"{name.removesuffix('.tar')}_latents.json"

    def record(self, path: str, name: str) -> ShardRecord | None:
        """The record of a shard that is there as a whole, made from the source as it is now; else `None`.

        Raises:
            ValueError: if the shard was made with other settings, or from another file.
        """
        record = ShardRecord.read(self.record_path(name))
        target = self.folder / name
        if record is None or not target.is_file() or target.stat().st_size != record.size:
            return None
        differences = record.settings.differences(self.settings)
        if (size := os.path.getsize(path)) != record.source_size:
            differences.append(f"bytes of {path}: {record.source_size} -> {size}")
        if differences:
            raise ValueError(
                f"{target} was made with {', '.join(differences)}; allowed is one kind of latents in a folder; change "
                "--output, or add --overwrite to make this one anew"
            )
        return record

    def forget(self, names: Iterable[str]) -> None:
        """Remove the records of shards, and the manifest, so that these are made again."""
        for path in (self.folder / MANIFEST, *map(self.record_path, names)):
            path.unlink(missing_ok=True)

    @contextmanager
    def shard(self, path: str, name: str) -> Iterator["_OpenShard"]:
        """Yields a shard to be filled; if nothing fails, it is there as a whole afterwards, and its record."""
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        record = ShardRecord(name, os.path.getsize(path), self.settings)
        with atomic_write(target) as temporary:
            with temporary.open("wb") as stream:
                tar = TarWriter(stream, user="", group="", mtime=0, encoder=False)
                yield _OpenShard(tar, record)
                tar.close()
            record.size = temporary.stat().st_size
        for ending in _COPIED:
            beside = Path(path.removesuffix(".tar") + ending)
            if beside.is_file():
                with atomic_write(self.folder / (name.removesuffix(".tar") + ending)) as temporary:
                    shutil.copyfile(beside, temporary)
        record.write(self.record_path(name))

    def merge(self) -> list[str]:
        """Write the manifest if all shards are there.

        Returns:
            The names of those that are not; empty if the cache is complete.

        Raises:
            ValueError: if a shard was made with other settings.
        """
        found = {name: self.record(path, name) for path, name in zip(self.paths, self.names, strict=True)}
        missing = [name for name, record in found.items() if record is None]
        if not missing:
            with atomic_write(self.folder / MANIFEST) as temporary:
                _write_json(temporary, self._manifest([record for record in found.values() if record is not None]))
        return missing

    def _manifest(self, records: Sequence[ShardRecord]) -> dict[str, Any]:
        images, moments, shapes = ValueRange(), ValueRange(), dict[str, int]()
        for record in records:
            images.merge(record.images)
            moments.merge(record.moments)
            for shape, count in record.shapes.items():
                shapes[shape] = shapes.get(shape, 0) + count
        shards = [{"name": r.name, "size": r.source_size, "samples": r.samples} for r in records]
        fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
        return {
            "version": VERSION,
            "settings": asdict(self.settings),
            **self.description,
            "source": {"root": str(self.root), "fingerprint": fingerprint, "shards": shards},
            "samples": sum(record.samples for record in records),
            "damaged": sum(len(record.damaged) for record in records),
            "shapes": shapes,
            "images": images.summary(),
            "moments": moments.summary(),
            "shards": [{"name": record.name, "size": record.size} for record in records],
        }


class _OpenShard:
    """A shard that is being filled, and its record."""

    def __init__(self, tar: TarWriter, record: ShardRecord) -> None:
        self._tar, self.record = tar, record

    def add(self, entry: Entry) -> None:
        """Append a sample, and enter it into the record."""
        picture, record = entry.picture, self.record
        self._tar.write({"__key__": picture.key, EXTENSION: entry.latent, **picture.members})
        record.samples += 1
        if entry.moments is None:
            record.damaged.append({"key": picture.key, "reason": str(picture.failure)})
        else:
            record.moments.add(entry.moments)
            shape = "x".join(map(str, entry.moments.shape[1:]))
            record.shapes[shape] = record.shapes.get(shape, 0) + 1


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
