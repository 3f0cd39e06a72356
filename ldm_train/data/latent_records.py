"""What is known of the shards of a latent cache that were made, each in a `<shard>_latents.json` beside it.

A record says of which content its shard was made: a hash of all bytes of the source (BLAKE2b, RFC 7693), computed
right after they were encoded, from pages that are still in memory, at one or two seconds a gigabyte. A sample of the
bytes would cost less, and miss an image in whose place another of the same size was put. As long as location, size and
time of change are the ones that were noted, the source counts as unchanged and is not read again; else it is hashed
anew, so that a copy is known for a copy, and a change of equal size for a change.
"""

import hashlib
import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from ldm_train.checkpoint import atomic_write
from ldm_train.data.latent_settings import LatentSettings
from ldm_train.data.latents import VERSION
from ldm_train.data.locations import is_url, lasting
from ldm_train.data.storage import Identity, Storage

_BLOCK = 1 << 22


@dataclass(frozen=True)
class SourceShard:
    """A source shard when its latents were made.

    Attributes:
        location: its absolute path, or the `lasting` form of its URL.
        size: bytes.
        version: as of `Storage.identity`, the time of change or an entity tag.
        digest: hash of its bytes, 32 hexadecimal digits.
    """

    location: str
    size: int
    version: str
    digest: str

    @classmethod
    def of(cls, path: str, identity: Identity, storage: Storage) -> "SourceShard":
        """A shard as it is now; reads all of it."""
        return cls(location_of(path), *identity, digest_of(path, storage))


def location_of(path: str) -> str:
    """What a record calls a shard."""
    return lasting(path) if is_url(path) else os.path.abspath(path)


def digest_of(path: str, storage: Storage) -> str:
    """BLAKE2b of all bytes of a file, 32 hexadecimal digits."""
    digest = hashlib.blake2b(digest_size=16)
    with os.fdopen(storage.open(path), "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
        source: the source shard as it was.
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
    source: SourceShard
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
            content["settings"] = LatentSettings.read(content["settings"])
            content["source"] = SourceShard(**content["source"])
            for part in ("images", "moments"):
                content[part] = ValueRange(**content[part])
            return cls(**content)
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the record, whole or not at all."""
        with atomic_write(path) as temporary:
            write_json(temporary, {"version": VERSION, **asdict(self)})


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write an object for people and programs."""
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
