"""Where figures and pictures go: Weights & Biases and a CSV file, on rank 0.

W&B never asks a question: with an API key and a reachable server a run is online, otherwise it is recorded on disk
(`wandb leet` shows it, `wandb sync` sends it later). The run's id is derived from its directory, so a requeued job
continues the run it belongs to. Its records are written by a process of its own, a second late, which SIGTERM ends at
once, and SLURM sends it to all processes of a job. From then on W&B is told nothing, and the run goes on: a warning
says so.

`metrics.csv` is always there, needs nothing to read, and outlives a kill: each row is on disk when `save` returns, and
a resumed run appends to it. A step has its row before a checkpoint has the step, so none is missing; one that is
replayed after a kill appears twice, and the later row counts.
"""

import csv
import logging
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from hashlib import sha1
from netrc import NetrcParseError, netrc
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlparse

import lightning as L
import torch
from lightning.pytorch.loggers import Logger, WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from ldm_train.data.locations import shown

_log = logging.getLogger(__name__)

_FLUSH_SECONDS = 1.0  # what W&B's record lacks if its process is ended; W&B's own default is 15


def log_metrics(trainer: L.Trainer, metrics: Mapping[str, float | Tensor], step: int) -> None:
    """Gives figures that were measured outside a step to all loggers, and to `trainer.callback_metrics`.

    Lightning's own `log` is forbidden in `on_train_start` and `on_train_end`, where a model is judged first and last.
    """
    values = {key: float(value) for key, value in metrics.items()}
    for logger in trainer.loggers:
        logger.log_metrics(values, step=step)
        logger.save()
    trainer.callback_metrics.update({key: torch.tensor(value) for key, value in values.items()})


def log_trained_batch(trainer: L.Trainer) -> None:
    """Gives the figures of the batch that was just trained to all loggers, and to none of them again.

    Lightning does so behind all callbacks, hence after a checkpoint that one of them writes: a run that is killed
    between the two would go on after a step without a row. Every rank calls it.
    """
    connector = trainer._logger_connector
    try:
        connector.update_train_step_metrics()
    except OSError as error:  # a save is worth more than a row
        _log.warning("the last batch's figures are not logged: %s", error)
        return
    # In the place of Lightning's own call, once; a second one here is no other.
    name = "update_train_step_metrics"
    setattr(connector, name, partial(vars(connector).pop, name, None))


@rank_zero_only
def save_picture(trainer: L.Trainer, picture: Image.Image, path: Path, key: str, step: int) -> None:
    """Writes a PNG and shows it in W&B under `key`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.save(path)
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_image(key, [picture], step=step)


class LenientWandbLogger(WandbLogger):
    """Lightning's, for which a run of W&B's that was begun and is lost is no error of the training."""

    _is_lost = False

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Tells W&B, if it is there."""
        self._tell(partial(super().log_metrics, metrics, step))

    def log_image(self, key: str, images: list[Any], step: int | None = None, **kwargs: Any) -> None:  # noqa: ANN401
        """Shows W&B, if it is there."""
        self._tell(partial(super().log_image, key, images, step, **kwargs))

    def _tell(self, tell: Callable[[], None]) -> None:
        _ = self.experiment  # one that cannot be begun is an error
        if not self._is_lost:
            self._is_lost = not _has_heard(tell)


def wandb_logger(
    run_dir: str,
    project: str,
    name: str,
    run_id: str,
    group: str | None = None,
    tags: list[str] | None = None,
    offline: bool | None = None,
) -> WandbLogger:
    """A W&B logger that writes below `run_dir`, silently.

    Args:
        run_dir: the run's directory; its path decides the W&B id.
        project: W&B project.
        name: the experiment's name; shown with the run's id.
        run_id: the run's id, which tells it from other runs of the experiment.
        group: W&B group, for the runs of a sweep.
        tags: W&B tags.
        offline: null decides by itself: `WANDB_MODE` if it is set, else offline without a key or without a network.
    """
    import wandb

    directory = Path(run_dir).absolute()
    if rank_zero_only.rank == 0:  # type: ignore[attr-defined]
        directory.mkdir(parents=True, exist_ok=True)
    # Lightning's own `offline=True` would set WANDB_MODE for the whole process, hence for the next run of a sweep.
    mode = os.environ.get("WANDB_MODE") if offline is None else None
    logger = LenientWandbLogger(
        project=project,
        name=f"{name} {run_id}",
        save_dir=str(directory),
        id=wandb_id(directory),
        group=group,
        tags=tags,
        mode=mode or ("offline" if _must_be_offline(offline) else "online"),
        settings=wandb.Settings(
            silent=True,
            console="off",
            disable_git=True,
            x_disable_meta=_command_holds_secrets(),
            x_transaction_log_flush_interval=_FLUSH_SECONDS,
        ),
    )
    logger._wandb_init.pop("anonymous", None)  # Lightning always passes it on, wandb 0.31 warns that it means nothing
    return logger


