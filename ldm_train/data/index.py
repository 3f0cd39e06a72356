"""What there is to train on: every complete sample of the shards, found once from the tar headers.

A sample is the members of a shard that share a name up to the first dot: an image, a `.txt` caption, a `.json` with
metadata (the layout of WebDataset and img2dataset), if wanted a segmentation map. The index holds its position as
compact arrays, one row a sample, in the order of the shards; a row number is all that the sampler and the workers
exchange. What is no complete sample is listed as damage, what a filter refuses is counted by reason: nothing is left
out in silence.

The fingerprint hashes the shards' names and sizes, the samples they hold, and how these were selected. Runs with
equal fingerprints see equal rows.
"""

import glob
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from braceexpand import braceexpand

from ldm_train.data.filters import Filter
from ldm_train.data.shards import Member, ShardReader, scan_shard

IMAGE, CAPTION, METADATA, SEGMENTATION = 0, 1, 2, 3
_KINDS = ("image", "caption (.txt)", "metadata (.json)", "segmentation map")
_KIND_OF_EXTENSION = {"jpg": IMAGE, "jpeg": IMAGE, "png": IMAGE, "webp": IMAGE, "txt": CAPTION, "json": METADATA}
_KIND_OF_EXTENSION["latent"] = IMAGE  # what `ldm_train.data.latents` puts in the place of an image
_ABSENT = (0, -1)


class Damage(NamedTuple):
    """Something in a shard that is not a complete sample and was left out."""

    shard: str
    reason: str


def expand_shards(shards: str | Sequence[str], key: str = "data.shards") -> tuple[str, ...]:
    """The files that brace patterns (`{00000..00003}.tar`), globs (`*.tar`) and paths name, each once, in order.

    Args:
        shards: one pattern or a list of them.
        key: the config key they come from, for error messages.
    """
    paths: list[str] = []
    for pattern in [shards] if isinstance(shards, str) else shards:
        if re.match(r"pipe:|\w+://", pattern):
            raise ValueError(f"`{key}` names {pattern!r}; allowed are files on a mounted disk: copy the shards there.")
        for name in braceexpand(os.path.expanduser(pattern)):
            found = [name] if os.path.isfile(name) else sorted(glob.glob(name))
            if not found:
                folder = os.path.dirname(os.path.abspath(name))
                state = "exists" if os.path.isdir(folder) else "does not exist"
                raise FileNotFoundError(
                    f"no shard {os.path.basename(name)!r} in {folder} (the folder {state}). Allowed are paths, globs "
                    f"and brace patterns of existing tar files; `{key}` is {pattern!r}."
                )
            paths += found
    path, count = Counter(map(os.path.realpath, paths)).most_common(1)[0] if paths else ("", 0)
    if count > 1:
        raise ValueError(f"the shard {path} is named {count} times; each may take part once: shorten `{key}`.")
    if not paths:
        raise ValueError(f"`{key}` is empty; it must name at least one tar file.")
    return tuple(paths)


