"""Where a run writes: whether it may, whether somebody else does, and whether there is room for what it keeps."""

import os
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from ldm_train.callbacks import CheckpointWriter
from ldm_train.dry_run.report import Check
from ldm_train.locking import holder_of

_WRITTEN = (
    "paths.run_dir",
    "data.index_dir",
    "data.cache_dir",
    "data.quarantine_dir",
    "callbacks.checkpoint.directory",
)
_WRITER = f"{CheckpointWriter.__module__.rpartition('.')[0]}.CheckpointWriter"
_FEW_FILES = 1000


def existing(path: Path) -> Path:
    """The folder itself, or the innermost one above it that is there."""
    path = path.absolute()
    return next(folder for folder in (path, *path.parents) if folder.exists())


def check_writable(cfg: DictConfig) -> Check:
    """Whether this user may write where the run will: what is not there yet can be made."""
    found = {key: Path(str(value)) for key in _WRITTEN if (value := OmegaConf.select(cfg, key))}
    refused = []
    for key, path in found.items():
        folder = existing(path)
        if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
            reason = "cannot be written" if folder.is_dir() else "is a file"
            refused.append((f"{path}: {folder} {reason}", f"`{key}`"))
    if refused:
        keys = ", ".join(key for _, key in refused)
        remedy = f"folders of yours with room in them; change {keys}, `paths.root` or LDM_RUNS"
        return Check("folders", "failed", "; ".join(what for what, _ in refused), remedy)
    return Check("folders", "ok", f"{len(found)} can be written, {found['paths.run_dir']} among them")


def check_free(cfg: DictConfig) -> Check:
    """Whether another process writes the run's directory now."""
    run_dir = Path(cfg.paths.run_dir)
    process = holder_of(run_dir / ".lock")
    if process is not None:
        remedy = "one run at a time in a directory; wait for it, end it, or change `run_id`"
        return Check("run directory", "failed", f"{run_dir} is being written by process {process}", remedy)
    state = "is there, nobody writes it" if run_dir.exists() else "is new"
    return Check("run directory", "ok", f"{run_dir} {state}")


def check_room(cfg: DictConfig, checkpoint_bytes: int) -> Check:
    """Whether the checkpoints fit that retention keeps, and the one that is being written beside them."""
    writers = [node for node in (cfg.callbacks or {}).values() if node and node.get("_target_") == _WRITER]
    if not writers:
        return Check("room", "not checked", "no callback writes checkpoints")
    (writer, *_) = writers
    directory = Path(str(writer.directory))
    count = num_kept(cfg, writer)
    status = os.statvfs(existing(directory))
    free, files = status.f_bavail * status.f_frsize, status.f_favail
    there = _occupied(directory)
    needed = (count + 1) * checkpoint_bytes - there
    kept = "they hold the place of those that are there" if there else "kept at the end"
    figure = (
        f"{count} checkpoints of {_gib(checkpoint_bytes)} are {kept}, one more while a save is made: "
        f"{_gib(max(needed, 0))} more are needed, {_gib(free)} are free in {existing(directory)}"
    )
    if needed > free:
        remedy = (
            "room for all of them; make room, or change `paths.root`, `callbacks.checkpoint.keep_every_n_steps`, "
            "`callbacks.checkpoint.keep_every_images`"
        )
        return Check("room", "failed", figure, remedy)
    if 0 < files < _FEW_FILES:
        return Check("room", "warning", f"{figure}; but {files} files alone", "remove files, or change `paths.root`")
    return Check("room", "ok", figure)


def num_kept(cfg: DictConfig, writer: DictConfig) -> int:
    """How many files of a size of their own there are in the end: last, previous, best, and those kept for good."""
    count = 2 + (writer.get("best_metric") is not None)
    steps = int(cfg.trainer.max_steps)
    if steps < 0:
        return count
    if (every := writer.get("keep_every_n_steps")) is not None:
        count += steps // int(every)
    if (images := writer.get("keep_every_images")) is not None:
        batch = int(cfg.data.batch_size) * num_processes(cfg) * int(cfg.trainer.get("accumulate_grad_batches", 1))
        # A step may be kept for both reasons; that many is the most.
        count += steps * batch // int(images)
    return count


def num_processes(cfg: DictConfig) -> int:
    """Processes of the run; those that `auto` will find on another machine count as one."""
    devices = cfg.trainer.get("devices", 1)
    devices = len(devices) if OmegaConf.is_list(devices) else devices
    per_node = int(devices) if str(devices).isdigit() else 1
    return per_node * int(cfg.trainer.get("num_nodes", 1))


def check_slurm(cfg: DictConfig) -> Check:
    """Inside of a job: whether it has a task for each process."""
    job, tasks = os.environ.get("SLURM_JOB_ID"), os.environ.get("SLURM_NTASKS")
    if job is None:
        return Check("SLURM", "not checked", "this is no job; what `sbatch` is asked for is not looked at")
    processes = num_processes(cfg)
    figure = f"job {job} has {tasks or 'no number of'} tasks, the run {processes} processes"
    if tasks is not None and int(tasks) != processes and "plugins" in cfg.trainer:
        remedy = "one task a process; change `--ntasks-per-node`, or `trainer.devices` and `trainer.num_nodes`"
        return Check("SLURM", "failed", figure, remedy)
    return Check("SLURM", "ok", figure)


def _occupied(directory: Path) -> int:
    """Bytes of the checkpoints that are there; names of one file count once."""
    stats = {}
    if directory.is_dir():
        for path in directory.glob("*.ckpt"):
            status = path.stat()
            stats[status.st_dev, status.st_ino] = status.st_size
    return sum(stats.values())


def _gib(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**28 else f"{size / 2**20:.1f} MiB"
