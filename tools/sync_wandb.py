"""Send the W&B runs that were recorded without a network, from a machine that has one.

    python tools/sync_wandb.py runs/ --dry-run         # what would be sent
    python tools/sync_wandb.py runs/

Every start of a run that had no network left a folder `wandb/offline-run-<time>-<id>`; a run that was requeued has
several, with one id. They are sent one after the other in the order of their starts and become one run, whose rows are
counted on from file to file. What was sent is remembered beside it (`run-<id>.wandb.synced`), as `wandb sync` does, but
only if nothing was lost on the way: what failed is sent again the next time, without the rows that have arrived.
After a failure the later starts of that run wait. A run that is being written is left for another time.

The key comes from WANDB_API_KEY or ~/.netrc, the server from WANDB_BASE_URL (without it, api.wandb.ai).
"""

import argparse
import base64
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from urllib.error import URLError
from urllib.parse import urlparse
from urllib.request import Request, urlopen

from rich.console import Console
from rich.progress import Progress
from wandb_records import num_steps, read_records, shifted, write_records

from ldm_train.locking import holder_of

_LOST = re.compile(r"^wandb: (?:ERROR|WARNING) .*|.*Fatal error.*|.*Not authenticated.*", re.MULTILINE)
_ADDRESS = re.compile(r"View run .* at (\S+)")
_PATIENCE = 3600.0  # seconds for one file
_TIMEOUT = 30.0  # seconds for an answer
# The question that wandb itself asks before it goes on with a run.
_QUERY = """query RunResumeStatus($project: String, $entity: String, $name: String!) {
  model(name: $project, entityName: $entity) { bucket(name: $name, missingOk: true) { historyLineCount historyTail } }
}"""


class SendingError(RuntimeError):
    """Something did not arrive; it will be sent the next time."""


@dataclass(frozen=True)
class Segment:
    """What one start of a run has recorded."""

    file: Path

    @property
    def folder(self) -> Path:
        """Where its pictures lie beside it."""
        return self.file.parent

    @property
    def marker(self) -> Path:
        """There once it was sent."""
        return self.file.with_suffix(".wandb.synced")

    @property
    def is_sent(self) -> bool:
        """Whether it was."""
        return self.marker.exists()


@dataclass(frozen=True)
class Recorded:
    """A run: its id, and what its starts have recorded, in their order."""

    identity: str
    segments: tuple[Segment, ...]

    @property
    def directory(self) -> Path:
        """The run's directory, as the trainings make it: `wandb/` lies in it."""
        return self.segments[-1].folder.parent.parent

    @property
    def is_being_written(self) -> bool:
        """Whether a process holds the run's directory."""
        return holder_of(self.directory / ".lock") is not None


@dataclass(frozen=True)
class Destination:
    """Where runs go."""

    url: str
    key: str
    entity: str | None
    project: str | None


@dataclass
class Outcome:
    """What became of a run."""

    sent_before: int = 0
    sent: int = 0
    waiting: int = 0
    said: str = ""
    has_failed: bool = False


def find_runs(folders: Sequence[Path]) -> list[Recorded]:
    """The runs that were recorded offline below some folders."""
    found: dict[str, dict[Path, Segment]] = defaultdict(dict)
    for folder in folders:
        for file in folder.rglob("offline-run-*/run-*.wandb"):
            found[file.stem.removeprefix("run-")][file.resolve()] = Segment(file)
    runs = []
    for identity, segments in sorted(found.items()):
        in_order = sorted(segments.values(), key=lambda segment: segment.folder.name)
        runs.append(Recorded(identity, tuple(in_order)))
    return runs


def send(run: Recorded, to: Destination) -> Outcome:
    """Send what is left of a run, in order, up to the first failure."""
    outcome = Outcome(sent_before=sum(segment.is_sent for segment in run.segments))
    offset = 0
    for number, segment in enumerate(run.segments):
        try:
            records = list(read_records(segment.file))
            if not segment.is_sent:
                outcome.said = _send_segment(run, segment, offset, to)
                segment.marker.touch()
                outcome.sent += 1
            offset += num_steps(records)
        except (SendingError, ValueError, OSError) as error:
            outcome.waiting = sum(not later.is_sent for later in run.segments[number:])
            outcome.said, outcome.has_failed = str(error), True
            break
    return outcome


