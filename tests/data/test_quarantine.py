"""Every failure is counted once, under one kind, named once, and not forgotten by the run that resumes."""

import json
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import UnidentifiedImageError
from torch.utils.data import DataLoader, Dataset

from ldm_train.data import BatchRequest, ImageOptions, ImageTextDataset, Quarantine, TooManyBadSamplesError, build_index
from ldm_train.data.index import IMAGE, METADATA
from ldm_train.data.labels import FieldLabel
from ldm_train.data.quarantine import (
    KINDS,
    CaptionError,
    LabelError,
    MetadataError,
    SegmentationError,
    kind_of,
    reason_of,
    running_totals,
)
from ldm_train.data.transforms import ImageTooLargeError, decode_rgb
from tests.data.conftest import encode, sample, write_tar

ERRORS = {
    "too_large": ImageTooLargeError("9 x 9"),
    "caption": UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
    "label": LabelError("no class"),
    "segmentation": SegmentationError("no map"),
    "metadata": KeyError("no metadata (.json)"),
    "undecodable": UnidentifiedImageError("no image"),
}


def entries(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_kind_has_its_exceptions_and_what_is_unknown_is_undecodable():
    assert {kind: kind_of(error) for kind, error in ERRORS.items()} == {kind: kind for kind in KINDS}
    assert {kind_of(error) for error in (OSError("cut"), RuntimeError(), ValueError(), MemoryError())} == {
        "undecodable"
    }
    with pytest.raises(json.JSONDecodeError) as caught:
        json.loads("{")
    assert kind_of(caught.value) == kind_of(MetadataError("[]")) == "metadata"
    assert kind_of(CaptionError("7")) == "caption"


def test_the_same_damage_has_the_same_reason():
    with pytest.raises(UnidentifiedImageError) as caught:
        decode_rgb(b"no image")
    assert reason_of(caught.value) == "UnidentifiedImageError: cannot identify image file"


@given(st.lists(st.sampled_from(KINDS), max_size=40))
def test_counts_by_kind_add_up(kinds):
    quarantine = Quarantine(None, 1.0, 0)
    for number, kind in enumerate(kinds):
        with quarantine.making(1):
            quarantine.failed(number, str(number), ERRORS[kind])
    assert quarantine.bad_by_kind == {kind: kinds.count(kind) for kind in KINDS}
    assert quarantine.bad == quarantine.seen == quarantine.work[0] == len(kinds)


def test_the_run_stops_above_the_threshold():
    quarantine = Quarantine(None, 0.5, 0)
    with quarantine.making(16):
        for number in range(10):
            quarantine.failed(number, str(number), ERRORS["label"])
        with pytest.raises(TooManyBadSamplesError, match=r"11 of 16 .*50.00% may fail.*`data.max_bad_fraction`"):
            quarantine.failed(10, "10", ERRORS["label"])


@pytest.mark.parametrize("cut", [0, 1, 9])
def test_a_resumed_run_names_what_is_new_and_nothing_twice(tmp_path, cut):
    path = tmp_path / "quarantine" / "training-rank0"
    first = Quarantine(path, 1.0, 0)
    for number in (0, 1, 1, 2):
        first.failed(number, f"a/{number}", ERRORS["caption"])
    file = tmp_path / "quarantine" / "training-rank0-worker0.jsonl"
    file.write_bytes(file.read_bytes()[: -cut or None])  # a kill may cut the last line
    second = Quarantine(path, 1.0, 2)  # with other workers
    for number in (1, 2, 3, 3):
        second.failed(number, f"a/{number}", ERRORS["undecodable"])
    lines = [line for line in file.read_text().splitlines() if line.endswith("}")]
    named = [json.loads(line)["key"] for line in lines]
    assert named == ["a/0", "a/1", "a/2", "a/3"]
    assert json.loads(lines[0]) == {
        "key": "a/0",
        "sample_id": 0,
        "kind": "caption",
        "error": f"UnicodeDecodeError: {ERRORS['caption']}",
    }


def test_what_another_worker_named_before_is_not_named_again(tmp_path):
    (tmp_path / "training-rank0-worker5.jsonl").write_text('{"key": "a/1"}\nnot json\n[]\n')
    quarantine = Quarantine(tmp_path / "training-rank0", 1.0, 0)
    for number in (1, 2):
        quarantine.failed(number, f"a/{number}", ERRORS["label"])
    assert [entry["key"] for entry in entries(tmp_path / "training-rank0-worker0.jsonl")] == ["a/2"]


def test_real_samples_get_the_kind_of_the_part_that_is_wrong(tmp_path):
    def replaced(number, extension, data):
        return [(name, data if name.endswith(extension) else old) for name, old in sample(number)]

    wide = encode(np.zeros((9, 9, 3), dtype=np.uint8))
    members = [
        *sample(0),
        *replaced(1, ".png", wide),
        *replaced(2, ".png", b"\x89PNG not really"),
        *replaced(3, ".txt", b"\xff\xfe\xfa"),
        *replaced(4, ".json", b"[1]"),
        *replaced(5, ".json", b'{"parity": 7}'),
        *replaced(6, ".json", b'{"number": 6}'),
        *replaced(7, ".json", b'{"parity": "\xff"}'),
        *(member for number in range(8, 20) for member in sample(number)),
    ]
    index = build_index([str(write_tar(tmp_path / "a.tar", members))], (IMAGE, METADATA))
    options = ImageOptions(8, max_pixels=64, label=FieldLabel("parity", 2))
    quarantine = Quarantine(tmp_path / "training-rank0", 100.0, 0)  # substitutes may be bad as well
    dataset = ImageTextDataset(index, options, 0, quarantine)
    dataset[BatchRequest(0, np.arange(8), np.arange(8))]
    found = {entry["key"]: entry["kind"] for entry in entries(tmp_path / "training-rank0-worker0.jsonl")}
    expected = ["too_large", "undecodable", "caption", "metadata", "label", "metadata", "metadata"]
    assert found == {f"a/{number:06d}": kind for number, kind in enumerate(expected, start=1)}


class Working(Dataset):
    """Two samples an item, 20 ms of work."""

    def __init__(self, quarantine):
        self.quarantine = quarantine

    def __len__(self):
        return 8

    def __getitem__(self, item):
        with self.quarantine.making(2):
            time.sleep(0.02)
            if item == 5:
                self.quarantine.failed(item, str(item), ERRORS["too_large"])
        return item


@pytest.mark.parametrize("workers", [0, 2])
def test_the_main_process_sees_what_all_workers_count(workers):
    quarantine = Quarantine(None, 1.0, workers)
    before = time.perf_counter()
    assert sorted(DataLoader(Working(quarantine), batch_size=None, num_workers=workers)) == list(range(8))
    elapsed = time.perf_counter() - before
    samples, seconds = quarantine.work
    assert samples == quarantine.seen == 16
    assert 8 * 0.02 <= seconds <= max(1, workers) * elapsed
    assert quarantine.bad_by_kind == dict.fromkeys(KINDS, 0) | {"too_large": 1}


def test_totals_are_sums_with_the_same_names_whatever_happened():
    class Cache:
        def __init__(self, hits):
            self.hits = hits

        def counters(self):
            return {"hits": self.hits, "misses": 1}

    quarantines = [Quarantine(None, 1.0, 0), Quarantine(None, 1.0, 0)]
    assert running_totals(quarantines) == {
        "images_made": 0,
        "busy_seconds": 0,
        **dict.fromkeys((f"bad/{kind}" for kind in KINDS), 0),
    }
    for quarantine in quarantines:
        with quarantine.making(3):
            quarantine.failed(0, "0", ERRORS["label"])
    totals = running_totals(quarantines, [Cache(3), Cache(4)])
    assert totals["images_made"] == 6
    assert totals["busy_seconds"] == sum(quarantine.work[1] for quarantine in quarantines) > 0
    assert totals["bad/label"] == 2
    assert (totals["cache/hits"], totals["cache/misses"]) == (7, 2)
