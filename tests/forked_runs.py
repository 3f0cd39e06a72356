"""Runs in processes of their own without the ten seconds of imports: `python -m tests.forked_runs`.

Everything is imported once. A line of JSON on the standard input lists the ranks of a run, each an object of
`overrides`, `environment` and the `output` file; they are forked, and their process ids are printed as a line, then,
when all have ended, their exit codes and seconds of CPU time, workers included.
"""

import json
import os
import sys

from ldm_train.__main__ import main


def start(overrides: list[str], environment: dict[str, str], output: str) -> int:
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
    for line in sys.stdin:
        ranks = [start(**rank) for rank in json.loads(line)]
        print(json.dumps(ranks), flush=True)
        ended = [os.wait4(pid, 0) for pid in ranks]
        print(
            json.dumps([(os.waitstatus_to_exitcode(s), use.ru_utime + use.ru_stime) for _, s, use in ended]), flush=True
        )
