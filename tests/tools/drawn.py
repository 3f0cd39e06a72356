"""What the tests of `tools/sample.py` share: runs of the tool, and looks at what it drew."""

from pathlib import Path

import numpy as np
import sample
from PIL import Image

PROMPTS = ("red apple, a fruit food emoji", "blue heart, a heart emoji", "a flag emoji")


def checkpoint(runs: Path, name: str = "demo") -> Path:
    return runs / name / "default" / "checkpoints" / "last.ckpt"


def adapters(runs: Path) -> Path:
    return runs / "demo_lora" / "default" / "lora" / "adapters.safetensors"


def run(*arguments: object) -> int:
    """The tool's exit code."""
    return sample.main([str(argument) for argument in arguments])


def pixels(folder: Path) -> np.ndarray:
    """All images of a folder: (N, H, W, 3)."""
    paths = sorted(folder.glob("0*.png"))
    return np.stack([np.asarray(Image.open(path)).astype(int) for path in paths])


def fields(path: Path) -> dict[str, str]:
    return Image.open(path).text
