"""What this package's callbacks add to a training step, on steps that do nothing else: see `benchmark.py`.

A step is `step_ms` of spinning and a parameter. In one run the trainer's callbacks change every 50 steps, with several
processes every 500, which are timed as a whole, so that what ranks do once in many steps has its share, and what slows
the machine down slows all.

There are two clocks. The processor's counts what all threads of one process compute, and not the turns of other
programs: enough for one process, which waits for nobody. Several wait for each other, which the clock on the wall
counts, and with it everything else that goes on.
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
from pathlib import Path
from statistics import median, quantiles

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from torch.utils.data import DataLoader, IterableDataset

from ldm_train.callbacks import (
    CheckpointWriter,
    NonFiniteGuard,
    Preemption,
    RankWatch,
    ThroughputMonitor,
    hide_idle_hooks,
    progress_bar,
)

LOGGED = 50  # steps between two logged ones, and in a turn
LONG_TURN = 10 * LOGGED  # of several processes, which talk to each other once in many steps
HOUR = 60.0  # minutes: no save falls due
NEVER = 10**9  # steps
FIGURES, CLUSTER, LIGHTNING = "throughput, guard, progress", "preemption, ranks, checkpoints", "ModelCheckpoint"
# Row -> what it is compared with.
BASES = {f"Lightning's {LIGHTNING}": "none", FIGURES: "none", f"and {CLUSTER}": FIGURES}
CLOCKS: dict[str, Callable[[], float]] = {"processor": time.process_time, "wall": time.perf_counter}
Found = dict[str, dict[str, list[float]]]  # clock -> name -> seconds of a step in each turn


@dataclass(frozen=True)
class StepRow:
    """One line of the table: some callbacks, with some processes.

    Attributes:
        name: which callbacks.
        base: which ones they are compared with.
        processes: how many.
        clock: `processor` or `wall`.
        step: seconds of a step, the median over blocks.
        added: seconds more than with those of `base`, the median over rounds.
        error: standard error of `added`, by the spread over rounds; 0 for a single round.
        share: `added` as a share of the step with those of `base`.
    """

    name: str
    base: str
    processes: int
    clock: str
    step: float
    added: float
    error: float
    share: float


class Turns(L.LightningModule):
    """Steps that take their time and change one parameter, while the trainer's callbacks change from block to block.

    Args:
        variants: name -> callbacks.
        rounds: how often each has its turn; another one begins each time.
        block: steps in a turn.
        seconds: of a step.

    Attributes:
        found: clock -> name -> seconds of a step in each of its blocks.
    """

    def __init__(self, variants: dict[str, list[L.Callback]], rounds: int, block: int, seconds: float) -> None:
        super().__init__()
        self.variants, self.block, self.seconds = variants, block, seconds
        names = list(variants)
        turns = [names[number % len(names) :] + names[: number % len(names)] for number in range(rounds)]
        self.order = [*names, *(name for turn in turns for name in turn)]  # each once to warm up
        self.found: Found = {clock: {name: [] for name in names} for clock in CLOCKS}
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self._began = dict.fromkeys(CLOCKS, 0.0)

    @property
    def num_steps(self) -> int:
        """Those of all blocks, and a few in which the last ones are saved."""
        return self.block * len(self.order) + 3

    def training_step(self, batch: dict[str, object], batch_idx: int) -> torch.Tensor:
        """Spin."""
        if batch_idx % self.block == 0:
            self._next_block(batch_idx // self.block)
        began = time.thread_time()
        while time.thread_time() - began < self.seconds:
            pass
        return self.weight.sum()

    def on_train_start(self) -> None:
        """Some callbacks have left by now."""
        there = self.trainer.callbacks  # type: ignore[attr-defined]
        self.variants = {name: [c for c in callbacks if c in there] for name, callbacks in self.variants.items()}

    def _next_block(self, number: int) -> None:
        now = {name: clock() for name, clock in CLOCKS.items()}
        if number > len(self.variants):
            for clock, found in self.found.items():
                found[self.order[number - 1]].append((now[clock] - self._began[clock]) / self.block)
        if number == 0:
            self.timed = self.trainer.profiler  # type: ignore[attr-defined]
        if number < len(self.order):
            callbacks = self.variants[self.order[number]]
            self.trainer.callbacks = callbacks  # type: ignore[attr-defined]
            for callback in callbacks:  # as if they had been there all along: a long silence has ranks talk more
                if (agreement := getattr(callback, "_agreement", None)) is not None:
                    agreement._talked_at = time.monotonic()
            is_timed = any(isinstance(callback, ThroughputMonitor) for callback in callbacks)
            self.trainer.profiler = self.timed if is_timed else self.timed.inner  # type: ignore[attr-defined]
        self._began = {name: clock() for name, clock in CLOCKS.items()}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Plain descent."""
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Batches(IterableDataset):  # type: ignore[type-arg]
    """The same small batch again and again."""

    def __iter__(self) -> Iterator[dict[str, object]]:
        batch = {"image": torch.zeros(1, 3, 2, 2), "sample_id": torch.zeros(1), "key": ["a"]}
        while True:
            yield batch


def variants(folder: str) -> dict[str, list[L.Callback]]:
    """Name -> callbacks; those of one kind are one."""
    figures = [ThroughputMonitor(), NonFiniteGuard(), progress_bar()]
    cluster = [RankWatch({}), Preemption(), CheckpointWriter(folder, every_n_steps=None, every_minutes=HOUR)]
    hide_idle_hooks([*figures, *cluster])
    own = ModelCheckpoint(folder, every_n_train_steps=NEVER)
    return dict(zip(("none", *BASES), ([], [own], figures, [*figures, *cluster]), strict=True))


def rounds(arguments: argparse.Namespace, processes: int) -> Found:
    """Seconds of a step in each turn."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(StringIO()):
        each = variants(folder)
        module = Turns(each, arguments.rounds, LOGGED if processes == 1 else LONG_TURN, arguments.step_ms / 1000)
        trainer = L.Trainer(
            callbacks=[*each[f"Lightning's {LIGHTNING}"], *each[f"and {CLUSTER}"]], max_steps=module.num_steps,
            max_epochs=-1, accelerator="cpu", devices=processes, strategy="ddp" if processes > 1 else "auto",
            logger=False, log_every_n_steps=LOGGED, enable_model_summary=False, default_root_dir=folder,
        )  # fmt: skip
        trainer.fit(module, DataLoader(Batches(), batch_size=None))
    return module.found


def rows_of(found: Found, processes: int) -> list[StepRow]:
    """The rows, of the rounds' times; of one process by its own clock alone."""
    rows = []
    for clock, seconds in found.items():
        for name, base in BASES.items() if processes > 1 or clock == "processor" else ():
            more = [one - other for one, other in zip(seconds[name], seconds[base], strict=True)]
            added, step = median(more), median(seconds[name])
            share = added / median(seconds[base])
            rows.append(StepRow(name, base, processes, clock, step, added, _error(more), share))
    return rows


def _error(values: list[float]) -> float:
    """The standard error of the median, of normal values; by the quartiles, which outliers do not move."""
    if len(values) < 2:
        return 0.0
    low, _, high = quantiles(values, n=4)
    return 1.253 * (high - low) / 1.349 / len(values) ** 0.5


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
    return rows, {"step_ms": arguments.step_ms, "rounds": arguments.rounds}
