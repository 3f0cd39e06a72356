"""Writing a latent cache: shard by shard, each complete or absent, by any number of processes that never talk.

A process writes a shard under a temporary name, renames it, and then writes the shard's record beside it
(`ldm_train.data.latent_records`). So a shard with a record is whole, one without is made again, and whoever finds the
last record writes the manifest. Which process makes which shard does not change a byte.

To make a cache anew, by several processes that start and end in any order, the first of them removes every record,
those of the others too, and says so in a file; the others find it and only go on. So records are never of two
makings. The file goes when the manifest is written, which keeps the ids of the jobs that made it: a task of one of
them that is started once more finds the making finished, and begins nothing. The file is locked while records are
removed and while the manifest is written, so that neither happens during the other.

Layout: see `ldm_train.data.latents`.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from webdataset.writer import TarWriter

from ldm_train.checkpoint import atomic_write
from ldm_train.data.index_store import relative_names
from ldm_train.data.latent_encoding import Entry, MomentsEncoder, PictureBatch, entries, in_order
from ldm_train.data.latent_member import EXTENSION
from ldm_train.data.latent_records import ShardRecord, SourceShard, ValueRange, digest_of, location_of, write_json
from ldm_train.data.latent_settings import LatentSettings
from ldm_train.data.latents import MANIFEST, VERSION
from ldm_train.data.locations import beside, folders_above, is_url, shown
from ldm_train.data.storage import LOCAL_FILES, Identity, ShardReadError, Storage, identities

OVERWRITING = ".overwriting"
_COPIED = ("_stats.json", ".parquet")  # what img2dataset writes beside a shard, and stays true of it
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)


def shard_names(paths: Sequence[str]) -> tuple[str, list[str]]:
    """The folder that holds all of some shards, a path or a URL without secrets, and their names relative to it.

    Raises:
        ValueError: if there is no such folder.
    """
    names = list(relative_names(paths))
    if strange := [name for name in names if is_url(name) or "?" in name]:
        raise ValueError(
            f"no folder holds all shards, such as {shown(strange[0])}; allowed are shards of one disk, host or "
            "bucket; change --data, and make a cache of each"
        )
    depth = names[0].count("/")
    return shown(folders_above(paths[0])[depth]), names


class LatentCacheWriter:
    """The folder of a cache while it is being made.

    Args:
        folder: where it will lie; made if it is not there.
        paths: all source shards, those of other processes included.
        settings: of this cache.
        description: further facts for the manifest, such as the autoencoder's config.
        storage: where the source shards lie.
        job: the id of the job that this process is a task of, which makes a cache anew once; None: there is no such id.

    Attributes:
        changed: names of the shards that were found to be made of what their source was before it changed.

    Raises:
        ValueError: if the folder is a file, or that of the source shards, which would be overwritten.
    """

    def __init__(
        self,
        folder: Path,
        paths: Sequence[str],
        settings: LatentSettings,
        description: dict[str, Any],
        storage: Storage = LOCAL_FILES,
        job: str | None = None,
    ) -> None:
        self.folder, self.paths, self.settings, self.description = folder, tuple(paths), settings, description
        self.storage, self.job, self.changed = storage, job, set[str]()
        self._identities: dict[str, Identity] = {}
        self._digests: dict[tuple[str, Identity], str] = {}
        self.root, self.names = shard_names(paths)
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; allowed is a folder, which may be there or not; change --output")
        if not is_url(self.root) and folder.resolve() == Path(self.root).resolve():
            raise ValueError(
                f"{folder} holds the source shards, which the cache's would replace; allowed is another folder; change "
                "--output"
            )

    def record_path(self, name: str) -> Path:
        """Where a shard's record lies."""
        return self.folder / f"{name.removesuffix('.tar')}_latents.json"

    def records(self, paths: Sequence[str] | None = None) -> "dict[str, ShardRecord | None]":
        """Path of a source shard -> record of its shard, if that is there as a whole and made from the source as it is.

        Args:
            paths: the source shards; None: all of them.

        Raises:
            ValueError: if a shard was made with other settings, or from the shard of another data set.
        """
        names = dict(zip(self.paths, self.names, strict=True))
        names = names if paths is None else {path: names[path] for path in paths}
        asked = [p for p, name in names.items() if p not in self._identities and self.record_path(name).is_file()]
        self._identities.update(zip(asked, identities(asked, self.storage), strict=True))
        return {path: self._record(path, name) for path, name in names.items()}

    def _record(self, path: str, name: str) -> ShardRecord | None:
        record = ShardRecord.read(self.record_path(name))
        target = self.folder / name
        if record is None or not target.is_file() or target.stat().st_size != record.size:
            return None
        differences, location = record.settings.differences(self.settings), record.source.location
        if not differences and self._is_of(record, path):
            return record
        if not differences and location == location_of(path):
            self.changed.add(name)
            return None
        what = ", ".join(differences) or f"other content from {location} -> {location_of(path)}"
        raise ValueError(
            f"{target} was made with {what}; allowed is one kind of latents of one data set in a folder; change "
            "--output, or add --overwrite to make all shards anew"
        )

    def _is_of(self, record: ShardRecord, path: str) -> bool:
        """Whether a shard was made of the content that is at a path; of a copy the record then names the place."""
        if path not in self._identities:  # another process has just made it
            self._identities[path] = self.storage.identity(path)
        source, identity, location = record.source, self._identities[path], location_of(path)
        if source.location == location and (source.size, source.version) == identity:
            return True
        if source.size != identity.size:
            return False
        if (location, identity) not in self._digests:
            self._digests[location, identity] = digest_of(path, self.storage)
        record.source = SourceShard(location, *identity, self._digests[location, identity])
        return record.source.digest == source.digest

    def begin_overwriting(self) -> bool:
        """Remove all records, so that every shard is made again, unless another process has done so for this making.

        Returns:
            False if this job has finished the making already, and nothing is made again.

        Raises:
            ValueError: if the file system has no locks, by which processes agree on it.
        """
        making = [_plain(asdict(self.settings)), self.names]
        with self._alone() as (mark, is_locked):
            if not is_locked:
                raise ValueError(
                    f"the file system of {self.folder} has no locks, so that several tasks cannot agree to begin anew; "
                    "allowed with --overwrite are file systems with flock; remove the folder, or change --output"
                )
            finished, begun = _object_in(self.folder / MANIFEST), _object_in(mark)
            is_finished = self.job in finished.get("jobs", []) and self._is_of_these(finished)
            if not is_finished and ((self.folder / MANIFEST).is_file() or begun.get("making") != making):
                for path in (self.folder / MANIFEST, *map(self.record_path, self.names)):
                    path.unlink(missing_ok=True)
                begun = {}
            jobs = {*begun.get("jobs", []), *(finished["jobs"] if is_finished else []), self.job} - {None}
            write_json(mark, {"making": making, "jobs": sorted(jobs)})
        return not is_finished

    def _is_of_these(self, manifest: dict[str, Any]) -> bool:
        """Whether a manifest is of the same settings and shards."""
        names = [shard["name"] for shard in manifest["shards"]]
        return names == self.names and not LatentSettings.read(manifest["settings"]).differences(self.settings)

    @contextmanager
    def _alone(self) -> Iterator[tuple[Path, bool]]:
        """Hold the lock of this cache; yields the file that says whether it is made anew, and if there is a lock."""
        self.folder.mkdir(parents=True, exist_ok=True)
        mark = self.folder / OVERWRITING
        while True:
            fd = os.open(mark, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_locked = _lock(fd)
                if not _is_still(fd, mark):  # whoever held it before has removed it
                    continue
                try:
                    yield mark, is_locked
                finally:
                    if mark.is_file() and not mark.stat().st_size:
                        mark.unlink()
                return
            finally:
                os.close(fd)

    @contextmanager
    def shard(self, path: str, name: str) -> Iterator["OpenShard"]:
        """Yields a shard to be filled; if nothing fails, it is there as a whole afterwards, and its record.

        Raises:
            ValueError: if the source changes meanwhile.
        """
        target = self.folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        for left_over in target.parent.glob(f".{target.name}.*.tmp"):  # of a process that was killed
            left_over.unlink(missing_ok=True)
        for stale in (self.folder / MANIFEST, self.record_path(name)):
            stale.unlink(missing_ok=True)
        identity = self.storage.identity(path)
        record = ShardRecord(name, SourceShard(location_of(path), *identity, ""), self.settings)
        with atomic_write(target) as temporary:
            with temporary.open("wb") as stream:
                tar = TarWriter(stream, user="", group="", mtime=0, encoder=False)
                yield OpenShard(tar, record)
                tar.close()
            record.source = SourceShard.of(path, identity, self.storage)
            if self.storage.identity(path) != identity:
                raise ValueError(
                    f"{shown(path)} changed while it was encoded; allowed are shards that nobody writes; wait until "
                    "--data is complete, and start the same command again"
                )
            record.size = temporary.stat().st_size
        for ending in _COPIED:
            self._copy_beside(path, name, ending)
        record.write(self.record_path(name))
        self._identities.clear()  # from before what takes hours

    def _copy_beside(self, path: str, name: str, ending: str) -> None:
        target = self.folder / (name.removesuffix(".tar") + ending)
        try:
            fd = self.storage.open(beside(path, ending))
        except (FileNotFoundError, ShardReadError):  # to have none is no fault
            target.unlink(missing_ok=True)
            return
        with os.fdopen(fd, "rb") as source, atomic_write(target) as temporary, temporary.open("wb") as copy:
            shutil.copyfileobj(source, copy)

    def merge(self) -> list[ShardRecord | None]:
        """Write the manifest if all shards are there.

        Returns:
            The record of each shard, in the order of the names; `None` where there is none yet, see `records`.

        Raises:
            ValueError: if a shard was made with other settings.
        """
        with self._alone() as (mark, _):
            found = list(self.records().values())
            records = [record for record in found if record is not None]
            if self._digests:  # copies that were read once need not be read again
                for record in records:
                    record.write(self.record_path(record.name))
            if len(records) == len(found):
                jobs = (_object_in(mark) or _object_in(self.folder / MANIFEST)).get("jobs", [])
                with atomic_write(self.folder / MANIFEST) as temporary:
                    write_json(temporary, {**self._manifest(records), "jobs": jobs})
                mark.unlink()
        return found

    def strangers(self) -> list[str]:
        """Names of the shards that lie beside those of this cache, and are not of it."""
        folders = {(self.folder / name).parent for name in self.names}
        there = {str(path.relative_to(self.folder)) for folder in folders for path in folder.glob("*.tar")}
        return sorted(there - {*self.names})

    def _manifest(self, records: Sequence[ShardRecord]) -> dict[str, Any]:
        images, moments, shapes = ValueRange(), ValueRange(), dict[str, int]()
        for record in records:
            images.merge(record.images)
            moments.merge(record.moments)
            for shape, count in record.shapes.items():
                shapes[shape] = shapes.get(shape, 0) + count
        shards = [
            {"name": r.name, "size": r.source.size, "digest": r.source.digest, "samples": r.samples} for r in records
        ]
        fingerprint = hashlib.sha256(json.dumps(shards).encode()).hexdigest()
        return {
            "version": VERSION,
            "settings": asdict(self.settings),
            **self.description,
            "source": {"root": self.root, "fingerprint": fingerprint, "shards": shards},
            "samples": sum(record.samples for record in records),
            "damaged": sum(len(record.damaged) for record in records),
            "shapes": shapes,
            "images": images.summary(),
            "moments": moments.summary(),
            "shards": [{"name": record.name, "size": record.size} for record in records],
        }


class OpenShard:
    """A shard that is being filled, and its record."""

    def __init__(self, tar: TarWriter, record: ShardRecord) -> None:
        self._tar, self.record = tar, record

    def fill(self, encoder: MomentsEncoder, batches: Iterable[PictureBatch], first: int) -> None:
        """Encode and append all samples of the shard, whose first row is `first`."""
        for entry in in_order(self._encoded(encoder, batches), first):
            self.add(entry)

    def _encoded(self, encoder: MomentsEncoder, batches: Iterable[PictureBatch]) -> Iterator[tuple[int, Entry]]:
        for batch in batches:
            images = batch.images()
            if images is not None:
                self.record.images.add(images)
            yield from zip(batch.rows, entries(encoder, batch.pictures, images), strict=True)

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


def _plain(content: dict[str, Any]) -> Any:  # noqa: ANN401
    """As it is after it was written and read."""
    return json.loads(json.dumps(content))


def _object_in(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _lock(fd: int) -> bool:
    """Wait for the lock of an open file; false where the file system has none."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        return False
    return True


def _is_still(fd: int, path: Path) -> bool:
    """Whether an open file is the one of that name."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
