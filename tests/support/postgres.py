"""A PostgreSQL of Debian's on this machine, in a folder of its own, with a password."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.support.mlflow_server import free_port

PROGRAMS = Path("/usr/lib/postgresql")
PASSWORD = "hunter2"
SUDO = """#!/bin/sh
# sudo -u postgres COMMAND, by root, who needs no sudo
shift 2
cd /
PGHOST=$SOCKETS PGUSER=postgres exec runuser -u postgres -- "$@"
"""


def missing() -> str:
    """Say what must be installed or granted first; empty if nothing."""
    if not list(PROGRAMS.glob("*/bin/postgres")):
        return "PostgreSQL is missing: sudo apt-get install postgresql"
    return "" if os.geteuid() == 0 else "only root may start PostgreSQL as its own user"


@dataclass(frozen=True)
class Postgres:
    """A running server, to which the commands of docs/operations.md can be given."""

    folder: Path
    port: int

    def run(self, command: str, cwd: Path, said: str = "", **environ: str) -> None:
        """Run a shell command as the page has it.

        Programs of PostgreSQL find this server: the system's own as `sudo -u postgres`, others as
        the user mlflow with its password.

        Args:
            command: The command.
            cwd: Where to.
            said: Answers to questions.
            environ: Further variables.
        """
        programs = self.folder / "programs"
        if not programs.exists():
            programs.mkdir()
            (programs / "sudo").write_text(SUDO)
            (programs / "sudo").chmod(0o755)
        path = f"{programs}{os.pathsep}{os.environ['PATH']}"
        server = {"PGHOST": "127.0.0.1", "PGPORT": str(self.port), "PGUSER": "mlflow"}
        server |= {"PGPASSWORD": PASSWORD, "SOCKETS": str(self.folder), "PATH": path}
        subprocess.run(
            command,
            shell=True,
            check=True,
            cwd=cwd,
            env={**os.environ, **server, **environ},
            input=said,
            text=True,
            start_new_session=True,  # else the question for a password goes to the terminal
        )


@contextlib.contextmanager
def serve_postgres() -> Iterator[Postgres]:
    """Run a server as Debian starts it: of the user postgres, without other users or databases."""
    programs = max(PROGRAMS.glob("*/bin"))
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # its user cannot enter pytest's folders
    shutil.chown(folder, "postgres", "postgres")
    user = ["runuser", "-u", "postgres", "--"]
    data, port = folder / "data", free_port()
    words = ["--auth-local=trust", "--auth-host=scram-sha-256", "--no-sync"]
    subprocess.run(
        [*user, str(programs / "initdb"), *words, "-D", str(data)],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
    log = (folder / "log").open("wb")
    process = subprocess.Popen(
        [*user, str(programs / "postgres"), "-D", str(data), *options, "-F"],
        stdout=log,
        stderr=log,
        cwd=folder,
    )
    try:
        deadline = time.monotonic() + 60
        ready = [str(programs / "pg_isready"), "-q", "-h", "127.0.0.1", "-p", str(port)]
        while subprocess.run(ready, check=False).returncode:
            assert process.poll() is None, (folder / "log").read_text()
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.2)
        yield Postgres(folder, port)
    finally:
        stop = [*user, str(programs / "pg_ctl"), "stop", "-D", str(data), "-m", "fast"]
        subprocess.run(stop, check=False, capture_output=True, cwd=folder)
        process.wait(30)
        log.close()
        shutil.rmtree(folder)
