"""The folder that `tools/sample.py` fills: what is there already, what is left to make, and the sheet of all.

Several processes write into one folder and never talk: each looks for its own images, and whichever finishes last finds
all of them and draws the sheet.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import sampling_settings
from PIL import Image
from sampling_requests import Request

from ldm_train.callbacks.drawing import Tile, captioned_grid
from ldm_train.checkpoint import atomic_write

SHOWN = 64
"""Images on the sheet."""
COLUMNS = 8
GRID = "grid.png"

_NOT_IN_COMMON = ("prompt", "seed", sampling_settings.FIELD, sampling_settings.PARAMETERS)


def is_made(request: Request, shared: Mapping[str, Any], folder: Path) -> bool:
    """Whether an image is there, whole, with these settings."""
    return _is_of(request, shared, folder) and sampling_settings.is_whole(folder / request.name)


def _is_of(request: Request, shared: Mapping[str, Any], folder: Path) -> bool:
    """Whether an image is there, perhaps in part, with these settings."""
    path = folder / request.name
    if not path.is_file():
        return False
    found, wanted = sampling_settings.read(path), sampling_settings.settings_of(request, shared)
    return found is not None and not sampling_settings.differing(found, wanted)


def pending(requests: Sequence[Request], shared: Mapping[str, Any], folder: Path) -> list[Request]:
    """The requests whose images are not there yet.

    Raises:
        ValueError: if another image has the name of one of them.
    """
    left = [request for request in requests if not is_made(request, shared, folder)]
    there = [request for request in left if (folder / request.name).exists()]
    if others := [request.name for request in there if not _is_of(request, shared, folder)]:
        raise ValueError(
            f"{folder} holds {len(others)} images of other settings, the first is {others[0]}; allowed are none, and "
            "those of this command, which are kept; change --output, or replace them with --overwrite"
        )
    return left


def write_grid(paths: Sequence[Path], target: Path) -> None:
    """Draw images on a sheet, with their prompts below and what they have in common above.

    Raises:
        ValueError: if there are none, or they are of several sizes.
    """
    tiles, texts = [], []
    for path in paths[:SHOWN]:
        with Image.open(path) as image:
            found = {key: str(value) for key, value in image.info.items()}
        texts.append({key: value for key, value in found.items() if key not in _NOT_IN_COMMON})
        tiles.append(Tile(sampling_settings.pixels_of(path), found.get("prompt", path.name)))
    if len({tuple(tile.image.shape) for tile in tiles}) != 1:
        raise ValueError(
            f"{len(paths)} images of {len({tuple(tile.image.shape) for tile in tiles})} sizes are to be drawn on one "
            "sheet; allowed is at least one, all of one size; change --grid"
        )
    common = {key: value for key, value in texts[0].items() if all(text.get(key) == value for text in texts)}
    title = ", ".join(f"{key} {value}" for key, value in common.items())
    with atomic_write(target) as temporary:
        captioned_grid(tiles, title, columns=min(COLUMNS, len(tiles))).save(temporary, format="PNG")


def images_in(folder: Path) -> list[Path]:
    """The images that were made into a folder, in order."""
    return sorted(path for path in folder.glob("*.png") if path.stem.isdigit())
