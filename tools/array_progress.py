"""How much a task of an array has finished, for the job's script: it starts one again that gets further."""

import os
from pathlib import Path


def tell_finished(count: int) -> None:
    """Say it to whoever has started this process, if that asks (`slurm/again.sh`).

    Args:
        count: the shards, or images, of this task that are there.
    """
    if path := os.environ.get("LDM_START_FILE"):
        Path(path).write_text(f"{count}\n", encoding="utf-8")
