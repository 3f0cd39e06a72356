import io
import json
import tarfile

import numpy as np
import pytest
from PIL import Image


def encode(pixels, kind="PNG", **options):
    buffer = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def picture(number, size=8):
    """A square whose colour says which sample it is."""
    return encode(np.full((size, size, 3), (number % 256, number // 256, 7), dtype=np.uint8))


def write_tar(path, members, kind=tarfile.USTAR_FORMAT):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def sample(number, **metadata):
    key = f"{number:06d}"
    fields = {"number": number, "parity": number % 2, "width": 8, "height": 8, "text": f"field {number}", **metadata}
    return [
        (f"{key}.png", picture(number)),
        (f"{key}.json", json.dumps(fields).encode()),
        (f"{key}.txt", f"caption {number}".encode()),
    ]


@pytest.fixture
def write_shards(tmp_path):
    """Write shards with the given numbers of samples, numbered through; returns a glob for them."""

    def write(*counts, folder="shards"):
        first = 0
        for shard, count in enumerate(counts):
            members = [member for number in range(first, first + count) for member in sample(number)]
            write_tar(tmp_path / folder / f"{shard:05d}.tar", members)
            first += count
        return str(tmp_path / folder / "*.tar")

    return write
