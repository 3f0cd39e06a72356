"""Make the table of a sweep again, or one of any runs, from what lies on the disk.

    python tools/collect_sweep.py runs/demo/sweep_learning_rate
    python tools/collect_sweep.py runs/demo/seed_1 runs/demo/seed_2 --metric val/loss --output tables

A sweep's table is made after each of its jobs. This is for one whose process was killed, or whose jobs lost their
places and went on without it, and for runs that were started one by one: of those it takes `result.json` and
`metrics.csv`. The status is 1 while a row is not that of a finished run.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ldm_train.sweeps import FINISHED, Table, draw_table, shown, table_of_runs, table_of_sweep, write_table


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="+", help="one directory of a sweep, or directories of runs")
    parser.add_argument("--metric", help="of runs: the figure to compare, such as val/loss")
    parser.add_argument("--output", type=Path, help="where results.csv and results.png go; of a sweep: its directory")
    return parser.parse_args(arguments)


def collect(options: argparse.Namespace) -> tuple[Table, Path]:
    """The table, and the directory that it goes to."""
    first, *others = options.folders
    if (first / "plan.json").exists():
        if others:
            raise SystemExit(f"{first} is a sweep's; allowed are one of them alone, or runs; change the folders")
        return table_of_sweep(first), options.output or first
    missing = [str(path) for path in options.folders if not path.is_dir()]
    if missing:
        raise SystemExit(f"found no directory {', '.join(missing)}; allowed are those of runs; change the folders")
    if options.output is None:
        raise SystemExit("runs have no directory together; allowed is one for their table; give it by --output")
    return table_of_runs(options.folders, options.metric), options.output


def main() -> int:
    """Write, draw and show it."""
    table, output = collect(parse())
    path, picture = write_table(table, output), draw_table(table, output)
    print(f"{shown(table)}\n\n{path}" + (f", {picture.name}" if picture else ""))
    return int(any(row.state != FINISHED for row in table.rows))


if __name__ == "__main__":
    sys.exit(main())
