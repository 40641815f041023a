"""The registry by the commands of docs/operations.md: PostgreSQL, S3, named hosts, backup."""

import json
import os
import shlex
import shutil
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest

from finetune.promotion import promote
from finetune.registration import register_export
from finetune.registry import list_models, resolve_model, verify_model
from tests.support.documents import ROOT, commands
from tests.support.entries import classifier_settings, write_entry
from tests.support.mlflow_server import free_port, started
from tests.support.postgres import PASSWORD, Postgres, serve_postgres
from tests.support.postgres import missing as missing_postgres
from tests.support.s3_server import s3_environment, serve_s3

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

SHOWN = commands(ROOT / "docs" / "operations.md")
BUCKET = "scbert-models"


def shown(*beginnings: str) -> list[str]:
    """The page's commands that begin so, in the page's order."""
    found = [line for line in SHOWN if line.startswith(beginnings)]
    assert found
    return found


@contextmanager
def lab_server(folder: Path, postgres: Postgres, **environ: str) -> Iterator[str]:
    """Run the page's `mlflow server` with half the workers and at free ports."""
    (command,) = [line for line in shown("mlflow server") if "postgresql" in line]
    port = free_port()
    changes = {
        "--workers 4": "--workers 2",
        "5000": str(port),
        "$DATABASE_PASSWORD": PASSWORD,
        "127.0.0.1/mlflow": f"127.0.0.1:{postgres.port}/mlflow",
    }
    for before, after in changes.items():
        assert before in command
        command = command.replace(before, after)
    folder.mkdir()
    url = f"http://localhost:{port}"
    with started(shlex.split(command), f"{url}/health", folder / "server.log", **environ):
        yield url


def missing() -> str:
    """What these tests lack; empty if nothing."""
    return missing_postgres() or (
        "" if shutil.which("rclone") else "rclone: apt-get install rclone"
    )


def copied(command: str, backup: Path) -> str:
    """A command of the page with the backup in another folder."""
    return command.replace("/backup/", f"{backup}/")


def test_a_lab_registry_keeps_models_for_everybody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    good = write_entry(tmp_path / "good", "good", **classifier_settings(0.9, 0.8))
    better = write_entry(tmp_path / "better", "better", **classifier_settings(0.95, 0.9))
    with serve_postgres() as postgres:
        for command in shown("sudo -u postgres")[:2]:
            postgres.run(command, tmp_path, said=f"{PASSWORD}\n{PASSWORD}\n")
        with serve_s3(BUCKET) as s3:
            environ = {**s3_environment(s3), "MLFLOW_S3_ENDPOINT_URL": s3}
            with lab_server(tmp_path / "server", postgres, **environ) as uri:
                register_export(good, "lab", uri=uri, alias="champion")
                register_export(better, "lab", uri=uri, alias="challenger")
                stored = urllib.request.urlopen(f"{s3}/{BUCKET}?list-type=2").read().decode()
                assert stored.count("model.safetensors") == 2
                promote("models:/lab@challenger", uri=uri, cache=tmp_path / "cache")
                crowd_pulls(uri, tmp_path / "shared")
                assert [ref.aliases for ref in list_models(uri)] == [(), ("challenger", "champion")]
                assert verify_model("models:/lab/1", uri=uri) == 5
                named_otherwise(uri)
            for command in shown("pg_dump", "rclone sync s3:"):
                postgres.run(copied(command, tmp_path), tmp_path, **rclone_environment(s3))
        # The server and its object store are gone; the page's commands bring them back.
        postgres.run("sudo -u postgres dropdb mlflow", tmp_path)
        with serve_s3(BUCKET) as s3:
            environ = {**s3_environment(s3), "MLFLOW_S3_ENDPOINT_URL": s3}
            restore = [shown("sudo -u postgres")[2], *shown("pg_restore", "rclone sync /backup")]
            for command in restore:
                postgres.run(copied(command, tmp_path), tmp_path, **rclone_environment(s3))
            with lab_server(tmp_path / "restored", postgres, **environ) as uri:
                assert [ref.aliases for ref in list_models(uri)] == [(), ("challenger", "champion")]
                for number in (1, 2):
                    assert verify_model(f"models:/lab/{number}", uri=uri) == 5
    copy = resolve_copy(tmp_path / "shared")
    assert (copy / "model.safetensors").read_bytes() == (better / "model.safetensors").read_bytes()
    assert PASSWORD not in caplog.text
    assert "Traceback" not in (tmp_path / "server" / "server.log").read_text()


def crowd_pulls(uri: str, cache: Path) -> None:
    with ThreadPoolExecutor(8) as tasks:
        pulls = [
            tasks.submit(resolve_model, "models:/lab@champion", uri=uri, cache=cache)
            for _ in range(8)
        ]
    assert {pull.result().version for pull in pulls} == {2}


def named_otherwise(uri: str) -> None:
    other = urllib.request.Request(f"{uri}/api/2.0/mlflow/experiments/search", method="POST")
    other.add_header("Host", "evil.example")
    with pytest.raises(urllib.error.HTTPError, match="403"):
        urllib.request.urlopen(other)


def rclone_environment(endpoint: str) -> dict[str, str]:
    """What `rclone config` would ask for the remote `s3`."""
    return {
        "RCLONE_CONFIG": os.devnull,
        "RCLONE_CONFIG_S3_TYPE": "s3",
        "RCLONE_CONFIG_S3_PROVIDER": "Other",
        "RCLONE_CONFIG_S3_ENDPOINT": endpoint,
        "RCLONE_CONFIG_S3_ENV_AUTH": "true",
        "AWS_CA_BUNDLE": "",  # a machine's own is nothing for rclone
        **s3_environment(endpoint),
    }


def resolve_copy(cache: Path) -> Path:
    (note,) = (cache / "references").iterdir()
    return cache / str(json.loads(note.read_text())["digest"])