@dataclass(frozen=True, eq=False)
class ShardIndex:
    """The samples of a list of shards; N rows in S shards.

    Attributes:
        paths: S shard files.
        names: their paths relative to the folder that holds them all, for people and for the fingerprint.
        file_sizes: their bytes.
        starts: (S + 1,) int64; shard s holds the rows from `starts[s]` to `starts[s + 1]`.
        offsets: (N, 3) int64 bytes to the image, the caption and the metadata; (N, 4) if segmentation maps are indexed.
        sizes: bytes of them, int32, -1 where there is none.
        sample_id: (N,) int64, the sample's number before any filter or split, so that neither changes it.
        key_spans: (N, 2) int64 begin and end of the key in `key_bytes`.
        key_bytes: all keys, joined.
        selection: how the rows were selected, one line a step.
        damage: what was left out as incomplete or unreadable.
        refused: samples left out by filters, counted by reason.
    """

    paths: tuple[str, ...]
    names: tuple[str, ...]
    file_sizes: tuple[int, ...]
    starts: np.ndarray
    offsets: np.ndarray
    sizes: np.ndarray
    sample_id: np.ndarray
    key_spans: np.ndarray
    key_bytes: bytes
    selection: tuple[str, ...] = ()
    damage: tuple[Damage, ...] = ()
    refused: Counter[str] = field(default_factory=Counter)

    def __len__(self) -> int:
        return len(self.sample_id)

    def shard_of(self, row: int) -> int:
        """The number of the shard that holds a row."""
        return int(np.searchsorted(self.starts, row, side="right")) - 1

    def key(self, row: int) -> str:
        """The sample's own name, `__key__` in WebDataset's terms."""
        begin, end = self.key_spans[row]
        return self.key_bytes[begin:end].decode()

    def full_key(self, row: int) -> str:
        """`<shard>/<key>`, unique among all shards."""
        return f"{self.names[self.shard_of(row)].removesuffix('.tar')}/{self.key(row)}"

    def key_hash(self, purpose: str) -> np.ndarray:
        """(N,) uint64 hashes of the keys, uniform and independent of how samples are spread over shards."""
        hashes = (
            hashlib.blake2b(self.key_bytes[begin:end], digest_size=8, person=purpose.encode()).digest()
            for begin, end in self.key_spans.tolist()
        )
        return np.frombuffer(b"".join(hashes), dtype="<u8")

    def select(self, keep: np.ndarray, description: str) -> "ShardIndex":
        """The index of the rows where `keep` (N,) is true; the description enters the fingerprint."""
        kept_before = np.concatenate(([0], np.cumsum(keep)))
        return replace(
            self,
            starts=kept_before[self.starts],
            offsets=self.offsets[keep],
            sizes=self.sizes[keep],
            sample_id=self.sample_id[keep],
            key_spans=self.key_spans[keep],
            selection=(*self.selection, description),
        )

    def filtered(self, filters: Iterable[Filter]) -> "ShardIndex":
        """The samples that every filter keeps; the first filter that refuses a sample is the one that is counted."""
        filters, reader = list(filters), ShardReader(self.paths)
        if not filters:
            return self
        refused: Counter[str] = Counter()
        keep = np.zeros(len(self), dtype=bool)
        for row in range(len(self)):
            reason = self._refusal(reader, row, filters)
            keep[row] = reason is None
            if reason is not None:
                refused[reason] += 1
        reader.close()
        selected = self.select(keep, " and ".join(filter_.description for filter_ in filters))
        return replace(selected, refused=self.refused + refused)

    def _refusal(self, reader: ShardReader, row: int, filters: Sequence[Filter]) -> str | None:
        try:
            key, metadata = self.key(row), self.metadata(reader, row)
        except (KeyError, ValueError) as error:
            return f"metadata: {error.args[0]}"
        for filter_ in filters:
            try:
                if not filter_(key, metadata):
                    return f"fails: {filter_.description}"
            except KeyError as error:
                return f"no metadata field {error} for {filter_.description}"
        return None

    def metadata(self, reader: ShardReader, row: int) -> dict[str, Any]:
        """The sample's `.json`; KeyError if it has none, ValueError if it is no JSON object."""
        metadata = json.loads(self.read(reader, row, METADATA))
        if not isinstance(metadata, dict):
            raise ValueError("not a JSON object")
        return metadata

    def read(self, reader: ShardReader, row: int, kind: int) -> bytes:
        """The bytes of a sample's `IMAGE`, `CAPTION`, `METADATA` or `SEGMENTATION`; KeyError if it has none."""
        offset, size = int(self.offsets[row, kind]), int(self.sizes[row, kind])
        if size < 0:
            raise KeyError(f"no {_KINDS[kind]}")
        return reader.read(self.shard_of(row), offset, size)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the shards' names, sizes and rows, and of the selection, as 64 hexadecimal digits."""
        rows = np.diff(self.starts).tolist()
        identity = [list(self.names), list(self.file_sizes), rows, list(self.selection)]
        return hashlib.sha256(json.dumps(identity).encode()).hexdigest()


