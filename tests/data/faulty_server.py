"""An http server on this machine that serves a folder and fails on purpose."""

import threading
import time
from collections import Counter
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class FaultyServer:
    """Serves a folder; `faults` are used up by GET requests, one each: drop, 503, long, stall, or a status."""

    def __init__(self, folder):
        self.folder, self.faults, self.requests, self.version = folder, [], Counter(), "1"
        self.delay, self.started = 0.0, threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_HEAD(self):
                outer.answer(self, is_head=True)

            def do_GET(self):
                outer.answer(self, is_head=False)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, handler, is_head):
        name = handler.path.partition("?")[0].lstrip("/")
        self.requests["HEAD" if is_head else "GET", name] += 1
        fault = self.faults.pop(0) if self.faults and not is_head else None
        path = self.folder / name
        if isinstance(fault, int) or not path.is_file():
            handler.send_error(fault if isinstance(fault, int) else 404)
            return
        data = path.read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data) + (100 if fault == "long" else 0)))
        handler.send_header("ETag", self.version)
        handler.end_headers()
        if is_head:
            return
        half = len(data) // 2 if fault or self.delay else len(data)
        handler.wfile.write(data[:half])
        handler.wfile.flush()
        self.started.set()
        time.sleep(5 if fault == "stall" else self.delay)
        if fault != "drop":
            handler.wfile.write(data[half:])
        handler.close_connection = True


@contextmanager
def serving(folder):
    faulty = FaultyServer(folder)
    thread = threading.Thread(target=faulty.server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield faulty
    faulty.server.shutdown()
    faulty.server.server_close()
