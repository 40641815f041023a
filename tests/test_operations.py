"""The limit of requests that docs/operations.md puts before a served model, by nginx itself."""

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from tests.support.documents import ROOT

MEGABYTE = b"0" * 2**20


class Model(BaseHTTPRequestHandler):
    """Stands for the served model; counts the requests that reach it."""

    reached = 0

    def do_POST(self) -> None:
        Model.reached += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(200)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        """Say nothing."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture
def proxy(tmp_path: Path) -> Iterator[int]:
    """Port of an nginx that has the page's lines, and a model behind it."""
    if shutil.which("nginx") is None:
        if os.environ.get("SCBERT_REQUIRE_NGINX"):
            raise AssertionError("nginx is missing: apt-get install nginx-light")
        pytest.skip("needs nginx (Debian: nginx-light)")
    page = (ROOT / "docs" / "operations.md").read_text(encoding="utf-8")
    (lines,) = re.findall(r"```nginx\n(.*?)```", page, re.DOTALL)
    model = HTTPServer(("127.0.0.1", 0), Model)
    threading.Thread(target=model.serve_forever, daemon=True).start()
    port = free_port()
    lines = lines.replace("8080", f"127.0.0.1:{port}").replace("5001", str(model.server_port))
    user = "user root;" if os.geteuid() == 0 else ""
    places = [f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("fastcgi", "scgi", "uwsgi")]
    places += [f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy")]
    inside = f"access_log off; {' '.join(places)}\n{lines}"
    (tmp_path / "nginx.conf").write_text(
        f"{user} daemon off; pid {tmp_path}/pid; events {{}}\nhttp {{ {inside} }}\n"
    )
    words = ["nginx", "-p", str(tmp_path), "-c", "nginx.conf", "-e", str(tmp_path / "error.log")]
    running = subprocess.Popen(words)
    try:
        deadline = time.monotonic() + 10
        while True:
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port)):
                break
            assert running.poll() is None, (tmp_path / "error.log").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        yield port
    finally:
        running.terminate()
        running.wait(10)
        model.shutdown()
        model.server_close()


def answer(port: int, path: str, megabytes: int, states_size: bool) -> int:
    """Status that a request of this size gets."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    pieces = (MEGABYTE for _ in range(megabytes))
    headers = {"Content-Length": str(megabytes * 2**20)} if states_size else {}
    with contextlib.closing(connection):
        # The proxy may hang up before all is sent.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.request(
                "POST", path, body=pieces, headers=headers, encode_chunked=not states_size
            )
        return connection.getresponse().status


def test_larger_requests_do_not_reach_the_model(proxy: int) -> None:
    Model.reached = 0
    for states_size in (True, False):
        assert answer(proxy, "/invocations", 65, states_size) == 413
    assert answer(proxy, "/ping", 1, True) == 404
    assert Model.reached == 0
    assert answer(proxy, "/invocations", 63, True) == 200
    assert Model.reached == 1
