"""A real `mlflow server` on this machine, and a connection that can be cut."""

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.mlflow_store import fresh_store

QUIET = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    # Else eight more processes wait for jobs that we do not have, and each imports all of MLflow.
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
}


def free_port() -> int:
    """A port that nobody uses now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path, seconds: float = 600) -> None:
    """Wait until an address answers; fail with the program's log if it ended."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(urllib.error.URLError, ConnectionError, TimeoutError):
            urllib.request.urlopen(url, timeout=5).close()
            return
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


@contextlib.contextmanager
def started(words: list[str], url: str, log: Path, **environ: str) -> Iterator[None]:
    """Run a program of this environment until the end, with all that it starts."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with log.open("wb") as out:
        process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", *words],
            env={**os.environ, **QUIET, "PATH": path, **environ},
            stdout=out,
            stderr=out,
            start_new_session=True,
        )
    try:
        wait_for(url, process, log)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, 15)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, 9)
            process.wait()


@contextlib.contextmanager
def mlflow_server(
    folder: Path,
    backend: str | None = None,
    artifacts: str | None = None,
    *options: str,
    **environ: str,
) -> Iterator[str]:
    """Start a server that hands out artifacts itself, and give its address.

    Args:
        folder: For its log and, if nothing else is said, its database and files.
        backend: Address of a database.
        artifacts: Address of an object store.
        options: Further words of the command line.
        environ: Environment variables of the server.
    """
    folder.mkdir(parents=True, exist_ok=True)
    url = f"http://127.0.0.1:{free_port()}"
    words = ["mlflow", "server", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    words += ["--backend-store-uri", backend or fresh_store(folder)]
    words += ["--artifacts-destination", artifacts or str(folder / "artifacts")]
    words += ["--workers", "1", *options]
    with started(words, f"{url}/health", folder / "server.log", **environ):
        yield url


@dataclass
class Cable:
    """A connection to a server that is cut after some bytes of an answer."""

    target: int
    """Port of the server."""
    budget: int = 1 << 40
    """Bytes of answers that still pass."""
    port: int = 0
    _listener: socket.socket = field(default_factory=socket.socket)

    def __enter__(self) -> "Cable":
        self._listener.bind(("127.0.0.1", 0))
        self._listener.listen(64)
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(("127.0.0.1", self.target))
            for source, sink, counted in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._copy, args=(source, sink, counted), daemon=True
                ).start()

    def _copy(self, source: socket.socket, sink: socket.socket, counted: bool) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(4096):
                if counted:
                    self.budget -= len(data)
                    if self.budget < 0:
                        break
                sink.sendall(data)
        for end in (source, sink):  # closing alone would not wake who reads at this moment
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
