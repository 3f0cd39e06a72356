"""Samples that cannot be used: counted by kind, named once, and the end of the run if there are too many.

A sample is bad if a part of it raises while it is made; the *kind* says which part, by the type of the exception:

    too_large      the image's header claims more pixels than are decoded
    undecodable    the image is damaged, or none of the formats that are read
    caption        the caption is no text, or not UTF-8
    metadata       the `.json` is missing, is no JSON object, or lacks a field
    label          the class of the sample is none of the known ones
    segmentation   the segmentation map is damaged or does not fit its image

Each worker process counts for itself, in memory that the main process reads: no message, no lock. A run that
resumes counts anew, for what was fetched and not trained is no part of where training stands, but names no sample that
is named already.
"""

import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch.utils.data import get_worker_info

from ldm_train.data.transforms import ImageTooLargeError

_FORGIVEN = 10
_ADDRESS = re.compile(r" <_io\.BytesIO object at 0x[0-9a-fA-F]+>")


class TooManyBadSamplesError(RuntimeError):
    """More samples could not be decoded than `data.max_bad_fraction` allows."""


class CaptionError(ValueError):
    """A caption that is no text."""


class MetadataError(ValueError):
    """Metadata that are no JSON object."""


class LabelError(ValueError):
    """A class that is not known."""


class SegmentationError(ValueError):
    """A segmentation map that does not fit its image."""


# The first kind that an exception is an instance of; whatever else a decoder throws at damaged bytes is the last.
_TYPES: dict[str, tuple[type[Exception], ...]] = {
    "too_large": (ImageTooLargeError,),
    "caption": (CaptionError, UnicodeError),
    "label": (LabelError,),
    "segmentation": (SegmentationError,),
    "metadata": (MetadataError, json.JSONDecodeError, KeyError),
    "undecodable": (Exception,),
}
KINDS = tuple(_TYPES)
_COLUMNS = ("seen", "busy_ns", *KINDS)


def kind_of(error: Exception) -> str:
    """Which of `KINDS` a failure is."""
    return next(kind for kind, types in _TYPES.items() if isinstance(error, types))


def reason_of(error: Exception) -> str:
    """The exception in words that are the same each time: Pillow puts the address of its buffer into some."""
    return f"{type(error).__name__}: {_ADDRESS.sub('', str(error))}"


class Quarantine:
    """Counts the samples that could not be decoded, names each once in a file, and ends the run above a share.

    Args:
        path: file to append JSON lines to, one file per process: `-worker<n>.jsonl` is added; None writes nothing.
            Samples that these files name already are not named again.
        max_bad_fraction: the share of failures at which to stop; the first ten are forgiven.
        num_workers: worker processes, each of which counts for itself in memory that all can read.
    """

    def __init__(self, path: Path | None, max_bad_fraction: float, num_workers: int) -> None:
        self.path, self.max_bad_fraction = path, max_bad_fraction
        self.counts = torch.zeros(max(1, num_workers), len(_COLUMNS), dtype=torch.int64)  # a row for each process
        if num_workers:
            self.counts.share_memory_()
        self._named = set() if path is None else set(_named_in(path))

    @property
    def seen(self) -> int:
        """Samples asked for so far, in all workers."""
        return int(self.counts[:, 0].sum())

    @property
    def bad(self) -> int:
        """Samples among them that could not be decoded."""
        return sum(self.bad_by_kind.values())

    @property
    def bad_by_kind(self) -> dict[str, int]:
        """The same, for each of `KINDS`."""
        totals = self.counts.sum(dim=0).tolist()
        return dict(zip(KINDS, totals[-len(KINDS) :], strict=True))

    @property
    def work(self) -> tuple[int, float]:
        """Samples that this run's workers made, and the seconds that they worked for them, one after the other."""
        samples, nanoseconds = self.counts[:, :2].sum(dim=0).tolist()
        return samples, nanoseconds / 1e9

    @contextmanager
    def making(self, samples: int) -> Iterator[None]:
        """Inside, a process makes `samples` samples: they count as asked for, and the time as work."""
        row, begin = self.counts[self._worker()], time.perf_counter_ns()
        row[0] += samples
        yield
        row[1] += time.perf_counter_ns() - begin

    def failed(self, sample_id: int, key: str, error: Exception) -> None:
        """Count and write down a sample that could not be decoded.

        Raises:
            TooManyBadSamplesError: if there are more than are allowed.
        """
        kind, reason = kind_of(error), reason_of(error)
        self.counts[self._worker(), _COLUMNS.index(kind)] += 1
        if self.path is not None and key not in self._named:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            entry = {"key": key, "sample_id": sample_id, "kind": kind, "error": reason}
            _append(Path(f"{self.path}-worker{self._worker()}.jsonl"), json.dumps(entry))
        self._named.add(key)
        if self.bad > max(_FORGIVEN, self.max_bad_fraction * self.seen):
            raise TooManyBadSamplesError(
                f"{self.bad} of {self.seen} samples could not be decoded, the last being {key} ({reason}). At most "
                f"{self.max_bad_fraction:.2%} may fail: mend or leave out the samples listed in `data.quarantine_dir`, "
                "or raise `data.max_bad_fraction`."
            )

    @staticmethod
    def _worker() -> int:
        info = get_worker_info()
        return 0 if info is None else info.id


def _named_in(path: Path) -> Iterator[str]:
    """The keys that a rank's files name, whichever worker wrote them; a line that was cut by a kill names none."""
    for file in sorted(path.parent.glob(f"{path.name}-worker*.jsonl")):
        for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)["key"]
            except (ValueError, KeyError, TypeError):
                continue


def _append(path: Path, line: str) -> None:
    """Add a line to a file, a new one even if the last was cut by a kill."""
    with path.open("a+b") as file:
        is_cut = False
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            is_cut = file.read(1) != b"\n"
        file.write(b"\n" * is_cut + line.encode() + b"\n")


class Counted(Protocol):
    """Something that counts what it does over all processes of a rank, as the cache of remote shards does."""

    def counters(self) -> dict[str, int]:
        """Name -> how often, or how many bytes, since the start of the run."""


def running_totals(quarantines: Iterable[Quarantine], caches: Iterable[Counted] = ()) -> dict[str, float]:
    """What one rank's loading has come to so far, as numbers whose sum over ranks is that of the run.

    Args:
        quarantines: of all data sets of the rank.
        caches: of all its remote shards; their counters of one name are added.

    Returns:
        `images_made` and `busy_seconds` of the workers, `bad/<kind>` for each kind, `cache/<counter>`.
    """
    totals: dict[str, float] = {"images_made": 0, "busy_seconds": 0.0} | {f"bad/{kind}": 0 for kind in KINDS}
    for quarantine in quarantines:
        samples, seconds = quarantine.work
        totals["images_made"] += samples
        totals["busy_seconds"] += seconds
        for kind, count in quarantine.bad_by_kind.items():
            totals[f"bad/{kind}"] += count
    for cache in caches:
        for name, count in cache.counters().items():
            totals[f"cache/{name}"] = totals.get(f"cache/{name}", 0) + count
    return totals
