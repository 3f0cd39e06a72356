"""Where captioned images come from before they are shards: a folder, a table, or img2dataset's tars.

Listing is cheap: a `Source` only says where its image, caption and metadata lie, and reads them when asked, so that
many threads can read at once and the order can be shuffled. What cannot be a sample becomes a `Refusal` with a reason;
every file of a folder and every row of a table ends as one or the other.
"""

import csv
import json
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
TABLE_SUFFIXES = (".csv", ".jsonl", ".parquet")
MAP_SUFFIX = ".seg.png"
SIDECAR_SUFFIXES = (".txt", ".json", MAP_SUFFIX)


class Refusal(NamedTuple):
    """An input that is not in the shards, and why."""

    source: str
    reason: str


class UnusableSourceError(ValueError):
    """A source that cannot be a sample; the message is the reason of its refusal."""


@dataclass(frozen=True)
class Blob:
    """Bytes in a file: all of it, or `size` bytes from `offset`."""

    path: Path
    offset: int = 0
    size: int = -1

    def read(self) -> bytes:
        """The bytes.

        Raises:
            UnusableSourceError: if they are not there.
        """
        try:
            with self.path.open("rb") as stream:
                stream.seek(self.offset)
                data = stream.read(self.size)
        except OSError as error:
            raise UnusableSourceError(f"cannot be read: {error.strerror}") from error
        if len(data) < self.size:
            raise UnusableSourceError(f"cut short: {len(data)} of {self.size} bytes")
        return data


@dataclass(frozen=True)
class Source:
    """One image with its caption and metadata, not yet read.

    Attributes:
        name: what to call it in messages and in the json: a path relative to the input, or a row's image path.
        image: where the image's bytes are.
        text: where a `.txt` caption is, if there is one. It wins over a caption in the metadata.
        metadata: a row's fields, or where a `.json` is.
        segmentation: where a `.seg.png` segmentation map is, if there is one.
    """

    name: str
    image: Blob
    text: Blob | None = None
    metadata: Blob | dict[str, Any] = field(default_factory=dict)
    segmentation: Blob | None = None

    def read_metadata(self) -> dict[str, Any]:
        """The metadata as a dict; empty if there is none."""
        if isinstance(self.metadata, dict):
            return self.metadata
        try:
            metadata = json.loads(self.metadata.read())
        except (ValueError, RecursionError) as error:
            raise UnusableSourceError("its .json is not JSON") from error
        if not isinstance(metadata, dict):
            raise UnusableSourceError(f"its .json holds a {type(metadata).__name__}, not an object")
        return metadata

    def read_caption(self, metadata: dict[str, Any], caption_field: str) -> str:
        """The `.txt`, else the metadata's field; empty if there is neither."""
        if self.text is None:
            return str(metadata.get(caption_field) or "").strip()
        try:
            return self.text.read().decode("utf-8-sig").strip()
        except UnicodeDecodeError as error:
            raise UnusableSourceError("its .txt is not UTF-8") from error


def list_sources(path: Path, image_field: str, image_root: Path | None) -> tuple[list[Source], list[Refusal]]:
    """Find every source under `path`, in an order that depends on the names alone.

    Args:
        path: a table; a folder with `.tar` files in it; or a folder of images, searched to its depths.
        image_field: a table's column with the image paths.
        image_root: the folder which a table's image paths are relative to, and must not leave; the table's if None.

    Raises:
        ValueError: if the input is none of these.
    """
    sources: list[Source] = []
    refusals: list[Refusal] = []
    try:
        for item in _find(path, image_field, (image_root or path.parent).resolve()):
            if not (name := item.name if isinstance(item, Source) else item.source).isprintable():
                refusals.append(Refusal(ascii(name), "name has characters that cannot be printed"))
            elif isinstance(item, Source):
                sources.append(item)
            else:
                refusals.append(item)
    except (csv.Error, UnicodeDecodeError, pa.ArrowException) as error:
        raise ValueError(
            f"{path} cannot be read: {error}; allowed: a UTF-8 .csv or .jsonl table or a .parquet one; "
            "change the first argument."
        ) from error
    return sources, refusals