def _group(
    members: list[Member], kinds: dict[str, int], required: Sequence[int]
) -> tuple[dict[str, list[tuple[int, int]]], list[str]]:
    """Complete samples of a shard by key, an (offset, size) for each kind; a line for each incomplete or double one."""
    width = max(kinds.values()) + 1
    samples: dict[str, list[tuple[int, int]]] = {}
    spoiled: dict[str, str] = {}
    for name, offset, size in members:
        folder, slash, file = name.rpartition("/")
        stem, _, extension = file.partition(".")
        kind = kinds.get(extension.lower())
        if kind is None:
            continue
        key = folder + slash + stem
        sample = samples.get(key)
        if sample is None:
            sample = samples[key] = [_ABSENT] * width
        elif sample[kind] is not _ABSENT:
            spoiled[key] = f"{key}: more than one {_KINDS[kind]}"
        sample[kind] = (offset, size)
    for key, sample in samples.items():
        missing = [_KINDS[kind] for kind in required if sample[kind] is _ABSENT]
        if missing:
            spoiled[key] = f"{key}: no {' and no '.join(missing)}"
        elif sample[IMAGE][1] == 0:
            spoiled[key] = f"{key}: the image is empty"
    return {key: sample for key, sample in samples.items() if key not in spoiled}, list(spoiled.values())


def _promised(path: str) -> int | None:
    """The number of samples that img2dataset's `<shard>_stats.json` says it wrote."""
    try:
        with open(path.removesuffix(".tar") + "_stats.json", encoding="utf-8") as file:
            return int(json.load(file)["successes"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def build_index(
    paths: Sequence[str], required: Sequence[int] = (IMAGE, CAPTION), segmentation: str | None = None
) -> ShardIndex:
    """Index shards by reading their tar headers.

    Args:
        paths: tar files, see `expand_shards`.
        required: the members without which a sample is incomplete.
        segmentation: the extension of segmentation maps, in lower case, without which a sample is incomplete too;
            `None` indexes none.
    """
    kinds = _KIND_OF_EXTENSION
    if segmentation is not None:
        kinds, required = kinds | {segmentation: SEGMENTATION}, (*required, SEGMENTATION)
    width = max(kinds.values()) + 1
    counts: list[int] = []
    spans: list[np.ndarray] = []
    keys: list[bytes] = []
    damage: list[Damage] = []
    root = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = tuple(os.path.relpath(path, root) for path in paths)
    for path, name in zip(paths, names, strict=True):
        members, problems = scan_shard(path)
        samples, incomplete = _group(members, kinds, required)
        promised = _promised(path)
        if promised not in (None, len(samples)):
            incomplete.append(f"{len(samples)} complete samples where the stats file promises {promised}")
        damage += [Damage(name, reason) for reason in problems + incomplete]
        counts.append(len(samples))
        keys += [key.encode() for key in samples]
        spans.append(np.array(list(samples.values()), dtype=np.int64).reshape(-1, width, 2))
    members_of = np.concatenate(spans)
    ends = np.cumsum([len(key) for key in keys], dtype=np.int64)
    return ShardIndex(
        paths=tuple(paths),
        names=names,
        file_sizes=tuple(os.path.getsize(path) for path in paths),
        starts=np.concatenate(([0], np.cumsum(counts, dtype=np.int64))),
        offsets=members_of[..., 0],
        sizes=members_of[..., 1].astype(np.int32),
        sample_id=np.arange(len(keys), dtype=np.int64),
        key_spans=np.stack((np.concatenate(([0], ends[:-1])), ends), axis=1) if keys else np.zeros((0, 2), np.int64),
        key_bytes=b"".join(keys),
        damage=tuple(damage),
    )
