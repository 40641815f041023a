"""A web server of a folder that honours byte ranges, and fails as it is told to.

It answers as a plain web server does, and as Google Cloud Storage does to readers (its JSON
interface: `/storage/v1/b/<bucket>/o/<object>`).
"""

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Literal
from urllib.parse import parse_qs, unquote, urlsplit

Fault = Literal[
    "", "503", "400", "403", "404", "drop", "cut", "short", "garble", "no ranges", "stall"
]
"""What goes wrong with an answer: a busy server, two refusals, a lost file, a connection closed
before or in the midst of the body, a body cut short (with headers that say so) or changed by one
bit, a server that knows no byte ranges, one that falls silent."""

_GCS_OBJECT = re.compile(r"/storage/v1/b/([^/]+)/o(?:/([^/]+))?")


class FolderServer:
    """Serves a folder on a free port of this machine."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.fault: Callable[[str], Fault] = lambda path: ""
        """Called with the path of each request."""
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = 2**20  # an answer in one piece: no waiting for acknowledgements

            def do_GET(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        split = urlsplit(request.path)
        path = unquote(split.path)
        with self._lock:  # so that a seeded fault generator may be used
            self.requests.append(path)
            fault = self.fault(path)
            if fault:
                self.faults.append(fault)
        gcs = _GCS_OBJECT.fullmatch(split.path)
        if gcs and gcs[2] is None:
            self._send(request, 200, self._listing(parse_qs(split.query)))
            return
        file = self.folder / (unquote(gcs[2]) if gcs else path).lstrip("/")
        if fault in ("503", "400", "403", "404"):
            self._send(request, int(fault), b"")
        elif fault == "drop":
            request.close_connection = True
            request.connection.close()
        elif not file.is_file():
            self._send(request, 404, b"")
        else:
            self._send_file(request, file.read_bytes(), fault)

    def _send_file(self, request: BaseHTTPRequestHandler, content: bytes, fault: Fault) -> None:
        wanted = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("Range", ""))
        headers = {"ETag": '"1"', "Accept-Ranges": "bytes", "x-goog-generation": "1"}
        status, start, stop = 200, 0, len(content)
        if wanted and fault != "no ranges":
            first, last = wanted.groups()
            start = int(first) if first else max(0, stop - int(last))
            stop = min(stop, int(last) + 1) if first and last else stop
            if start >= stop:
                self._send(request, 416, b"", {"Content-Range": f"bytes */{len(content)}"})
                return
            status = 206
        body = content[start:stop]
        if fault == "short":
            body = body[: len(body) // 2]
        elif fault == "garble" and body:
            body = bytes([body[0] ^ 1]) + body[1:]
        if status == 206:
            end = start + len(body) - 1
            headers["Content-Range"] = f"bytes {start}-{end}/{len(content)}"
        self._send(request, status, body, headers, fault)

    def _send(
        self,
        request: BaseHTTPRequestHandler,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        fault: Fault = "",
    ) -> None:
        request.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            request.send_header(name, value)
        request.end_headers()
        if fault in ("cut", "stall"):
            request.wfile.write(body[: len(body) // 2])
            request.wfile.flush()
            if fault == "stall":
                threading.Event().wait(20.0)
            request.close_connection = True
            return
        request.wfile.write(body)
        request.wfile.flush()

    def _listing(self, query: dict[str, list[str]]) -> bytes:
        (start,), (end,) = query.get("startOffset", [""]), query.get("endOffset", ["\U0010ffff"])
        names = sorted(
            file.relative_to(self.folder).as_posix()
            for file in self.folder.rglob("*")
            if file.is_file()
        )
        items = [{"name": name, "generation": "1"} for name in names if start <= name < end]
        return json.dumps({"kind": "storage#objects", "items": items}).encode()


@contextmanager
def serve_folder(folder: Path) -> Iterator[FolderServer]:
    """Serve a folder until the block ends."""
    server = FolderServer(folder)
    thread = threading.Thread(target=server._server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server._server.shutdown()
        server._server.server_close()
        thread.join()
