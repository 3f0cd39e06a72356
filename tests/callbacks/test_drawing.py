import numpy as np
import pytest
import torch
from PIL import ImageFont

from ldm_train.callbacks.drawing import Tile, _wrap, captioned_grid, labelled_rows


def _image(size, value):
    return torch.full((3, size, size), value, dtype=torch.uint8)


def _colours(picture):
    return {tuple(colour) for _, colour in picture.getcolors(1 << 20)}


def test_every_tile_is_on_the_sheet_in_reading_order_with_square_pixels():
    tiles = [
        Tile(torch.tensor([40 + i, 0, 200], dtype=torch.uint8)[:, None, None].expand(3, 32, 32)) for i in range(10)
    ]
    pixels = np.asarray(captioned_grid(tiles, "title", columns=4)).astype(int)
    corners = []
    for i in range(10):
        rows, columns = np.nonzero((pixels == [40 + i, 0, 200]).all(-1))
        assert len(rows) == 96 * 96  # 32 pixels, enlarged three times, nothing drawn over them
        corners.append((rows.min(), columns.min()))
    assert corners == sorted(corners)
    assert len({row for row, _ in corners}) == 3


def test_captions_and_labels_leave_ink_and_their_absence_does_not():
    rows = [[Tile(_image(32, 255))]]
    assert _colours(captioned_grid(rows[0], "")) == {(255, 255, 255), (208, 208, 208)}
    assert len(_colours(captioned_grid([Tile(_image(32, 255), "a red fish")], ""))) > 2
    assert labelled_rows(rows, ["reference"], "").width > labelled_rows(rows, [""], "").width


def test_big_images_are_reduced_and_keep_their_shape():
    tile = Tile(torch.full((3, 256, 512), 7, dtype=torch.uint8))
    pixels = np.asarray(captioned_grid([tile], ""))
    assert (pixels == 7).all(-1).sum() == 192 * 96


@pytest.mark.parametrize("width", [60, 96, 300])
@pytest.mark.parametrize(
    "text", ["", "swan", "flag of türkiye, a country flag", "a " * 40, "x" * 99, "zwölf Boxkämpfer"]
)
def test_wrapped_lines_fit_and_an_ellipsis_marks_what_is_lost(text, width):
    font = ImageFont.load_default(12)
    lines = _wrap(text, font, width, 3)
    assert len(lines) <= 3
    assert all(font.getlength(line) <= width for line in lines)
    shown = " ".join(lines)
    plain = text.replace("ü", "u").replace("ö", "o").replace("ä", "a")
    assert shown == " ".join(plain.split()) or "…" in shown
