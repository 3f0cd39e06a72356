"""`tools/inspect_shards.py`: its counts are those of the shards, whatever the threads; nothing bad stays unnamed."""

import json

import inspect_shards
import numpy as np
import pytest
from PIL import Image

from tests.data.conftest import encode, sample, write_tar


def run(*options) -> int:
    return inspect_shards.main([str(option) for option in options])


def members(number, image=None, text=None, metadata=b'{"n": 1}'):
    key = f"{number:06d}"
    found = [(f"{key}.png", image or encode(np.full((8, 12, 3), number, dtype=np.uint8)))]
    if text is not None:
        found.append((f"{key}.txt", text))
    if metadata is not None:
        found.append((f"{key}.json", metadata))
    return found


@pytest.fixture
def shards(tmp_path):
    """Ten samples of which each but the first three has something of its own, in two shards."""
    tall = encode(np.zeros((30, 10, 3), dtype=np.uint8), "JPEG")
    first = [
        *members(0, text=b"a cat"),
        *members(1, text=b"a cat"),
        *members(2, text=b"two dogs"),
        *members(3, text=b"  "),
        *members(4),
    ]
    second = [
        *members(5, tall, b"x" * 90, b'{"n": "one", "m": [1]}'),
        *members(6, b"\x89PNG not really", b"a bird"),
        *members(7, encode(np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8))[:800], b"a fish"),
        *members(8, text=b"\xff\xfe", metadata=b"["),
        *members(9, text=b"a fly", metadata=None),
        ("000010.txt", b"an orphan"),
        *members(11, text=b"one"),
        *members(11, text=b"one more"),
    ]
    for number, content in enumerate((first, second)):
        write_tar(tmp_path / "shards" / f"{number:05d}.tar", content)
    return tmp_path / "shards" / "*.tar"


def report(shards, tmp_path, *options):
    assert run(shards, "--json", tmp_path / "facts.json", *options) == 0
    return json.loads((tmp_path / "facts.json").read_text())


def test_counts_are_those_of_the_shards(shards, tmp_path, capsys):
    found = report(shards, tmp_path, "--decode", "all", "--image-size", 10)
    assert found["samples"] == found["decoded"] + 1 == 10  # of the sixth not even the header can be read
    assert [(shard["shard"], shard["samples"], shard["damage"]) for shard in found["shards"]] == [
        ("00000.tar", 5, 0),
        ("00001.tar", 5, 2),
    ]
    reasons = found["left_out"]["reasons"]
    assert sum(reasons.values()) == 2
    assert any(reason.startswith("no image") for reason in reasons)
    assert any(reason.startswith("more than one") for reason in reasons)
    images, captions = found["images"], found["captions"]
    assert images["formats"] == {"PNG": 8, "JPEG": 1}
    assert (images["short_side"]["least"], images["short_side"]["most"]) == (8, 20)
    assert sum(images["aspect_ratios"].values()) == 9
    assert images["aspect_ratios"]["0 to 0.45"] == images["aspect_ratios"]["0.85 to 1.18"] == 1
    assert images["smaller_than_image_size"] == pytest.approx(7 / 9)
    assert images["cut_off_by_square_crop"] == pytest.approx((7 * 4 / 12 + 20 / 30) / 9)
    assert (captions["missing"], captions["empty"]) == (1, 1)
    assert captions["duplicates"] == pytest.approx(1 / 7)
    assert captions["characters"]["most"] == 90
    assert found["metadata"]["missing"] == 1
    assert found["metadata"]["fields"]["n"] == {"share": 0.8, "types": {"integer": 7, "text": 1}}
    assert found["metadata"]["fields"]["m"] == {"share": 0.1, "types": {"list": 1}}
    bad = {(failure["key"], failure["kind"]) for failure in found["failures"]["samples"]}
    assert bad == {
        ("00001/000006", "undecodable"),
        ("00001/000007", "undecodable"),
        ("00001/000008", "metadata"),
        ("00001/000008", "caption"),
    }
    assert found["failures"]["kinds"] == {"undecodable": 2, "metadata": 1, "caption": 1}
    shown = " ".join(capsys.readouterr().out.split())
    assert "000007" in shown
    assert "2 undecodable, 1 metadata, 1 caption" in shown


@pytest.mark.parametrize("workers", [1, 3])
def test_threads_change_nothing(shards, tmp_path, workers, monkeypatch):
    expected = report(shards, tmp_path, "--decode", 4)
    monkeypatch.setattr("inspect_samples.CHUNK", 3)
    assert report(shards, tmp_path, "--decode", 4, "--workers", workers) == expected


def test_a_sample_to_decode_is_chosen_by_keys_and_seed_alone(write_many, tmp_path):
    def decoded(*options):
        found = report(write_many, tmp_path, "--decode", 20, *options)
        assert found["decoded"] == 20
        return {failure["key"].split("/")[1] for failure in found["failures"]["samples"]}

    first = decoded()
    assert decoded() == first
    assert decoded("--seed", 1) != first
    assert 0 < len(first) < 20  # half of the images are damaged where only decoding shows it


@pytest.fixture
def write_many(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (20, 20, 3), np.uint8)
    content = [member for n in range(60) for member in members(n, encode(noise)[: 800 if n % 2 else None], b"x")]
    return write_tar(tmp_path / "many" / "0.tar", content)


def test_captions_from_a_field_and_their_tokens(tmp_path):
    path = write_tar(tmp_path / "a.tar", [*sample(0, text="red apple"), *sample(1, text=7), *sample(2, text="a " * 90)])
    found = report(path, tmp_path, "--caption-field", "text", "--tokens")
    assert found["failures"]["kinds"] == {"caption": 1}
    assert found["captions"]["characters"]["least"] == 9
    assert found["captions"]["tokens"]["least"] == 4  # two words and the marks around them
    assert found["captions"]["more_than_77_tokens"] == 0.5


def test_the_sheet_shows_only_what_can_be_decoded_and_is_reproducible(shards, tmp_path):
    for name in ("a.png", "b.png"):
        assert run(shards, "--sheet", tmp_path / name) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    with Image.open(tmp_path / "a.png") as sheet:
        # Eight of ten images can be decoded: one row.
        assert inspect_shards.TILE * 8 < sheet.width < inspect_shards.TILE * 9
        assert inspect_shards.TILE < sheet.height < inspect_shards.TILE * 2


def test_nothing_whole_is_1_and_no_shards_2(tmp_path, capsys):
    assert run(write_tar(tmp_path / "a.tar", [("a.txt", b"x")])) == 1
    assert "no whole sample" in capsys.readouterr().err
    assert run(tmp_path / "gone.tar") == 2
    message = capsys.readouterr().err
    assert all(part in message for part in ("no shard", "Allowed", "SHARDS"))
