"""The table of a sweep: one row for each job, whatever became of it.

A sweep has a directory of its own, `runs/<name>/sweep_<what is swept>`, beside those of its jobs:

    plan.json       the overrides of every job, as far as they are known beforehand
    jobs/*.json     what became of each, written by its callback or by whoever saw it die
    results.csv     the table, made anew from these and from `result.json` and `metrics.csv` of the runs
    results.png     the metric against what was swept

A job that was never heard of has a row too, and a later sweep of the same name adds its rows to the table.
"""

import csv
import hashlib
import math
import os
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from ldm_train.charts import Panel, panels
from ldm_train.locking import is_locked
from ldm_train.results import FILE, Result, read_json, read_result, shortened, write_json

FINISHED = "finished"
_SHOWN_FIGURES, _SHOWN_REASON = 5, 100


@dataclass(frozen=True)
class Row:
    """One job.

    Attributes:
        overrides: key -> value, as on the command line.
        state: finished, failed, died, no figure, stopped, running, not finished or not started.
        reason: why it is not finished.
        steps: optimizer steps.
        figures: the last value of each key.
        least: the metric's least value in the run.
        largest: and its largest.
        run_dir: the run's directory, if the job ever had one.
        seconds: of training, all starts together.
        start: of the sweep that the job was of, ISO 8601.
        number: the job's in its sweep.
    """

    overrides: Mapping[str, str]
    state: str
    reason: str = ""
    steps: int | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
    least: float | None = None
    largest: float | None = None
    run_dir: Path | None = None
    seconds: float | None = None
    start: str = ""
    number: int = 0


@dataclass(frozen=True)
class Table:
    """The rows of a sweep, and which of their figures it compares.

    Attributes:
        rows: in the order of the jobs.
        metric: the key of the figure that is compared; None if nothing says.
    """

    rows: Sequence[Row]
    metric: str | None

    @property
    def swept(self) -> list[str]:
        """The keys whose values differ between the jobs."""
        keys = dict.fromkeys(key for row in self.rows for key in row.overrides)
        return [key for key in keys if len({row.overrides.get(key) for row in self.rows}) > 1]


def save_job(directory: Path, overrides: Sequence[str], content: Mapping[str, Any]) -> None:
    """Write what is known of a job; a later call for the same overrides takes its place."""
    (directory / "jobs").mkdir(parents=True, exist_ok=True)
    write_json(_job_file(directory, overrides), {"overrides": list(overrides), **content})


def read_job(directory: Path, overrides: Sequence[str]) -> dict[str, Any] | None:
    """What is known of a job; None if nothing is."""
    return read_json(_job_file(directory, overrides))


def jobs_of_start(directory: Path, start: str) -> list[dict[str, Any]]:
    """What is known of the jobs of one start of a sweep."""
    found = [job for path in sorted((directory / "jobs").glob("*.json")) if (job := read_json(path))]
    return sorted((job for job in found if job["start"] == start), key=_order)


def save_plan(directory: Path, jobs: Sequence[Sequence[str]], start: str) -> None:
    """Write the overrides of the jobs to come beside those of earlier starts, which may still be to come."""
    directory.mkdir(parents=True, exist_ok=True)
    new = [list(overrides) for overrides in jobs]
    kept = [each for each in _planned(directory) if each["overrides"] not in new]
    write_json(directory / "plan.json", {"jobs": [*kept, *({"overrides": each, "start": start} for each in new)]})


def table_of_sweep(directory: Path) -> Table:
    """The table of a sweep's directory."""
    found = [job for path in sorted((directory / "jobs").glob("*.json")) if (job := read_json(path))]
    latest = {job["run_dir"]: job["start"] for job in sorted(found, key=_order)}
    jobs = sorted((job for job in found if job["start"] == latest[job["run_dir"]]), key=_order)
    known = {tuple(job["overrides"]) for job in found}
    rows = [_row_of_job(job) for job in jobs]
    to_come = [each for each in _planned(directory) if tuple(each["overrides"]) not in known]
    rows += [Row(_pairs(each["overrides"]), "not started", start=each["start"]) for each in to_come]
    return Table(rows, jobs[-1]["metric"] if jobs else None)


def table_of_runs(run_dirs: Iterable[Path], metric: str | None = None) -> Table:
    """The table of runs, whatever started them, from their directories alone.

    Args:
        run_dirs: the directories, in the order of the rows.
        metric: the key of the figure that is compared.
    """
    return Table([_row_of_run(path, metric) for path in run_dirs], metric)


def write_table(table: Table, directory: Path) -> Path:
    """Write `results.csv`; returns its path."""
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "results.csv"
    columns = _columns(table)
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}.tmp")  # jobs do this at any time
    with temporary.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([list(columns), *zip(*columns.values(), strict=True)])
    os.replace(temporary, path)
    return path


def draw_table(table: Table, directory: Path) -> Path | None:
    """Draw the metric of what finished against what was swept into `results.png`; None if there is nothing to draw."""
    metric = table.metric
    if metric is None or not table.swept:
        return None
    finished = [row for row in table.rows if row.state == FINISHED]
    rows = [row for row in finished if math.isfinite(row.figures.get(metric, math.nan))]
    values = [row.figures[metric] for row in rows]
    drawn = [Panel(key, [row.overrides.get(key, "") for row in rows], values) for key in table.swept]
    if not rows:
        return None
    path = directory / "results.png"
    panels(drawn, metric).save(path)
    return path


