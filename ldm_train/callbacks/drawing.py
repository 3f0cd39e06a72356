"""Pictures for people: labelled tiles on a white sheet, as a PIL image. No Lightning here.

A sheet is a title above rows of tiles; a tile is an image above its caption, wrapped to the tile's width. A small image
is enlarged by a whole factor, so that its pixels stay visible, and a big one reduced. The font is the one that ships
with Pillow: the same on every machine, but without accents, which are left out.
"""

import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

_MARGIN = 16
_GAP = 10
_INK, _FAINT = "#111111", "#d0d0d0"
_LEAST_SIDE, _MOST_SIDE = 96, 192  # of a tile, in pixels: a short caption fits in three lines, a sheet in a few MB


@dataclass(frozen=True)
class Tile:
    """An image (3, H, W) of bytes and the text under it."""

    image: Tensor
    caption: str = ""


def captioned_grid(tiles: Sequence[Tile], title: str, columns: int = 8, caption_lines: int = 3) -> Image.Image:
    """Tiles from left to right and top to bottom, all of one size, under a title."""
    rows = [tiles[i : i + columns] for i in range(0, len(tiles), columns)]
    return labelled_rows(rows, [""] * len(rows), title, caption_lines)


def labelled_rows(
    rows: Sequence[Sequence[Tile]], labels: Sequence[str], title: str, caption_lines: int = 3
) -> Image.Image:
    """Rows of tiles, all of one size, with a label at the left of each row and a title above.

    Args:
        rows: tiles of equal height and width; rows may differ in length.
        labels: one per row; all empty for no column of labels.
        title: one line, wrapped if the sheet is narrow.
        caption_lines: the most lines of a caption; longer ones end in an ellipsis. A row without captions needs none.
    """
    height, width = _tile_size(*rows[0][0].image.shape[-2:])
    small, label_font, title_font = (ImageFont.load_default(size) for size in (12, 15, 18))
    line = _line_height(small)

    captions = [[_wrap(tile.caption, small, width, caption_lines) for tile in row] for row in rows]
    text_heights = [line * max(len(lines) for lines in row) + (4 if any(row) else 0) for row in captions]
    left = _MARGIN + max((int(label_font.getlength(label)) + 12 for label in labels if label), default=0)
    sheet_width = left + max(len(row) for row in rows) * (width + _GAP) - _GAP + _MARGIN
    title_lines = _wrap(title, title_font, sheet_width - 2 * _MARGIN, 3)
    top = _MARGIN + len(title_lines) * _line_height(title_font) + (8 if title_lines else 0)

    sheet = Image.new("RGB", (sheet_width, top + sum(text_heights) + len(rows) * (height + _GAP) + 6), "white")
    draw = ImageDraw.Draw(sheet)
    for i, text in enumerate(title_lines):
        draw.text((_MARGIN, _MARGIN + i * _line_height(title_font)), text, fill=_INK, font=title_font)
    y = top
    for row, label, wrapped, text_height in zip(rows, labels, captions, text_heights, strict=True):
        draw.text((_MARGIN, y + height // 2), label, fill=_INK, font=label_font, anchor="lm")
        for column, (tile, lines) in enumerate(zip(row, wrapped, strict=True)):
            x = left + column * (width + _GAP)
            sheet.paste(_resized(tile.image, height, width), (x, y))
            draw.rectangle((x - 1, y - 1, x + width, y + height), outline=_FAINT)
            for i, text in enumerate(lines):
                draw.text((x + width / 2, y + height + 3 + i * line), text, fill=_INK, font=small, anchor="ma")
        y += height + text_height + _GAP
    return sheet


def blocks_of_rows(
    images: Mapping[str, Tensor], captions: Sequence[str] = (), columns: int = 8
) -> tuple[list[list[Tile]], list[str]]:
    """Several kinds of the same pictures for `labelled_rows`: one kind above the other, block below block.

    Args:
        images: kind -> (N, 3, H, W) bytes; the kind becomes the row's label.
        captions: N texts under the last kind, or none.
        columns: the most tiles of a row.

    Returns:
        The rows and their labels.
    """
    rows, labels = [], []
    kinds = list(images)
    for start in range(0, len(images[kinds[0]]), columns):
        texts = captions[start : start + columns]
        for kind in kinds:
            block = images[kind][start : start + columns].cpu()
            under = texts if kind == kinds[-1] and texts else [""] * len(block)
            rows.append([Tile(image, text) for image, text in zip(block, under, strict=True)])
            labels.append(kind)
    return rows, labels


def _tile_size(height: int, width: int) -> tuple[int, int]:
    longer = max(height, width)
    if longer > _MOST_SIDE:
        return round(height * _MOST_SIDE / longer), round(width * _MOST_SIDE / longer)
    factor = max(1, -(-_LEAST_SIDE // longer))
    return height * factor, width * factor


def _resized(image: Tensor, height: int, width: int) -> Image.Image:
    """A PIL image of (3, H, W) bytes; an enlarged pixel is a square."""
    picture = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
    how = Image.Resampling.NEAREST if width >= picture.width else Image.Resampling.LANCZOS
    return picture.resize((width, height), how)


def _line_height(font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> int:
    return int(font.getbbox("Ápg|")[3]) + 2


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int) -> list[str]:
    """At most `most` lines of at most `width` pixels; too long a word is cut, and an ellipsis marks what is lost."""
    lines: list[str] = []
    plain = "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))
    for word in plain.split():
        if lines and font.getlength(f"{lines[-1]} {word}") <= width:
            lines[-1] = f"{lines[-1]} {word}"
        else:
            lines.append(word)
    kept = lines[:most]
    if len(lines) > most:
        kept[-1] += " …"
    return [_cut(line, font, width) for line in kept]


def _cut(line: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    if font.getlength(line) <= width:
        return line
    stem = line.removesuffix(" …")
    while stem and font.getlength(stem + "…") > width:
        stem = stem[:-1]
    return stem + "…"