def wandb_id(run_dir: str | Path) -> str:
    """The W&B id of a run: 12 hexadecimal digits of its directory's absolute path."""
    return sha1(str(Path(run_dir).absolute()).encode()).hexdigest()[:12]


def finish_wandb() -> None:
    """Ends the process's W&B run, if there is one: a sweep's next run in this process must not write into it."""
    if (run := _wandb_run()) is not None and not _has_heard(run.finish):
        _dismiss_service()


def leave_wandb(seconds: float) -> None:
    """Ends the process's W&B run, if there is one, and W&B's own process, before SLURM does.

    Args:
        seconds: after which it goes on in the background.
    """

    def leave() -> None:
        finish_wandb()
        _dismiss_service()

    if _wandb_run() is not None:
        leaving = Thread(target=leave, name="leave_wandb", daemon=True)
        leaving.start()
        leaving.join(seconds)
        if leaving.is_alive():
            _log.warning("W&B has not received everything after %.0f s; `wandb sync` sends the rest", seconds)


def _wandb_run() -> Any:  # noqa: ANN401
    return sys.modules["wandb"].run if "wandb" in sys.modules else None


def _dismiss_service() -> None:
    """End W&B's own process; one that is gone already would be a traceback at the interpreter's end."""
    import wandb

    with suppress(OSError, wandb.Error, SystemExit):
        wandb.teardown()


def _has_heard(tell: Callable[[], None]) -> bool:
    """Whether W&B was there to be told; a warning says that it was not."""
    import wandb

    try:
        tell()
    except (OSError, wandb.Error) as error:
        _log.warning("W&B is lost (%s): it lacks what came last, which `metrics.csv` has", error)
        return False
    return True


def _command_holds_secrets() -> bool:
    """Whether the command, which W&B would keep beside facts of the machine, names more than is for everyone."""
    return any(shown(word) != word or "storage_options" in word for word in sys.argv)


def _must_be_offline(offline: bool | None) -> bool:
    if offline is not None:
        return offline
    server = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host, port = server.hostname or "", server.port or (443 if server.scheme == "https" else 80)
    return not (_has_key(host) and _reachable(host, port))


def _has_key(host: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (FileNotFoundError, NetrcParseError, PermissionError):
        return False


def _reachable(host: str, port: int, timeout: float = 3.0) -> bool:
    try:
        with socket.create_connection((host, port), timeout=timeout):
            return True
    except OSError:
        return False


class MetricsCSV(Logger):
    """Writes `metrics.csv` in the run directory: a row per call, a column per key, empty where a key was not logged.

    Lightning's own CSV logger deletes the file of the run that it resumes.

    Args:
        run_dir: the run's directory.
    """

    def __init__(self, run_dir: str) -> None:
        super().__init__()
        self.path = Path(run_dir) / "metrics.csv"
        self._columns: list[str] = []
        self._rows: list[dict[str, float]] = []

    @property
    def name(self) -> str:
        """The file's name: every logger has one."""
        return self.path.name

    @property
    def version(self) -> str:
        """The run directory's name."""
        return self.path.parent.name

    @property
    def save_dir(self) -> str:
        """The run directory."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: dict[str, Any] | Namespace, *args: object, **kwargs: object) -> None:
        """Nothing: checkpoints hold the resolved config."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Keeps a row for the next `save`."""
        self._rows.append({"step": -1 if step is None else step, **metrics})

    @rank_zero_only
    def save(self) -> None:
        """Appends the rows; a new key makes the file anew with one more column."""
        if not self._rows:
            return
        if not self._columns:
            self._columns = self._header()
        new = sorted({key for row in self._rows for key in row} - set(self._columns))
        if new:
            self._add_columns(new)
        with self.path.open("a", newline="") as file:
            csv.DictWriter(file, self._columns).writerows(self._rows)
        self._rows = []

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Saves what is left."""
        self.save()

    def _header(self) -> list[str]:
        """The columns of the file that is there; a row that a kill cut short is ended."""
        if not self.path.exists():
            return []
        text = self.path.read_text()
        if text and not text.endswith("\n"):
            self.path.write_text(text + "\n")
        return next(csv.reader(text.splitlines()), [])

    def _add_columns(self, new: list[str]) -> None:
        """Replaces the file in one move, so that a kill leaves either the old one or the new one."""
        rows = []
        if self._columns:
            with self.path.open(newline="") as file:
                rows = list(csv.DictReader(file))
        self._columns = sorted({*self._columns, *new} - {"step"})
        self._columns.insert(0, "step")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self._columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
        os.replace(temporary, self.path)