def shown(table: Table) -> str:
    """The table as lines for people: the first few figures, the names of directories, the beginnings of reasons."""
    columns = _columns(table)
    del columns["overrides"]
    others = {key for row in table.rows for key in row.figures} - {table.metric}
    kept = sorted(key for key in others if key.count("/") == 1)[:_SHOWN_FIGURES]
    for key in others.difference(kept):
        del columns[key]
    columns["run"] = [Path(text).name for text in columns["run"]]
    columns["reason"] = [shortened(text, _SHOWN_REASON) for text in columns["reason"]]
    filled = {key: [key, *cells] for key, cells in columns.items() if any(cells)}
    widths = [max(map(len, cells)) for cells in filled.values()]
    lines = zip(*filled.values(), strict=True)
    padded = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


def unfinished(table: Table, start: str) -> list[Row]:
    """The jobs of one start of a sweep that did not end with a figure."""
    return [row for row in table.rows if row.state != FINISHED and row.start == start]


def _job_file(directory: Path, overrides: Sequence[str]) -> Path:
    return directory / "jobs" / f"{hashlib.sha1(chr(10).join(overrides).encode()).hexdigest()[:12]}.json"


def _planned(directory: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = (read_json(directory / "plan.json") or {"jobs": []})["jobs"]
    return found


def _order(job: Mapping[str, Any]) -> tuple[str, int]:
    return job["start"], job["number"]


def _pairs(overrides: Sequence[str]) -> dict[str, str]:
    return dict((override.lstrip("+").partition("=")[::2]) for override in overrides)


def _row_of_job(job: Mapping[str, Any]) -> Row:
    run_dir = Path(job["run_dir"])
    state, reason = job["state"], job.get("reason", "")
    # What failed before its run began has the files of an earlier start, or none.
    is_its_own = state == FINISHED or _is_recorded_since(run_dir, job["start"])
    result, logged = (read_result(run_dir), _logged(run_dir)) if is_its_own else (None, dict[str, list[float]]())
    least, largest = _extremes(logged.get(job["metric"], []))
    if state == "running":
        state, reason = _unsettled(run_dir, result)
    return Row(
        overrides=_pairs(job["overrides"]),
        state=state,
        reason=reason,
        steps=_steps(result, logged),
        figures=_figures(result, logged, job["metric"]),
        least=least,
        largest=largest,
        run_dir=run_dir,
        seconds=result.seconds if result else None,
        start=job["start"],
        number=job["number"],
    )


def _row_of_run(run_dir: Path, metric: str | None) -> Row:
    result, logged = read_result(run_dir), _logged(run_dir)
    least, largest = _extremes(logged.get(metric or "", []))
    overrides = run_dir / ".hydra" / "overrides.yaml"
    state, reason = (result.state, result.reason) if result else ("not started", "")
    if state == "running":
        state, reason = _unsettled(run_dir, result)
    return Row(
        overrides={"run": run_dir.name, **(_pairs(OmegaConf.load(overrides)) if overrides.exists() else {})},  # type: ignore[arg-type]
        state=state,
        reason=reason,
        steps=_steps(result, logged),
        figures=_figures(result, logged, metric),
        least=least,
        largest=largest,
        run_dir=run_dir,
        seconds=result.seconds if result else None,
    )


def _is_recorded_since(run_dir: Path, start: str) -> bool:
    record = run_dir / FILE
    return record.exists() and record.stat().st_mtime >= datetime.fromisoformat(start).timestamp()


def _unsettled(run_dir: Path, result: Result | None) -> tuple[str, str]:
    """The state and reason of a run that said it began, and not that it ended."""
    if is_locked(run_dir / ".lock"):
        return "running", ""
    if result is not None and result.state == "stopped":
        return "stopped", result.reason
    return "not finished", "ended without a word (killed, or its machine is gone); the same command goes on"


def _logged(run_dir: Path) -> dict[str, list[float]]:
    """Key -> its values, in order, of `metrics.csv`."""
    path, found = run_dir / "metrics.csv", dict[str, list[float]]()
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            for line in csv.DictReader(file):
                for key, text in line.items():
                    if text and isinstance(text, str):
                        found.setdefault(key, []).append(float(text))
    return found


def _steps(result: Result | None, logged: Mapping[str, list[float]]) -> int | None:
    if result is not None and result.steps:
        return result.steps
    return int(max(logged["step"])) if "step" in logged else None


def _figures(result: Result | None, logged: Mapping[str, list[float]], metric: str | None) -> dict[str, float]:
    figures = {key: values[-1] for key, values in logged.items()} | (dict(result.figures) if result else {})
    return {key: value for key, value in figures.items() if key.startswith("val/") or key in ("train/loss", metric)}


def _extremes(values: Sequence[float]) -> tuple[float | None, float | None]:
    finite = [value for value in values if math.isfinite(value)]
    return min(finite, default=None), max(finite, default=None)


def _columns(table: Table) -> dict[str, list[str]]:
    """Header -> the cells of all rows."""
    keys = sorted({key for row in table.rows for key in row.figures}, key=lambda key: (key != table.metric, key))
    metric, rows = table.metric or "figure", table.rows
    return {
        **{key: [row.overrides.get(key, "") for row in rows] for key in table.swept},
        "state": [row.state for row in rows],
        **{key: [_number(row.figures.get(key)) for row in rows] for key in keys},
        f"min {metric}": [_number(row.least) for row in rows],
        f"max {metric}": [_number(row.largest) for row in rows],
        "steps": [_number(row.steps) for row in rows],
        "seconds": [_number(row.seconds) for row in rows],
        "run": [str(row.run_dir or "") for row in rows],
        "reason": [row.reason for row in rows],
        "overrides": [" ".join(f"{key}={value}" for key, value in row.overrides.items()) for row in rows],
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