def _find(path: Path, image_field: str, image_root: Path) -> Iterator[Source | Refusal]:
    if path.is_dir():
        return _list_tars(path) if any(path.glob("*.tar")) else _list_folder(path)
    if path.is_file() and path.suffix in TABLE_SUFFIXES:
        return _list_table(path, image_field, image_root)
    state = f"a file of the kind {path.suffix or 'without suffix'}" if path.exists() else "not there"
    raise ValueError(
        f"{path} is {state}; allowed: a folder of images, a folder of .tar shards, or a table "
        f"({', '.join(TABLE_SUFFIXES)}); change the first argument."
    )


def _list_folder(root: Path) -> Iterator[Source | Refusal]:
    """Images with sidecars: `cat.png`, `cat.txt`, `cat.json`, `cat.seg.png`."""
    blobs: dict[str, Blob] = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root).as_posix()
        if not path.resolve().is_relative_to(root.resolve()):
            yield Refusal(name, "a link that leaves the folder")
        elif not path.is_dir():
            blobs[name] = Blob(path)
    yield from _pair(blobs)


def _list_tars(root: Path) -> Iterator[Source | Refusal]:
    """The members of every tar in the folder."""
    for path in sorted(root.glob("*.tar")):
        members: dict[str, Blob] = {}
        damage = None
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    name = f"{path.name}/{member.name}"
                    if member.isdir():
                        continue
                    if not member.isfile():
                        yield Refusal(name, "not a plain file")
                    elif name in members:
                        yield Refusal(name, "a second member of this name")
                    else:
                        members[name] = Blob(path, member.offset_data, member.size)
                # tarfile takes any bad header but the first for the end, which is a block of zeros.
                if Blob(path, tar.offset, tarfile.BLOCKSIZE).read() != bytes(tarfile.BLOCKSIZE):
                    damage = f"bad or cut header at byte {tar.offset}"
        except (tarfile.TarError, OSError, UnusableSourceError) as error:
            damage = str(error)
        if damage:
            yield Refusal(path.name, f"damaged after {len(members)} members: {damage}")
        yield from _pair(members)


def _pair(blobs: dict[str, Blob]) -> Iterator[Source | Refusal]:
    """Give each image its sidecars; refuse what is neither, except img2dataset's own records."""
    used: set[str] = set()
    names = [name for name in blobs if not name.endswith(MAP_SUFFIX)]
    images = [name for name in names if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES]
    for name in images:
        stem = name[: -len(PurePosixPath(name).suffix)]
        used |= {name, *(stem + suffix for suffix in SIDECAR_SUFFIXES)}
        text, metadata, segmentation = (blobs.get(stem + suffix) for suffix in SIDECAR_SUFFIXES)
        yield Source(name, blobs[name], text, metadata or {}, segmentation)
    for name in blobs:
        if name in used:
            continue
        path = PurePosixPath(name)
        if path.name.endswith("_stats.json") or path.suffix == ".parquet":
            continue
        orphan = name.endswith(SIDECAR_SUFFIXES)
        yield Refusal(name, "no image beside it" if orphan else f"not an image: {path.suffix or 'no suffix'}")


def _list_table(path: Path, image_field: str, root: Path) -> Iterator[Source | Refusal]:
    """One source per row."""
    for number, row in enumerate(_rows(path), start=1):
        name = f"{path.name} row {number}"
        if not isinstance(row, dict):
            yield Refusal(name, "not a JSON object")
            continue
        image = row.pop(image_field, None)
        if not isinstance(image, str) or not image:
            fields = ", ".join(map(str, row)) or "none"
            yield Refusal(name, f"no image path in the field {image_field!r} (--image-field); others: {fields}")
        elif "\0" in image or not (root / image).resolve().is_relative_to(root):
            yield Refusal(ascii(image), f"path leaves {root} (--image-root)")
        else:
            yield Source(image, Blob(root / image), metadata=row)


def _rows(path: Path) -> Iterator[object]:
    """A table's rows as dicts; None for a line that is not JSON."""
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8-sig") as stream:
            yield from ({k: v for k, v in row.items() if k is not None} for row in csv.DictReader(stream))
    elif path.suffix == ".jsonl":
        with path.open(encoding="utf-8-sig") as stream:
            yield from (_parsed(line) for line in stream if line.strip())
    else:
        for batch in _batches(path):
            # NaN is how data frames write "no value"; it is no JSON.
            yield from ({k: v for k, v in row.items() if v == v} for row in batch.to_pylist())


def _batches(path: Path) -> Iterator[pa.RecordBatch]:
    with pq.ParquetFile(path) as table:
        yield from table.iter_batches()


def _parsed(line: str) -> object:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
