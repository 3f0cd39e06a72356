"""What a run ended with, in `result.json` in its directory: the record that tables of several runs are made of.

It is written when a run begins (`running`) and again when it ends, in whatever way Python sees:

    finished    it did all it was asked to
    failed      an error ended it; `reason` is its type and message
    stopped     a signal ended it, and the same command goes on with it

A run that is killed leaves `running` behind. Figures are the last value of each key that was logged; a run that is gone
on with keeps those of its earlier starts, and its seconds add up.
"""

import json
import math
import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning as L

from ldm_train.checkpoint import replace_durably

FILE = "result.json"
_MOST_CHARACTERS = 300


@dataclass(frozen=True)
class Result:
    """What `result.json` holds.

    Attributes:
        state: running, finished, failed or stopped.
        reason: why it is not finished, one line.
        steps: optimizer steps so far.
        seconds: of all starts together.
        figures: the last value of each key.
    """

    state: str
    reason: str = ""
    steps: int = 0
    seconds: float = 0.0
    figures: Mapping[str, float] = field(default_factory=dict)


def read_result(run_dir: Path) -> Result | None:
    """The record of a run's directory; None if it has none that can be read."""
    found = read_json(run_dir / FILE)
    if found is None:
        return None
    figures = {key: float(value) for key, value in found["figures"].items()}
    return Result(found["state"], found["reason"], found["steps"], found["seconds"], figures)


@contextmanager
def recorded(run_dir: Path, trainer: L.Trainer, goes_on: bool) -> Iterator[None]:
    """The context of a run; its end is written whatever it is. Only rank 0 writes.

    Args:
        run_dir: the run's directory.
        trainer: the run's trainer.
        goes_on: whether this start continues a run that is in the directory.
    """
    if not trainer.is_global_zero:
        yield
        return
    before = (read_result(run_dir) if goes_on else None) or Result("running")
    began = time.monotonic()

    def write(state: str, reason: str = "") -> None:
        figures = {**before.figures, **{key: float(value) for key, value in trainer.callback_metrics.items()}}
        steps, seconds = max(before.steps, trainer.global_step), before.seconds + time.monotonic() - began
        write_json(run_dir / FILE, asdict(Result(state, reason, steps, round(seconds, 1), _spelled(figures))))

    write("running")
    try:
        yield
    except (SystemExit, KeyboardInterrupt) as stop:
        write("stopped", f"by {_stopper(stop)}; the same command goes on")
        raise
    except BaseException as error:
        write("failed", described(error))
        raise
    write("finished")


def final_figure(run_dir: Path, trainer: L.Trainer, key: str) -> float | None:
    """The last value of a key; a run that had all of its steps before this start has the one of its record."""
    if key in trainer.callback_metrics:
        return float(trainer.callback_metrics[key])
    result = read_result(run_dir)
    return None if result is None else result.figures.get(key)


def described(error: BaseException) -> str:
    """The type and the message of an error on one line, not too long for a table."""
    return shortened(" ".join(f"{type(error).__name__}: {error}".split()), _MOST_CHARACTERS)


def shortened(text: str, most: int) -> str:
    """A message of about `most` characters; its last clause, which names what to change, stays whole."""
    if len(text) <= most:
        return text
    start, clause, last = text.rpartition("; ")
    if not clause or len(last) > _MOST_CHARACTERS:
        return text[: most - 1] + "…"
    return f"{start[: max(most - len(last) - 2, most // 3)]}… {last}"


def read_json(path: Path) -> dict[str, Any] | None:
    """A file's object; None if the file is not there, or was never whole."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a file in one move, so that whoever reads it meanwhile finds a whole one."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")  # two sweeps may write it
    temporary.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    replace_durably(temporary, path)


def _stopper(stop: BaseException) -> str:
    """The signal behind an exit status of 128 + its number; else what the exit says of itself."""
    code = stop.code if isinstance(stop, SystemExit) else None
    return signal.Signals(code - 128).name if isinstance(code, int) and code > 128 else described(stop)


def _spelled(figures: Mapping[str, float]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: their names stand for them, which `float` reads."""
    return {key: value if math.isfinite(value) else str(value) for key, value in figures.items()}
