"""The tools are scripts, not a package: their folder has to be on the path."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))


@pytest.fixture
def draw(tiny_runs, tmp_path):
    """Runs the tool with two steps and returns the folder it wrote."""
    from tests.tools.drawn import PROMPTS, checkpoint, run

    def drawn(folder: str, *options: object, name: str = "demo", prompts: tuple[str, ...] = PROMPTS) -> Path:
        given = [option for prompt in prompts for option in ("--prompt", prompt)]
        arguments = ["--checkpoint", checkpoint(tiny_runs, name), *given, "--steps", 2, "--device", "cpu"]
        assert run(*arguments, "--output", tmp_path / folder, *options) == 0
        return tmp_path / folder

    return drawn
