"""As much of a W&B server as an upload asks for: it keeps the rows of each run, and can refuse to go on.

Learned from the requests of wandb 0.31: a run is looked up (`RunResumeStatus`), made or changed (`UpsertBucket`), its
rows arrive as lines of files at offsets (`file_stream`), other files at addresses that it asks for (`CreateRunFiles`).
"""

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

_HISTORY, _SUMMARY, _EVENTS = "wandb-history.jsonl", "wandb-summary.json", "wandb-events.jsonl"


@dataclass
class Run:
    """What arrived of a run: name of a file -> its lines."""

    name: str
    project: str
    display_name: str = ""
    config: str = "{}"
    lines: dict[str, list[str]] = field(default_factory=dict)
    exit_codes: list[int] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, object]]:
        """The logged rows."""
        return [json.loads(line) for line in self.lines.get(_HISTORY, [])]


@dataclass
class Server:
    """Its address, what it has, and how many file streams it answers before it refuses all."""

    url: str = ""
    runs: dict[str, Run] = field(default_factory=dict)
    streams_to_answer: float = float("inf")
    files: dict[str, bytes] = field(default_factory=dict)


@contextmanager
def wandb_server() -> Iterator[Server]:
    """A server on this machine."""
    server = Server()

    class Handler(_Handler):
        state = server

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        server.url = f"http://127.0.0.1:{http.server_port}"
        Thread(target=http.serve_forever, daemon=True).start()
        yield server
        http.shutdown()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: Server

    def do_POST(self) -> None:
        body = self._body()
        if self.path == "/graphql":
            self._answer({"data": self._query(json.loads(body))})
        elif found := re.fullmatch(r"/files/[^/]+/[^/]+/([^/]+)/file_stream", self.path):
            self._stream(self.state.runs[found[1]], json.loads(body))
        else:
            self._answer({})

    def do_PUT(self) -> None:
        self.state.files[self.path.removeprefix("/upload/")] = self._body()
        self._answer({})

    def do_GET(self) -> None:
        self._answer({})

    def log_message(self, *args: object) -> None:
        """Nothing."""

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        return gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body

    def _answer(self, content: object, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _query(self, asked: dict) -> dict:
        name, given = re.search(r"(?:query|mutation) (\w+)", asked["query"])[1], asked.get("variables") or {}
        project = {"id": "project", "name": given.get("project"), "entity": {"id": "entity", "name": "me"}}
        if name == "RunResumeStatus":
            run = self.state.runs.get(given["name"])
            return {"model": {**project, "bucket": None if run is None else _status(run)}}
        if name == "UpsertBucket":
            is_new = given["name"] not in self.state.runs
            run = self.state.runs.setdefault(given["name"], Run(given["name"], given["project"]))
            run.display_name = given.get("displayName") or run.display_name
            run.config = given.get("config") or run.config
            bucket = _status(run) | {"description": "", "sweepName": None, "project": project}
            return {"upsertBucket": {"bucket": bucket, "inserted": is_new}}
        if name == "CreateRunFiles":
            files = [{"name": file, "uploadUrl": f"{self.state.url}/upload/{file}"} for file in given["files"]]
            return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}
        if name == "Viewer":
            return {"viewer": {"id": "me", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}}
        return {}

    def _stream(self, run: Run, content: dict) -> None:
        if self.state.streams_to_answer <= 0:
            self._answer({"error": "no"}, 400)
            return
        self.state.streams_to_answer -= 1
        for name, chunk in content.get("files", {}).items():
            lines = run.lines.setdefault(name, [])
            lines[chunk["offset"] :] = chunk["content"]
        if content.get("complete"):
            run.exit_codes.append(content["exitcode"])
        self._answer({})


def _status(run: Run) -> dict:
    def tail(name: str) -> str:
        return json.dumps(run.lines.get(name, [])[-1:])

    return {
        "id": f"id-of-{run.name}",
        "name": run.name,
        "displayName": run.display_name,
        "summaryMetrics": (run.lines.get(_SUMMARY) or ["{}"])[-1],
        "logLineCount": 0,
        "historyLineCount": len(run.lines.get(_HISTORY, [])),
        "eventsLineCount": len(run.lines.get(_EVENTS, [])),
        "historyTail": tail(_HISTORY),
        "eventsTail": tail(_EVENTS),
        "config": run.config,
        "tags": [],
        "notes": None,
        "wandbConfig": "{}",
    }
