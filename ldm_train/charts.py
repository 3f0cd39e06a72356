"""Charts for people: one figure against each of several settings, as a PIL image. No Lightning here.

A panel is a setting on the horizontal axis and the figure on the vertical one. Numbers lie where their value is, on a
logarithmic axis if they are positive and span more than a factor of 10; words lie side by side.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_WIDTH, _HEIGHT = 360, 300  # of a panel's axes, in pixels
_LEFT, _RIGHT, _TOP, _BOTTOM = 84, 20, 20, 64
_INK, _GRID, _LINE, _POINT = "#111111", "#e4e4e4", "#a8bcd8", "#1f5fbf"
_LOGARITHMIC = 10.0
_COLUMNS = 3
_LABEL = 14  # characters of a word on an axis
_NUMBER, _WORD = 66, 100  # pixels that a tick's text needs

Scale = Callable[[float], float]


@dataclass(frozen=True)
class Panel:
    """A setting's name and texts, and the figure that belongs to each."""

    name: str
    settings: Sequence[str]
    figures: Sequence[float]


def panels(drawn: Sequence[Panel], figure: str) -> Image.Image:
    """Panels from left to right and top to bottom.

    Args:
        drawn: at least one; all with the same number of points, at least one, and finite figures.
        figure: what the vertical axis is called.
    """
    columns = min(len(drawn), _COLUMNS)
    width, height = _LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM
    sheet = Image.new("RGB", (columns * width, -(-len(drawn) // columns) * height), "white")
    for i, panel in enumerate(drawn):
        sheet.paste(_panel(panel, figure, is_alone=len(drawn) == 1), (i % columns * width, i // columns * height))
    return sheet


def _panel(panel: Panel, figure: str, is_alone: bool) -> Image.Image:
    image = Image.new("RGB", (_LEFT + _WIDTH + _RIGHT, _TOP + _HEIGHT + _BOTTOM), "white")
    draw, font = ImageDraw.Draw(image), ImageFont.load_default(13)
    positions, ticks = _horizontal(panel.settings)
    across = _scale(positions, _LEFT, _LEFT + _WIDTH)
    up = _scale(list(panel.figures), _TOP + _HEIGHT, _TOP)
    values = _round_values(min(panel.figures), max(panel.figures))
    for value, text in zip(values, _spelled(values), strict=True):
        y = up(value)
        draw.line((_LEFT, y, _LEFT + _WIDTH, y), fill=_GRID)
        draw.text((_LEFT - 6, y), text, fill=_INK, font=font, anchor="rm")
    for position, text in ticks:
        x = across(position)
        draw.line((x, _TOP, x, _TOP + _HEIGHT), fill=_GRID)
        draw.text((x, _TOP + _HEIGHT + 6), text, fill=_INK, font=font, anchor="ma")
    draw.rectangle((_LEFT, _TOP, _LEFT + _WIDTH, _TOP + _HEIGHT), outline=_INK)
    points = sorted((across(x), up(y)) for x, y in zip(positions, panel.figures, strict=True))
    if is_alone and len(set(positions)) == len(positions):  # otherwise a line would join what differs in other ways
        draw.line(points, fill=_LINE, width=2)
    for x, y in points:
        draw.ellipse((x - 4, y - 4, x + 4, y + 4), fill=_POINT)
    draw.text((_LEFT + _WIDTH / 2, _TOP + _HEIGHT + 34), panel.name, fill=_INK, font=font, anchor="ma")
    draw.text((6, 2), figure, fill=_INK, font=font)
    return image


def _horizontal(settings: Sequence[str]) -> tuple[list[float], list[tuple[float, str]]]:
    """Where the points lie, and the ticks: a position and its text."""
    numbers = [_as_number(text) for text in settings]
    if any(number is None for number in numbers):
        words = list(dict.fromkeys(settings))
        places = _spaced([(float(i), word[:_LABEL]) for i, word in enumerate(words)], _WORD)
        return [float(words.index(text)) for text in settings], places
    values = [number for number in numbers if number is not None]
    if min(values) > 0 and max(values) / min(values) > _LOGARITHMIC:
        return [math.log10(v) for v in values], _spaced([(math.log10(v), f"{v:.3g}") for v in sorted(set(values))])
    return values, _spaced([(v, f"{v:.4g}") for v in sorted(set(values))])


def _spaced(ticks: list[tuple[float, str]], width: int = _NUMBER) -> list[tuple[float, str]]:
    """The ticks that have room for texts of so many pixels, from left to right."""
    low, high = ticks[0][0], ticks[-1][0]
    kept: list[tuple[float, str]] = []
    for position, text in ticks:
        if not kept or (position - kept[-1][0]) * _WIDTH > width * (high - low):
            kept.append((position, text))
    return kept


def _as_number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _scale(values: Sequence[float], start: float, end: float) -> Scale:
    """From values to pixels, with a margin of a twentieth at both ends; one value lies in the middle."""
    low, high = min(values), max(values)
    if high == low:
        return lambda value: (start + end) / 2
    margin = (high - low) / 20
    return lambda value: start + (end - start) * (value - low + margin) / (high - low + 2 * margin)


def _round_values(low: float, high: float) -> list[float]:
    """About five values between two others, each a multiple of 1, 2 or 5 times a power of ten."""
    if high == low:
        return [low]
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first = math.ceil(low / step - 1e-9)
    return [i * step for i in range(first, math.floor(high / step + 1e-9) + 1)]


def _spelled(values: Sequence[float]) -> list[str]:
    """Numbers with as many digits as tell them apart."""
    digits = next((n for n in range(3, 12) if len({f"{value:.{n}g}" for value in values}) == len(values)), 12)
    return [f"{value:.{digits}g}" for value in values]