def _send_segment(run: Recorded, segment: Segment, offset: int, to: Destination) -> str:
    """Send a copy with the run's own steps; the address of the run."""
    records = list(read_records(segment.file))
    project = to.project or next((record.run.project for record in records if record.HasField("run")), "")
    arrived = last_step(run.identity, project, to)
    with tempfile.TemporaryDirectory(prefix="sync-wandb-") as temporary:
        folder = Path(temporary, segment.folder.name)
        folder.mkdir()
        if (segment.folder / "files").is_dir():
            (folder / "files").symlink_to((segment.folder / "files").resolve())
        write_records(folder / segment.file.name, shifted(records, offset, after=arrived))
        command = [sys.executable, "-m", "wandb", "sync", *_options(to), str(folder)]
        try:
            ended = subprocess.run(
                command,
                env=os.environ | {"WANDB_API_KEY": to.key, "WANDB_BASE_URL": to.url},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=_PATIENCE,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise SendingError(f"{segment.folder.name}: nothing came of it in {_PATIENCE:.0f} s") from error
        said = ended.stdout + ended.stderr
        # wandb marks a file as sent, and ends with 0, also where it says that data were lost.
        lost = _LOST.search(said)
        if lost or ended.returncode or not (folder / f"{segment.file.name}.synced").exists():
            raise SendingError(f"{segment.folder.name}: {lost[0] if lost else said.strip()[-500:]}")
    address = _ADDRESS.search(said)
    return address[1] if address else ""


def _options(to: Destination) -> list[str]:
    entity = ["--entity", to.entity] if to.entity else []
    return entity + (["--project", to.project] if to.project else [])


def last_step(identity: str, project: str, to: Destination) -> int:
    """The step of the last row that the server has of a run; -1 where it has none.

    Raises:
        SendingError: if it does not answer.
    """
    asked = {"query": _QUERY, "variables": {"project": project, "entity": to.entity, "name": identity}}
    login = base64.b64encode(f"api:{to.key}".encode()).decode()
    request = Request(
        f"{to.url.rstrip('/')}/graphql",
        json.dumps(asked).encode(),
        {"Content-Type": "application/json", "Authorization": f"Basic {login}"},
    )
    try:
        with urlopen(request, timeout=_TIMEOUT) as response:
            model = json.load(response)["data"]["model"]
        bucket = None if model is None else model["bucket"]
        if bucket is None or not bucket["historyLineCount"]:
            return -1
        return int(json.loads(json.loads(bucket["historyTail"])[-1])["_step"])
    except (URLError, OSError, ValueError, LookupError, TypeError) as error:
        raise SendingError(f"{to.url} does not tell what it has of {identity} ({error})") from error


def _key(url: str) -> str | None:
    if key := os.environ.get("WANDB_API_KEY"):
        return key
    try:
        found = netrc(os.environ.get("NETRC")).authenticators(urlparse(url).hostname or "")
    except (OSError, NetrcParseError):
        return None
    return None if found is None else found[2]


def show(rows: Sequence[tuple[Recorded, Outcome]]) -> None:
    """The list at the end: a line for each run."""
    for run, outcome in rows:
        counts = {"sent before": outcome.sent_before, "sent now": outcome.sent, "to be sent": outcome.waiting}
        told = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        said = f"; {outcome.said}" if outcome.said else ""
        print(f"{run.directory} ({run.identity}): of {len(run.segments)} starts {told}{said}")
    if not rows:
        print("no run was recorded offline")


def planned(run: Recorded) -> Outcome:
    """What there is to send of a run."""
    sent = sum(segment.is_sent for segment in run.segments)
    return Outcome(sent_before=sent, waiting=len(run.segments) - sent)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("folders", nargs="+", type=Path, help="folders of runs; whatever lies below them is looked at")
    add("--dry-run", action="store_true", help="list what would be sent, then stop")
    add("--entity", help="the account or team (default: that of the key)")
    add("--project", help="in the place of the project that the runs were recorded for")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """0; 1 if something has to be sent again; 2 if nothing can be sent."""
    arguments = parse(argv)
    errors = Console(stderr=True, soft_wrap=True)
    if missing := [str(folder) for folder in arguments.folders if not folder.is_dir()]:
        errors.print(
            f"error: no folder: {', '.join(missing)}; allowed are folders of runs; change the path", style="red"
        )
        return 2
    runs = find_runs(arguments.folders)
    if arguments.dry_run:
        show([(run, planned(run)) for run in runs])
        return 0
    url = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")
    key = _key(url)
    if key is None:
        errors.print(f"error: no key for {url}; allowed are WANDB_API_KEY and ~/.netrc; set one", style="red")
        return 2
    to, rows = Destination(url, key, arguments.entity, arguments.project), []
    with Progress(console=errors) as progress:
        task = progress.add_task("runs", total=len(runs))
        for run in runs:
            progress.update(task, description=run.directory.name)
            outcome = planned(run)
            if run.is_being_written:
                outcome.said = "is being written: sent another time"
            elif outcome.waiting:
                outcome = send(run, to)
            rows.append((run, outcome))
            progress.advance(task)
    show(rows)
    return int(any(outcome.has_failed for _, outcome in rows))


if __name__ == "__main__":
    sys.exit(main())
