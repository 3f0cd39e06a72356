"""Where a checkpoint comes from: the config, the code, the data, the machine, and how often the run was started.

All of it is plain values, so that reading it runs no code. `load_run` rebuilds a stage from `config`; `provenance` is
for people who ask years later what a file is.
"""

import os
import platform
import socket
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import lightning as L

_PACKAGES = ("ldm-train", "torch", "torchvision", "lightning", "hydra-core", "numpy", "pillow")


class RunRecord(L.Callback):
    """Puts the resolved config and its provenance into every checkpoint.

    Args:
        config: plain dictionaries, lists and values.

    Attributes:
        restarts: how many earlier starts its state descends from; one that was ended before it had saved is none.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.restarts = 0
        self._provenance: dict[str, Any] = {}

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Looks up what does not change while the process lives, on the rank that writes."""
        if trainer.is_global_zero:
            index = getattr(trainer.datamodule, "train_index", None)  # type: ignore[attr-defined]
            self._provenance = {
                "git": git_state(Path(__file__).parents[2]),
                "packages": versions(),
                "python": platform.python_version(),
                "data_fingerprint": getattr(index, "fingerprint", None),
                "host": socket.gethostname(),
                "slurm_job": os.environ.get("SLURM_JOB_ID"),
                "world_size": trainer.world_size,
            }

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """The start that has saved it, and those that this one knows of."""
        self.restarts = checkpoint.get("provenance", {}).get("restarts", 0) + 1

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Tells the job's script, where it asks, from which step this start goes on (`slurm/again.sh`)."""
        if trainer.is_global_zero and (path := os.environ.get("LDM_START_FILE")):
            Path(path).write_text(f"{trainer.global_step}\n", encoding="utf-8")

    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        """Adds both."""
        checkpoint["config"] = self.config
        checkpoint["provenance"] = self._provenance | {"restarts": self.restarts}

    def facts(self) -> dict[str, object]:
        """For the start-up table."""
        git = self._provenance.get("git")
        code = {} if git is None else {"code": git["commit"][:12] + (", changed" if git["is_changed"] else "")}
        return code | ({"earlier starts": self.restarts} if self.restarts else {})


def git_state(directory: Path) -> dict[str, Any] | None:
    """The commit that is checked out, and whether files differ from it; None where git knows nothing."""
    if not (directory / ".git").exists():
        return None
    commit = _git(directory, "rev-parse", "HEAD")
    changes = _git(directory, "status", "--porcelain", "--untracked-files=no")
    return None if commit is None else {"commit": commit, "is_changed": bool(changes)}


def versions() -> dict[str, str | None]:
    """The installed version of each package that what is trained may depend on."""
    return {name: _version(name) for name in _PACKAGES}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(directory: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(directory), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
