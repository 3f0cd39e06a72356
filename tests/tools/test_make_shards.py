"""`tools/make_shards.py`: nothing is lost, nothing is changed unasked, and nothing is refused without its reason."""

import csv
import hashlib
import io
import json
import tarfile
from pathlib import Path

import make_shards
import numpy as np
import pyarrow.parquet as pq
import pytest
import webdataset
from PIL import Image

from ldm_train.data.writing import metadata_table

NAMES = ("a.png", "b.jpg", "c.webp", "deep/d.png", "e.v2.png", "f.JPEG")


def picture(number: int, size: tuple[int, int] = (12, 9), mode: str = "RGB", encoding: str = "PNG") -> bytes:
    channels = len(mode)
    pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], channels), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(), mode if channels < 4 else "RGBA").save(buffer, encoding)
    return buffer.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Six captioned images of three formats: captions in .txt for half, in .json for the others."""
    root = tmp_path / "images"
    for number, name in enumerate(NAMES):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            picture(
                number,
                encoding={"jpg": "JPEG", "jpeg": "JPEG", "webp": "WEBP"}.get(name[-4:].strip(".").lower(), "PNG"),
            )
        )
        metadata = {"url": f"https://example.org/{number}", "similarity": number / 8}
        if number % 2:
            path.with_suffix(".txt").write_text(f"picture {number} ä\n", encoding="utf-8")
        else:
            metadata["caption"] = f"picture {number} ä"
        path.with_suffix(".json").write_text(json.dumps(metadata), encoding="utf-8")
    return root


def run(source, output, *options) -> int:
    return make_shards.main([str(source), "--output", str(output), *map(str, options)])


def samples(output) -> list[dict]:
    tars = [str(path) for path in sorted(output.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False))


def content(output) -> list[tuple]:
    """What was kept, without the names that differ between the kinds of input."""
    rows = []
    for sample in samples(output):
        metadata = json.loads(sample["json"])
        image = next(sample[extension] for extension in ("png", "jpg", "webp") if extension in sample)
        metadata.pop("source")
        rows.append((image, sample["txt"].decode(), dict(sorted(metadata.items()))))
    return rows


def refused(output) -> dict[str, str]:
    path = output / make_shards.REFUSED
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return {row["source"]: row["reason"] for row in map(json.loads, lines)}


def files(output) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in output.iterdir()}


def table_rows(folder) -> list[dict]:
    rows = []
    for name in NAMES:
        metadata = json.loads((folder / name).with_suffix(".json").read_text())
        text = (folder / name).with_suffix(".txt")
        metadata["caption"] = text.read_text(encoding="utf-8") if text.exists() else metadata["caption"]
        rows.append({"image": name, **metadata})
    return rows


def test_images_come_back_byte_for_byte(folder, tmp_path):
    assert run(folder, tmp_path / "out", "--samples-per-shard", 4) == 0
    read = samples(tmp_path / "out")
    keys = [f"{shard:05d}{index:04d}" for shard, count in ((0, 4), (1, 2)) for index in range(count)]
    assert [sample["__key__"] for sample in read] == keys
    for number, (sample, name) in enumerate(zip(read, NAMES, strict=True)):
        metadata = json.loads(sample["json"])
        original = (folder / name).read_bytes()
        extension = {"jpeg": "jpg"}.get(kind := name.rsplit(".", 1)[1].lower(), kind)
        assert sample[extension] == original
        assert sample["txt"].decode() == metadata["caption"] == f"picture {number} ä"
        assert metadata == metadata | {
            "key": sample["__key__"],
            "source": name,
            "status": "success",
            "width": 12,
            "height": 9,
            "original_width": 12,
            "original_height": 9,
            "sha256": hashlib.sha256(original).hexdigest(),
            "url": f"https://example.org/{number}",
            "similarity": number / 8,
        }


def test_stats_and_parquet_say_what_the_tar_holds(folder, tmp_path):
    run(folder, tmp_path / "out", "--samples-per-shard", 4)
    for shard, number in (("00000", 4), ("00001", 2)):
        stats = json.loads((tmp_path / "out" / f"{shard}_stats.json").read_text())
        assert stats["count"] == stats["successes"] == number
        with tarfile.open(tmp_path / "out" / f"{shard}.tar") as tar:
            rows = [json.load(tar.extractfile(name)) for name in tar.getnames() if name.endswith(".json")]
        assert pq.read_table(tmp_path / "out" / f"{shard}.parquet").to_pylist() == rows


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet", "tars", "files", "renamed columns"])
def test_every_kind_of_input_gives_the_same_samples(folder, tmp_path, kind):
    run(folder, tmp_path / "reference")
    source, options = make_input(kind, folder, tmp_path)
    assert run(source, tmp_path / "out", *options) == 0
    expected, got = content(tmp_path / "reference"), content(tmp_path / "out")
    if kind == "csv":  # which has only strings
        for _, _, metadata in expected:
            metadata["similarity"] = str(metadata["similarity"])
    assert got == expected
    assert refused(tmp_path / "out") == {}


def make_input(kind, folder, tmp_path):
    rows, path = table_rows(folder), folder / f"table.{kind}"
    if kind == "csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "parquet":
        pq.write_table(metadata_table(rows), path)
    elif kind == "tars":
        run(folder, tmp_path / "tars", "--samples-per-shard", 2)
        return tmp_path / "tars", ()
    elif kind == "files":  # img2dataset's output_format=files: one folder a shard, records beside them
        run(folder, tmp_path / "tars", "--samples-per-shard", 2)
        for tar in (tmp_path / "tars").glob("*.tar"):
            with tarfile.open(tar) as members:
                members.extractall(tmp_path / "files" / tar.stem, filter="data")
        for record in (*(tmp_path / "tars").glob("*.parquet"), *(tmp_path / "tars").glob("*_stats.json")):
            record.rename(tmp_path / "files" / record.name)
        return tmp_path / "files", ()
    else:
        path = tmp_path / "elsewhere.jsonl"
        renamed = [{"file": row.pop("image"), "TEXT": row.pop("caption"), **row} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in renamed))
        return path, ("--image-field", "file", "--caption-field", "TEXT", "--image-root", folder)
    return path, ()


@pytest.mark.parametrize("options", [(), ("--shuffle-seed", 3, "--workers", 3), ("--resize", 5, "--format", "webp")])
def test_the_same_input_gives_the_same_bytes(folder, tmp_path, options):
    spoil(folder)
    run(folder, tmp_path / "first", *options)
    run(folder, tmp_path / "second", *options)
    assert files(tmp_path / "first") == files(tmp_path / "second")


def test_shuffling_changes_the_order_alone(folder, tmp_path):
    orders = {}
    for seed in (None, 0, 1):
        run(folder, tmp_path / str(seed), *(() if seed is None else ("--shuffle-seed", seed)))
        orders[seed] = tuple(json.loads(sample["json"])["source"] for sample in samples(tmp_path / str(seed)))
    assert len(set(orders.values())) == 3
    assert all(sorted(order) == sorted(NAMES) for order in orders.values())


def spoil(folder: Path) -> dict[str, str]:
    """Add one file of each kind that cannot be kept; what its reason must say."""
    good = picture(0)
    bad = {
        "broken.png": b"not an image at all",
        "cut.png": picture(1, (64, 64))[:3000],
        "small.png": picture(2, (3, 20)),
        "huge.png": picture(3, (101, 101)),
        "silent.png": good,
        "blank.png": good,
        "latin.png": good,
        "nojson.png": good,
        "list.png": good,
        "surrogate.png": good,
        "notes.md": b"# notes",
        "LICENSE": b"mine",
        "orphan.txt": b"a caption alone",
        "line\nbreak.png": good,
        "gif.png": b"GIF89a" + bytes(20),
    }
    captions = {"blank.txt": b" \n", "latin.txt": "é".encode("latin-1"), "surrogate.txt": b"x"}
    sidecars = {"nojson.json": b"{", "list.json": b"[1]", "surrogate.json": b'{"a": "\\ud800"}'}
    captions |= {f"{stem}.txt": b"x" for stem in ("broken", "cut", "small", "huge", "nojson", "list", "gif")}
    for name, data in (bad | captions | sidecars).items():
        (folder / name).write_bytes(data)
    (folder / "link.png").symlink_to("/etc/hostname")
    return {
        "broken.png": "unreadable image", "cut.png": "unreadable image", "gif.png": "unreadable image",
        "small.png": "too small: 3 x 20, --min-size is 4", "huge.png": "too large: 101 x 101, --max-pixels is 10000",
        "silent.png": "no caption", "blank.png": "no caption", "latin.png": "not UTF-8", "nojson.png": "not JSON",
        "list.png": "a list, not an object", "surrogate.png": "surrogate", "notes.md": "not an image: .md",
        "LICENSE": "no suffix", "orphan.txt": "no image beside it", "'line\\nbreak.png'": "cannot be printed",
        "link.png": "leaves the folder",
    }  # fmt: skip


def test_every_file_is_kept_or_refused_with_its_reason(folder, tmp_path, capsys):
    reasons = spoil(folder)
    assert run(folder, tmp_path / "out", "--min-size", 4, "--max-pixels", 10_000) == 0
    got = refused(tmp_path / "out")
    assert got.keys() == reasons.keys()
    assert {name for name in reasons if reasons[name] not in got[name]} == set()
    assert {json.loads(sample["json"])["source"] for sample in samples(tmp_path / "out")} == set(NAMES)
    screen = " ".join(capsys.readouterr().err.split())
    assert all(f"refused {name}: " in screen for name in reasons)


def test_every_row_is_kept_or_refused_with_its_reason(folder, tmp_path):
    rows = [{"image": "a.png", "caption": "kept"}, {"image": "../secret.png"}, {"image": "/etc/passwd"}]
    rows += [{"image": "gone.png", "caption": "x"}, {"caption": "no image"}, {"image": 3}, {"image": "b.jpg"}, [1]]
    (folder / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + "{not json\n")
    assert run(folder / "t.jsonl", tmp_path / "out") == 0
    got = refused(tmp_path / "out")
    assert len(samples(tmp_path / "out")) + len(got) == len(rows) + 1
    for name, reason in {
        "'../secret.png'": "--image-root", "'/etc/passwd'": "--image-root", "gone.png": "cannot be read",
        "t.jsonl row 5": "'image' (--image-field); others: caption", "t.jsonl row 6": "no image path",
        "b.jpg": "no caption", "t.jsonl row 8": "not a JSON object", "t.jsonl row 9": "not a JSON object",
    }.items():  # fmt: skip
        assert reason in got[name]


def test_damaged_tars_lose_only_what_is_damaged(folder, tmp_path):
    run(folder, tmp_path / "tars", "--samples-per-shard", 3)
    tar = tmp_path / "tars" / "00001.tar"
    with tarfile.open(tar) as members:
        last = members.getmembers()[-1]
    tar.write_bytes(tar.read_bytes()[: last.offset_data + 5])
    assert run(tmp_path / "tars", tmp_path / "out") == 0
    kept = {json.loads(sample["json"])["source"] for sample in samples(tmp_path / "out")}
    assert len(kept) == 5
    assert "cut short" in " ".join(refused(tmp_path / "out").values())


def test_without_captions_only_when_asked(folder, tmp_path, capsys):
    for path in [*folder.rglob("*.txt"), *folder.rglob("*.json")]:
        path.unlink()
    assert run(folder, tmp_path / "out") == 1
    assert "nothing in" in capsys.readouterr().err
    assert len(refused(tmp_path / "out")) == len(NAMES)
    assert run(folder, tmp_path / "out", "--allow-no-caption") == 0
    assert [sample["txt"] for sample in samples(tmp_path / "out")] == [b""] * len(NAMES)
    assert refused(tmp_path / "out") == {}


def one(folder: Path, data: bytes, tmp_path: Path, *options) -> Image.Image:
    """A single picture after the tool."""
    folder = tmp_path / "one"
    folder.mkdir()
    (folder / "x.png").write_bytes(data)
    assert run(folder, tmp_path / "out", "--allow-no-caption", *options) == 0
    sample = samples(tmp_path / "out")[0]
    extension = next(iter(sample.keys() & {"png", "jpg", "webp"}))
    return Image.open(io.BytesIO(sample[extension]))


def test_lossless_formats_keep_the_pixels(folder, tmp_path):
    data = picture(5, mode="RGBA")
    image = np.asarray(one(folder, data, tmp_path, "--format", "webp-lossless"))
    expected = np.asarray(Image.open(io.BytesIO(data)))
    visible = expected[..., 3] > 0
    assert np.array_equal(image[..., 3], expected[..., 3])
    assert np.array_equal(image[visible], expected[visible])


def test_resize_sets_the_short_side_of_larger_images_only(folder, tmp_path):
    run(folder, tmp_path / "small", "--resize", 6)
    run(folder, tmp_path / "same", "--resize", 9)
    run(folder, tmp_path / "plain")
    metadata = [json.loads(sample["json"]) for sample in samples(tmp_path / "small")]
    assert {(row["width"], row["height"], row["original_width"], row["original_height"]) for row in metadata} == {
        (8, 6, 12, 9)
    }
    assert content(tmp_path / "same") == content(tmp_path / "plain")


def test_transparency_becomes_white_in_jpeg_and_leaves_no_fringe(folder, tmp_path):
    pixels = np.zeros((16, 16, 4), np.uint8)
    pixels[:, :8] = (255, 0, 0, 255)  # red beside transparent black
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    image = np.asarray(one(folder, buffer.getvalue(), tmp_path, "--resize", 4, "--format", "jpg").convert("RGB"))
    assert (image[:, -1] > 250).all()
    assert (image[..., 0] > 240).all()  # a fringe of black would be dark in every channel


def test_sixteen_bit_grey_is_scaled_not_clipped(folder, tmp_path):
    ramp = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    buffer = io.BytesIO()
    Image.fromarray(ramp).save(buffer, "PNG")
    image = np.asarray(one(folder, buffer.getvalue(), tmp_path, "--format", "webp-lossless"))
    assert np.abs(image[..., 0].astype(int) - (ramp >> 8)).max() <= 1


@pytest.mark.parametrize(
    ("source", "output", "options", "parts"),
    [
        ("gone", "out", (), ("not there", "allowed: a folder", "change the first argument")),
        ("images/a.png", "out", (), ("of the kind .png", "allowed: a folder", "change the first argument")),
        ("images", "full", (), ("not empty", "--overwrite", "change --output")),
        ("images", "full/keep.md", (), ("is a file", "allowed: a new or empty folder", "change --output")),
        ("images", "images/out", (), ("overlap", "allowed: separate folders", "change --output")),
        ("images", ".", ("--overwrite",), ("overlap", "allowed: separate folders", "change --output")),
        ("images", "out", ("--samples-per-shard", 10_001), ("10001", "1 to 10000", "--samples-per-shard")),
        ("bad.parquet", "out", (), ("cannot be read", "allowed: a UTF-8", "change the first argument")),
        ("bad.csv", "out", (), ("cannot be read", "allowed: a UTF-8", "change the first argument")),
    ],
)
def test_errors_say_what_was_found_what_is_allowed_and_what_to_change(
    folder, tmp_path, capsys, source, output, options, parts
):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "keep.md").write_text("mine")
    (tmp_path / "bad.parquet").write_text("no parquet")
    (tmp_path / "bad.csv").write_bytes(b"image,caption\n\xff\xfe,x\n")
    before = sorted(tmp_path.rglob("*"))
    assert run(tmp_path / source, tmp_path / output, *options) == 2
    message = capsys.readouterr().err
    assert all(part in message for part in parts)
    assert sorted(tmp_path.rglob("*")) == before  # nothing is left behind
