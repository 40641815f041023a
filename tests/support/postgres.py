"""A PostgreSQL of Debian's on this machine, in a folder of its own, with a password."""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from tests.support.mlflow_server import free_port

PROGRAMS = Path("/usr/lib/postgresql")
PASSWORD = "hunter2"


def missing() -> str:
    """Say what must be installed or granted first; empty if nothing."""
    if not list(PROGRAMS.glob("*/bin/postgres")):
        return "PostgreSQL is missing: sudo apt-get install postgresql"
    return "" if os.geteuid() == 0 else "only root may start PostgreSQL as its own user"


def dump_and_restore(address: str, dump: Path) -> str:
    """Back a database up into a file and restore it as a new one; give that one's address."""
    parts = urlsplit(address)
    environ = {"PGHOST": str(parts.hostname), "PGPORT": str(parts.port), "PGUSER": "mlflow"}
    environ = {**os.environ, **environ, "PGPASSWORD": str(parts.password)}
    name = parts.path.removeprefix("/")
    words = ["pg_dump", "--format", "custom", name]
    dump.write_bytes(subprocess.run(words, env=environ, check=True, capture_output=True).stdout)
    subprocess.run(["createdb", "restored"], env=environ, check=True)
    subprocess.run(["pg_restore", "--dbname", "restored", str(dump)], env=environ, check=True)
    return address.removesuffix(name) + "restored"


@contextlib.contextmanager
def serve_postgres() -> Iterator[str]:
    """Run a server with an empty database; give its address, password included."""
    programs = max(PROGRAMS.glob("*/bin"))
    folder = Path(tempfile.mkdtemp(prefix="postgres-"))  # its user cannot enter pytest's folders
    shutil.chown(folder, "postgres", "postgres")
    (folder / "password").write_text(PASSWORD)
    (folder / "password").chmod(0o644)
    user = ["runuser", "-u", "postgres", "--"]
    data, port = folder / "data", free_port()
    words = ["--username=mlflow", f"--pwfile={folder}/password", "--auth=scram-sha-256"]
    subprocess.run(
        [*user, str(programs / "initdb"), *words, "--no-sync", "-D", str(data)],
        check=True,
        capture_output=True,
        cwd=folder,
    )
    options = ["-p", str(port), "-k", str(folder), "-c", "listen_addresses=127.0.0.1"]
    address = f"postgresql+psycopg2://mlflow:{PASSWORD}@127.0.0.1:{port}/postgres"
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
        yield address
    finally:
        stop = [*user, str(programs / "pg_ctl"), "stop", "-D", str(data), "-m", "fast"]
        subprocess.run(stop, check=False, capture_output=True, cwd=folder)
        process.wait(30)
        log.close()
        shutil.rmtree(folder)
