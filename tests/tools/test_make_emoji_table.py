"""The shipped data set: what `tools/make_emoji_table.py` and `tools/make_shards.py` make of the npm package."""

import hashlib
import io
import json
from collections import Counter
from pathlib import Path

import make_emoji_table
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

FOLDER = Path(__file__).parents[2] / "ldm_train" / "assets" / "noto_emoji"


@pytest.fixture(scope="module")
def samples():
    tars = [str(path) for path in sorted(FOLDER.glob("*.tar"))]
    return [sample | {"row": json.loads(sample["json"])} for sample in webdataset.WebDataset(tars, shardshuffle=False)]


def test_the_shards_hold_the_captions_that_the_script_makes(samples):
    for sample in samples:
        assert sample["txt"].decode() == sample["row"]["caption"] == make_emoji_table.caption(sample["row"])


def test_captions_are_unique_and_lower_case(samples):
    captions = [sample["row"]["caption"] for sample in samples]
    assert len(set(captions)) == len(captions) == 1911
    assert [caption for caption in captions if caption != caption.lower() or ":" in caption] == []


def test_pictures_are_64_pixels_and_all_different(samples):
    assert {Image.open(io.BytesIO(sample["webp"])).size for sample in samples} == {(64, 64)}
    assert len({hashlib.sha256(sample["webp"]).digest() for sample in samples}) > 1880


def test_every_shard_mixes_the_categories(samples):
    flags = Counter(sample["__key__"][:5] for sample in samples if sample["row"]["category"] == "Flags")
    assert flags.total() == 270
    assert all(40 < number < 95 for number in flags.values())
    assert len(flags) == 4


def test_records_agree_with_the_tars(samples):
    stats = [json.loads(path.read_text()) for path in sorted(FOLDER.glob("*_stats.json"))]
    assert sum(shard["successes"] for shard in stats) == len(samples)
    rows = [row for path in sorted(FOLDER.glob("*.parquet")) for row in pq.read_table(path).to_pylist()]
    assert rows == [sample["row"] for sample in samples]


def test_licence_and_attribution_travel_with_the_pictures():
    licence = (FOLDER / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "END OF TERMS AND CONDITIONS" in licence
    notice = (FOLDER / "NOTICE").read_text()
    assert all(
        word in notice for word in ("Google", "emoji-datasource-google 16.0.0", "Cal Henderson", "What was changed")
    )


@pytest.mark.parametrize(
    ("name", "short_name", "subcategory", "caption"),
    [
        ("STRAWBERRY", "strawberry", "food-fruit", "strawberry, a fruit food emoji"),
        ("HEAVY BLACK HEART", "heart", "heart", "red heart, a heart emoji"),
        ("Mexico Flag", "flag-mx", "country-flag", "flag of mexico, a country flag emoji"),
        ("MAN: BALD", "bald_man", "person", "bald man, a person emoji"),
        ("WOMANS HAT", "womans_hat", "clothing", "woman's hat, a clothing emoji"),
        ("RESCUE WORKER’S HELMET", "x_helmet", "clothing", "rescue worker's helmet, a clothing emoji"),  # noqa: RUF001
        ("KEYCAP 7", "seven", "keycap", "keycap 7, a keycap emoji"),
        ("THUMBS UP SIGN", "+1", "hand-fingers-closed", "thumbs up, a closed hand emoji"),
        ("FAMILY: MAN, BOY", "man-boy", "family", "family of man, boy, a family emoji"),
        ("CLOUD", "cloud", "sky & weather", "cloud, a sky and weather emoji"),
        ("OWL", "owl", "animal-bird", "owl, a bird animal emoji"),
    ],
)
def test_names_become_words(name, short_name, subcategory, caption):
    emoji = {"name": name, "short_name": short_name, "subcategory": subcategory}
    assert make_emoji_table.caption(emoji) == caption


def test_the_package_becomes_rows_in_unicodes_order(tmp_path):
    names = [("OWL", 2, True), ("BAT", 1, True), ("GONE", 0, False)]
    emoji = [
        {"name": name, "short_name": name.lower(), "category": "Animals & Nature", "subcategory": "animal-x"}
        | {"unified": f"1F98{order}", "image": f"1f98{order}.png", "sort_order": order, "has_img_google": exists}
        for name, order, exists in names
    ]
    (tmp_path / "emoji.json").write_text(json.dumps(emoji))
    rows = make_emoji_table.rows(tmp_path)
    assert [(row["image"], row["caption"], row["unified"]) for row in rows] == [
        ("img/google/64/1f981.png", "bat, a x animal emoji", "1F981"),
        ("img/google/64/1f982.png", "owl, a x animal emoji", "1F982"),
    ]
