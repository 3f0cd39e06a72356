"""What the ranks of a run are compared by."""

import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

import ldm_train
from ldm_train.callbacks import ranks


def test_code_is_the_same_wherever_it_lies_and_another_with_one_more_space(tmp_path):
    package = Path(ldm_train.__file__).parent
    shutil.copytree(package, tmp_path / "copy", ignore=shutil.ignore_patterns("__pycache__", "assets"))
    assert ranks.code_digest(tmp_path / "copy") == ranks.code_digest(package)
    module = tmp_path / "copy/nn/unet.py"
    module.write_text(module.read_text() + " ")
    assert ranks.code_digest(tmp_path / "copy") != ranks.code_digest(package)


def test_the_comparison_of_ranks_asks_no_git(monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("git was asked"))
    facts = ranks._facts(SimpleNamespace(datamodule=None, world_size=2), {"seed": 1})
    assert facts["the code"] == ranks.code_digest(Path(ldm_train.__file__).parent)
