"""A server on loopback that serves what a dict says, as well or as badly as a path asks for."""

import contextlib
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Shelf(dict):
    """Path -> bytes. `asked` counts requests by path; `ranges` lists the Range headers.

    A path with /busy/ answers 503 at first, /torn/ breaks off half-way at first, /mute/ never sends a byte, /slow/ waits
    0.05 s, /endless/ sends a little every 0.02 s for ever.
    """

    def __init__(self):
        super().__init__()
        self.asked, self.ranges, self.lock, self.open = Counter(), [], threading.Lock(), True


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        shelf, path = self.server.shelf, self.path
        with shelf.lock:
            shelf.asked[path] += 1
            first = shelf.asked[path] == 1
            if "Range" in self.headers: shelf.ranges.append((path, self.headers["Range"]))
        data = shelf.get(path)
        if data is None: return self.send_error(404)
        if "/busy/" in path and first:
            self.send_response(503)
            self.send_header("Retry-After", "0")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if "/slow/" in path: time.sleep(0.05)
        if "/mute/" in path:
            while shelf.open: time.sleep(0.02)
            self.close_connection = True
            return None
        start = int(self.headers["Range"][6:-1]) if "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        if start: self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(10**9 if "/endless/" in path else len(data) - start))
        self.send_header("ETag", '"the same"')
        self.end_headers()
        if "/torn/" in path and first:
            self.close_connection = True
            data = data[:len(data) // 2]
        with contextlib.suppress(OSError):  # the other side has gone
            self.wfile.write(data[start:])
            while "/endless/" in path and shelf.open:
                time.sleep(0.02)
                self.wfile.write(b"x")
        return None

    def log_message(self, *args): pass


@contextlib.contextmanager
def serving(shelf, port=0):
    "The address at which `shelf` is served."
    server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
    server.shelf, server.daemon_threads, shelf.open = shelf, True, True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try: yield f"http://127.0.0.1:{server.server_port}"
    finally:
        shelf.open = False
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.fixture
def web(monkeypatch):
    "(shelf, address) of a server of this test."
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    shelf = Shelf()
    with serving(shelf) as address: yield shelf, address
