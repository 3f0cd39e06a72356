"""`tools/make_shards.py` and segmentation maps: they go with their images, at their size, and mix no classes."""

import io
import json

import make_shards
import numpy as np
import pytest
import webdataset
from PIL import Image

QUARTERS = np.repeat(np.repeat(np.array([[3, 9], [200, 31]], np.uint8), 4, 0), 6, 1)  # 8 high, 12 wide


@pytest.fixture
def folder(tmp_path):
    """Two captioned images of 12 x 8 with maps; one of them lies on its side in the file."""
    root = tmp_path / "images"
    root.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 12)).save(root / "a.png", exif=exif)
    Image.new("RGB", (12, 8)).save(root / "b.png")
    for name in "ab":
        (root / f"{name}.txt").write_text("four quarters")
        Image.fromarray(QUARTERS).save(root / f"{name}.seg.png")
    return root


def run(source, output, *options):
    make_shards.main([str(source), "--output", str(output), *options])
    tars = [str(path) for path in sorted(output.glob("*.tar"))]
    return list(webdataset.WebDataset(tars, shardshuffle=False)) if tars else []


def refused(output):
    lines = (output / make_shards.REFUSED).read_text(encoding="utf-8").splitlines()
    return {row["source"]: row["reason"] for row in map(json.loads, lines)}


@pytest.mark.parametrize("through_tars", [False, True])
def test_maps_are_copied_or_shrunk_with_their_images(folder, tmp_path, through_tars):
    source = folder
    if through_tars:
        run(folder, source := tmp_path / "tars")
    assert [sample["seg.png"] for sample in run(source, tmp_path / "same")] == [(folder / "a.seg.png").read_bytes()] * 2
    small = run(source, tmp_path / "small", "--resize", "4")
    assert len(small) == 2
    for sample in small:
        image, classes = (np.asarray(Image.open(io.BytesIO(sample[kind]))) for kind in ("png", "seg.png"))
        assert image.shape[:2] == classes.shape == (4, 6)
        assert (classes == QUARTERS[::2, ::2]).all()


def test_other_sizes_than_a_whole_fraction_mix_no_classes(folder, tmp_path):
    for sample in run(folder, tmp_path / "out", "--resize", "5"):
        assert set(np.unique(np.asarray(Image.open(io.BytesIO(sample["seg.png"]))))) == {3, 9, 200, 31}


def png(*shape):
    buffer = io.BytesIO()
    Image.fromarray(np.zeros(shape, np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(12, 8), "its .seg.png is 8 x 12, L; it must be 12 x 8 of one channel"),
        (png(8, 12, 3), "its .seg.png is 12 x 8, RGB; it must be 12 x 8 of one channel"),
        (b"no png", "unreadable .seg.png"),
        (png(8, 12)[:45], "unreadable .seg.png"),
    ],
    ids=["size", "channels", "no png", "cut"],
)
def test_maps_that_do_not_fit_are_refused_with_their_image(folder, tmp_path, data, reason):
    (folder / "a.seg.png").write_bytes(data)
    (folder / "orphan.seg.png").write_bytes(png(2, 2))
    (kept,) = run(folder, tmp_path / "out")
    assert json.loads(kept["json"])["source"] == "b.png"
    reasons = refused(tmp_path / "out")
    assert reason in reasons.pop("a.png")
    assert reasons == {"orphan.seg.png": "no image beside it"}
