"""No hang, no crash, no silent loss: over two thousand damaged shards, and what becomes of every sample in them.

The law for each shard, with S the samples it held before it was damaged:

- every sample of S is delivered with exactly its pixels and its caption, or is named with a reason by the index or the
  quarantine, or lies in a range of bytes of which the index says that it could not be read;
- a sample none of whose bytes were harmed is delivered, wherever the readers of tars can know where it begins;
- nothing is delivered that is not in S, unless the harm itself made it.

Set `LDM_FUZZ=20` for twenty times as many cases, which are others.
"""

import os
import re
import signal
import zlib

import numpy as np
import pytest
import torch

from ldm_train.data import BatchRequest, ImageOptions, ImageTextDataset, Quarantine, TooManyBadSamplesError, build_index
from ldm_train.data.captions import FieldCaption, TextCaption
from ldm_train.data.index import CAPTION, IMAGE, METADATA
from ldm_train.data.transforms import decode_rgb
from tests.data.damaged import BYTES, EVERYTHING, Case
from tests.data.hostile import MEMBERS, METADATA_CASES, metadata

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of images that it reads all the same
SECONDS = 10  # for one case, which takes a few milliseconds
TIMES = int(os.environ.get("LDM_FUZZ", "1"))


class Hang(BaseException):
    """No `except Exception` may catch it."""


@pytest.fixture
def alarm():
    def ring(*_):
        raise Hang

    before = signal.signal(signal.SIGALRM, ring)
    yield lambda: signal.alarm(SECONDS)
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


class Record(Quarantine):
    """A quarantine in memory."""

    def __init__(self):
        super().__init__(None, 1.0, 0)
        self.named = {}

    def failed(self, sample_id, key, error):
        self.named[key.partition("/")[2]] = error
        super().failed(sample_id, key, error)


class Outcome:
    """What a user gets of a shard: samples, and what is said of the rest."""

    def __init__(self, path, caption_field=None):
        second = CAPTION if caption_field is None else METADATA
        index = build_index([str(path)], (IMAGE, second))
        self.damage = [reason for _, reason in index.damage]
        self.delivered, self.quarantine = {}, Record()
        source = TextCaption() if caption_field is None else FieldCaption(caption_field)
        options = ImageOptions(8, max_pixels=1 << 20, caption=source)
        dataset = ImageTextDataset(index, options, 0, self.quarantine)
        for row in range(len(index)):
            assert index.key(row) not in self.delivered, "one key, two samples"
            try:
                batch = dataset[BatchRequest(0, np.array([row]), np.zeros(1, dtype=np.int64))]
            except TooManyBadSamplesError:
                continue
            if int(batch["sample_id"]) == row and index.key(row) not in self.quarantine.named:
                self.delivered[index.key(row)] = batch["image"][0], batch["caption"][0]

    def unreadable(self, size):
        """The ranges of bytes that the index says it could not read."""
        for reason in self.damage:
            if match := re.match(r"no header at byte (\d+): .* up to (?:byte (\d+)|the end)", reason):
                yield int(match[1]), int(match[2] or EVERYTHING)
            elif match := re.match(r"unreadable name record at byte (\d+)", reason):
                yield int(match[1]) - 512, int(match[1])
            elif match := re.match(r"nothing but zeros from byte (\d+)", reason):
                yield int(match[1]), EVERYTHING
            elif reason.startswith("no end-of-archive mark"):
                yield size, EVERYTHING

    def names(self, key):
        """Whether a reason is given for the sample by its key."""
        said = (f"{key}: ", f"member {key}.")
        return key in self.quarantine.named or any(reason.startswith(said) for reason in self.damage)


def wrong(case: Case, outcome: Outcome) -> list[str]:
    """Where the law is broken."""
    faults, ranges = [], list(outcome.unreadable(len(case.data)))
    is_miscounted = case.is_counted and any("stats file promises" in reason for reason in outcome.damage)
    for key, truth in case.samples.items():
        if key in outcome.delivered:
            image, caption = outcome.delivered[key]
            is_same = caption == truth.caption and torch.equal(image, decode_rgb(truth.image))
            if not is_same and key not in case.changed:
                faults.append(f"{key} was changed")
        elif key not in case.losable:
            faults.append(f"{key} was lost although nothing of it was harmed")
        elif not (outcome.names(key) or is_miscounted):
            places = [any(a <= place < b for a, b in ranges for place in headers) for headers in truth.headers]
            if not places or not all(places):
                faults.append(f"{key} was lost and nothing says so")
    strangers = outcome.delivered.keys() - case.samples.keys() - (case.added or set())
    if strangers and case.added is not None:
        faults.append(f"{sorted(strangers)} came from nowhere")
    return faults


def fuzz(make, count, path, alarm, **options):
    """Faults among `count` cases of a kind, and how many samples came, were named, were in a range."""
    faults = []
    for number in range(count * TIMES):
        case = make(np.random.default_rng([zlib.crc32(make.__name__.encode()), number]))
        path.write_bytes(case.data)
        stats = path.with_name("shard_stats.json")
        stats.unlink(missing_ok=True)
        if case.is_counted:
            stats.write_text(f'{{"successes": {len(case.samples)}}}')
        alarm()
        try:
            outcome = Outcome(path, **options)
        except (Hang, Exception) as error:
            faults.append(f"{make.__name__} {number}: {type(error).__name__} {error}")
            continue
        finally:
            signal.alarm(0)
        faults += [f"{make.__name__} {number}: {fault}; said: {outcome.damage}" for fault in wrong(case, outcome)]
    return faults


@pytest.mark.parametrize(("make", "count"), (BYTES | MEMBERS).items(), ids=lambda value: getattr(value, "__name__", ""))
def test_damaged_shards(make, count, tmp_path, alarm):
    faults = fuzz(make, count, tmp_path / "shard.tar", alarm)
    assert not faults, f"{len(faults)} faults in {count * TIMES} cases:\n" + "\n".join(faults[:20])


def test_hostile_metadata(tmp_path, alarm):
    faults = fuzz(metadata, METADATA_CASES, tmp_path / "shard.tar", alarm, caption_field="text")
    assert not faults, f"{len(faults)} faults in {METADATA_CASES * TIMES} cases:\n" + "\n".join(faults[:20])


def test_there_are_two_thousand_cases():
    assert sum(BYTES.values()) + sum(MEMBERS.values()) + METADATA_CASES >= 2000
