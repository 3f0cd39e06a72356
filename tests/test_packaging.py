import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]


def relative(folder, pattern):
    return {path.relative_to(ROOT).as_posix() for path in (ROOT / folder).rglob(pattern)}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The package's wheel, built without a network and unpacked: no checkout is in reach."""
    folder = tmp_path_factory.mktemp("wheel")
    build = ["pip", "wheel", str(ROOT), "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder)]
    subprocess.run([sys.executable, "-m", *build], check=True, capture_output=True, cwd=folder)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


@pytest.mark.slow
def test_the_wheel_holds_code_configs_and_data_with_its_licence(wheel):
    inside = {path.relative_to(wheel).as_posix() for path in wheel.rglob("*")}
    assert {f"ldm_train/{path}" for path in relative("conf", "*.yaml")} <= inside
    assert relative("ldm_train", "*.py") | relative("hydra_plugins", "*.py") <= inside
    assets = relative("ldm_train/assets/noto_emoji", "*")
    assert {path.rpartition("/")[2] for path in assets} >= {"00000.tar", "LICENSE", "NOTICE"}
    assert assets <= inside
    assert not any(path.startswith(("tests", "tools", "runs")) for path in inside)


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(wheel, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "LDM_RUNS"} | {"PYTHONPATH": str(wheel)}
    command = [sys.executable, "-m", "ldm_train", "experiment=demo_autoencoder", "debug=tiny", "logger=csv"]
    quick = ["trainer.max_steps=2", "callbacks.calibration.num_images=8", "callbacks.reconstructions.num_images=2"]
    where = [sys.executable, "-c", "from ldm_train.config import conf_dir; print(conf_dir())"]
    shown = subprocess.run(where, cwd=tmp_path, env=environment, check=True, capture_output=True, text=True)
    assert Path(shown.stdout.strip()) == wheel / "ldm_train/conf"
    run = subprocess.run(
        [*command, *quick], cwd=tmp_path, env=environment, check=False, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "runs/debug/demo_autoencoder/default/checkpoints/last.ckpt").is_file()


def test_every_requirement_is_pinned_to_a_version_in_its_range():
    lines = re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pins = {canonicalize_name(name): version for name, version in lines}
    assert len(pins) == len(lines)
    for requirement in map(Requirement, [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["slurm"], *EXTRAS["sweep"]]):
        assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), requirement
