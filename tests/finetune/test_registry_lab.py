"""The registry as docs/operations.md has it: PostgreSQL, an S3-compatible store, named hosts."""

import json
import os
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from finetune.promotion import promote
from finetune.registration import register_export
from finetune.registry import list_models, resolve_model, verify_model
from tests.support.entries import classifier_settings, write_entry
from tests.support.mlflow_server import mlflow_server
from tests.support.postgres import PASSWORD, dump_and_restore, missing, serve_postgres
from tests.support.s3_server import copy_bucket, s3_environment, serve_s3

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]


def test_a_lab_registry_keeps_models_for_everybody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if reason := missing():
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    good = write_entry(tmp_path / "good", "good", **classifier_settings(0.9, 0.8))
    better = write_entry(tmp_path / "better", "better", **classifier_settings(0.95, 0.9))
    with serve_postgres() as database, serve_s3("models") as s3:
        environ = {**s3_environment(s3), "MLFLOW_S3_ENDPOINT_URL": s3}
        with mlflow_server(
            tmp_path / "server",
            database,
            "s3://models",
            "--allowed-hosts",
            "127.0.0.1:*",
            **environ,
        ) as uri:
            register_export(good, "lab", uri=uri, alias="champion")
            register_export(better, "lab", uri=uri, alias="challenger")
            stored = urllib.request.urlopen(f"{s3}/models?list-type=2").read().decode()
            assert stored.count("model.safetensors") == 2
            promote("models:/lab@challenger", uri=uri, cache=tmp_path / "cache")
            with ThreadPoolExecutor(8) as tasks:
                pulls = [
                    tasks.submit(
                        resolve_model, "models:/lab@champion", uri=uri, cache=tmp_path / "shared"
                    )
                    for _ in range(8)
                ]
            assert {pull.result().version for pull in pulls} == {2}
            assert [ref.aliases for ref in list_models(uri)] == [(), ("challenger", "champion")]
            assert verify_model("models:/lab/1", uri=uri) == 5
            other = urllib.request.Request(
                f"{uri}/api/2.0/mlflow/experiments/search", method="POST"
            )
            other.add_header("Host", "evil.example")
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(other)
        log = (tmp_path / "server" / "server.log").read_text()
        # Database first, then files, as the page has it; then the server that was is gone.
        restored = dump_and_restore(database, tmp_path / "mlflow.dump")
        copy_bucket(s3, "models", "backup")
        with mlflow_server(tmp_path / "restored", restored, "s3://backup", **environ) as uri:
            assert [ref.aliases for ref in list_models(uri)] == [(), ("challenger", "champion")]
            assert [verify_model(f"models:/lab/{number}", uri=uri) for number in (1, 2)] == [5, 5]
    copy = resolve_copy(tmp_path / "shared")
    assert (copy / "model.safetensors").read_bytes() == (better / "model.safetensors").read_bytes()
    assert PASSWORD not in caplog.text
    assert "Traceback" not in log


def resolve_copy(cache: Path) -> Path:
    (note,) = (cache / "references").iterdir()
    return cache / str(json.loads(note.read_text())["digest"])
