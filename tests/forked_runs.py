"""Runs in processes of their own, as a shell starts them, without the ten seconds of imports.

A server (`python -m tests.forked_runs`) imports everything once. A line of JSON on its standard input lists the ranks
of a run, each an object of `overrides`, `environment` and the `output` file; they are forked, and their process ids are
printed as a line, then, when all have ended, their exit codes and seconds of CPU time, workers included. An empty line
ends it.
"""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from ldm_train.__main__ import main


class ForkedRuns:
    """The server, and the one run that it may have at a time."""

    def __init__(self) -> None:
        # Without W&B's variables: a service of this process would be shared, and would outlive a killed run.
        own = {key: value for key, value in os.environ.items() if "WANDB" not in key}
        self.server = subprocess.Popen(
            [sys.executable, "-m", "tests.forked_runs"],
            env=own | {"WANDB_MODE": "offline", "OMP_NUM_THREADS": "1"},
            cwd=Path(__file__).parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.pids: list[int] = []
        self.outputs: list[Path] = []

    def start(self, *overrides: str, root: Path, ranks: int = 1, **environment: str) -> None:
        """Begin a run below `root`; with several ranks as torchrun would start them on one host."""
        root.mkdir(parents=True, exist_ok=True)
        self.outputs = [root / f"output{rank}.txt" for rank in range(ranks)]
        places = [{}] if ranks == 1 else _places(ranks)
        self._ask(
            {"overrides": [*overrides, f"paths.root={root}"], "environment": place | environment, "output": str(output)}
            for place, output in zip(places, self.outputs, strict=True)
        )

    def _ask(self, ranks: Any) -> None:
        assert self.server.stdin
        assert self.server.stdout
        print(json.dumps(list(ranks)), file=self.server.stdin, flush=True)
        self.pids = json.loads(self.server.stdout.readline())

    @property
    def is_running(self) -> bool:
        """Whether a rank of the run goes on."""
        return not all(map(_has_ended, self.pids))

    def cpu_seconds(self) -> float:
        """CPU time of the run up to now, with that of workers that have ended."""
        fields = [found for pid in self.pids if (found := _stat(pid))]
        return sum(sum(map(int, found[11:15])) for found in fields) / os.sysconf("SC_CLK_TCK")

    def kill(self) -> None:
        """SIGKILL to all ranks and their workers, as when a node goes down."""
        for pid in self.pids:
            os.killpg(pid, signal.SIGKILL)

    def wait(self) -> tuple[list[int], float]:
        """Exit codes of the run's ranks, and its seconds of CPU time, when it has ended."""
        assert self.server.stdout
        codes, seconds = zip(*json.loads(self.server.stdout.readline()), strict=True)
        return list(codes), sum(seconds)

    def finish(self, *overrides: str, root: Path, ranks: int = 1, **environment: str) -> str:
        """What a run that has to succeed says."""
        self.start(*overrides, root=root, ranks=ranks, **environment)
        codes, _ = self.wait()
        assert not any(codes), self.said()[-3000:]
        return self.said()

    def said(self, rank: int = 0) -> str:
        """What the last run printed."""
        return self.outputs[rank].read_text()

    def close(self) -> None:
        """End the server, and a run that a failed test has left."""
        assert self.server.stdin
        if self.is_running:
            self.kill()
        # A word, and not the end of its input, which a process that was forked from this one may hold open.
        print(file=self.server.stdin, flush=True)
        self.server.wait(60)


def _places(ranks: int) -> list[dict[str, str]]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    shared = {"GROUP_RANK": 0, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "localhost"}
    shared |= {"MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    places = [shared | {"RANK": rank, "LOCAL_RANK": rank} for rank in range(ranks)]
    return [{key: str(value) for key, value in place.items()} for place in places]


def _stat(pid: int) -> list[str] | None:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None


def _has_ended(pid: int) -> bool:
    fields = _stat(pid)
    return fields is None or fields[0] == "Z"


def _start(overrides: list[str], environment: dict[str, str], output: str) -> int:
    """Fork one rank, the leader of a process group of its own."""
    if pid := os.fork():
        return pid
    code = 1
    try:
        os.setsid()
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for number, source in ((0, os.open(os.devnull, os.O_RDONLY)), (1, descriptor), (2, descriptor)):
            os.dup2(source, number)
        os.environ.update(environment)
        sys.argv = ["ldm_train", *overrides]
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    while line := sys.stdin.readline().strip():
        forked = [_start(**rank) for rank in json.loads(line)]
        print(json.dumps(forked), flush=True)
        ended = [os.wait4(pid, 0) for pid in forked]
        print(
            json.dumps([(os.waitstatus_to_exitcode(s), use.ru_utime + use.ru_stime) for _, s, use in ended]), flush=True
        )
