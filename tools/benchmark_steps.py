"""What this package's callbacks add to a training step, on steps that do nothing else: see `benchmark.py`.

A step is `step_ms` of spinning and a parameter; its time is taken over blocks of steps, so that what happens once in
many steps has its share. With one process the clock is its own, and other programs do not count; with several it is the
wall's, for they wait for each other.
"""

import argparse
import json
import logging
import os
import socket
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import pairwise
from pathlib import Path
from statistics import median

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset

from ldm_train.callbacks import CheckpointWriter, NonFiniteGuard, Preemption, ThroughputMonitor, progress_bar

BLOCK = 50  # steps: as many as between two logged ones
WARMUP = 2  # blocks
HOUR = 60.0  # minutes: no save falls due
_COUNTS = {"preemption": 1, "preemption, checkpoints": 2, "all": 5}  # row -> its callbacks


@dataclass(frozen=True)
class StepRow:
    """One line of the table: some callbacks, with some processes.

    Attributes:
        name: which callbacks.
        processes: how many.
        step: seconds of a step, the median over blocks.
        added: seconds more than without callbacks, the median over rounds.
        share: of the step without callbacks.
        own: seconds more than with as many callbacks that do nothing, which Lightning calls all the same.
        own_share: of the step without callbacks.
    """

    name: str
    processes: int
    step: float
    added: float
    share: float
    own: float
    own_share: float


class Spinning(L.LightningModule):
    """A step that takes its time and changes one parameter."""

    def __init__(self, seconds: float, clock: Callable[[], float]) -> None:
        super().__init__()
        self.seconds, self.clock = seconds, clock
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.marks: list[float] = []

    def training_step(self, batch: dict[str, object], batch_idx: int) -> torch.Tensor:
        """Spin."""
        began = self.clock()
        if batch_idx % BLOCK == 0:
            self.marks.append(began)
        while self.clock() - began < self.seconds:
            pass
        return self.weight.sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The same small batch again and again."""

    def __iter__(self) -> Iterator[dict[str, object]]:
        batch = {"image": torch.zeros(1, 3, 2, 2), "sample_id": torch.zeros(1), "key": ["a"]}
        while True:
            yield batch


def contenders(folder: str) -> dict[str, Callable[[], list[L.Callback]]]:
    """Name of a row -> its callbacks."""

    def writer() -> CheckpointWriter:
        return CheckpointWriter(folder, every_n_steps=None, every_minutes=HOUR)

    return {
        "none": list,
        "preemption": lambda: [Preemption()],
        "preemption, checkpoints": lambda: [Preemption(), writer()],
        "all": lambda: [ThroughputMonitor(), NonFiniteGuard(), Preemption(), progress_bar(), writer()],
        **{_idle(count): lambda count=count: [L.Callback() for _ in range(count)] for count in _COUNTS.values()},
    }


def _idle(count: int) -> str:
    return f"{count} that do nothing"


def block_times(
    callbacks: list[L.Callback], arguments: argparse.Namespace, processes: int, clock: Callable[[], float]
) -> list[float]:
    """Seconds of a step in each block of a run."""
    module = Spinning(arguments.step_ms / 1000, clock)
    # The last steps are saved: the blocks end before them.
    steps = BLOCK * (WARMUP + arguments.blocks + 1) + 3
    trainer = L.Trainer(
        callbacks=callbacks, max_steps=steps, max_epochs=-1, accelerator="cpu", devices=processes,
        strategy="ddp" if processes > 1 else "auto", logger=False, log_every_n_steps=BLOCK,
        enable_checkpointing=any(isinstance(callback, Checkpoint) for callback in callbacks),
        enable_progress_bar=len(callbacks) > 2, enable_model_summary=False, default_root_dir=arguments.folder,
    )  # fmt: skip
    with redirect_stdout(StringIO()):
        trainer.fit(module, DataLoader(Batches(), batch_size=None))
    marks = module.marks[WARMUP : WARMUP + arguments.blocks + 1]
    return [(after - before) / BLOCK for before, after in pairwise(marks)]


def rounds(arguments: argparse.Namespace, processes: int) -> dict[str, list[float]]:
    """Name -> the step's median time in each round; they take turns, another one first each time."""
    clock = time.process_time if processes == 1 else time.perf_counter
    found: dict[str, list[float]] = {}
    names = list(contenders(""))
    with tempfile.TemporaryDirectory() as folder:
        arguments.folder = folder
        block_times([], arguments, processes, clock)
        for number in range(arguments.rounds):
            turn = number % len(names)
            for name in [*names[turn:], *names[:turn]]:
                times = block_times(contenders(folder)[name](), arguments, processes, clock)
                found.setdefault(name, []).append(median(times))
    return found


def rows_of(found: dict[str, list[float]], processes: int) -> list[StepRow]:
    """The rows, of the rounds' times."""
    plain, rows = median(found["none"]), []

    def more(name: str, than: str) -> float:
        return median(one - other for one, other in zip(found[name], found[than], strict=True))

    for name, count in _COUNTS.items():
        added, own = more(name, "none"), more(name, _idle(count))
        rows.append(StepRow(name, processes, median(found[name]), added, added / plain, own, own / plain))
    return rows


def _rank(rank: int, processes: int, port: int, arguments: argparse.Namespace, output: str) -> None:
    """One of several processes; the first writes what it found."""
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "GROUP_RANK": 0}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "benchmark"}
    os.environ.update({name: str(value) for name, value in own.items()})
    torch.set_num_threads(1)
    _hush()
    found = rounds(arguments, processes)
    if rank == 0:
        Path(output).write_text(json.dumps(found))


def _hush() -> None:
    warnings.filterwarnings("ignore")
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)


def benchmark_steps(arguments: argparse.Namespace, console: Console) -> tuple[list[StepRow], dict[str, object]]:
    """The rows, and what was measured on."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    _hush()
    rows = rows_of(rounds(arguments, 1), 1)
    torch.set_num_threads(threads)
    if arguments.processes > 1:
        console.print(f"one process is done, now {arguments.processes}")
        with tempfile.TemporaryDirectory() as folder, socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port, output = free.getsockname()[1], f"{folder}/found.json"
            free.close()
            given = (arguments.processes, port, arguments, output)
            torch.multiprocessing.spawn(_rank, given, nprocs=arguments.processes)
            rows += rows_of(json.loads(Path(output).read_text()), arguments.processes)
    return rows, {"step_ms": arguments.step_ms, "rounds": arguments.rounds, "blocks": arguments.blocks}
