"""The registry against a real `mlflow server`: crowds, cuts, credentials, and labels over HTTP."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import sparse

from finetune.classifier import load_classifier, predict
from finetune.registration import register_export
from finetune.registry import describe_model, resolve_model
from tests.support.documents import ROOT
from tests.support.entries import write_entry
from tests.support.labelled import GENES, labelled_cells, write_classifier, write_labelled
from tests.support.mlflow_server import Cable, free_port, mlflow_server, started

pytestmark = [pytest.mark.slow, pytest.mark.multiprocess]

NUM_PROCESSES, NUM_THREADS = 4, 50
PULL = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from finetune.registry import resolve_model
uri, cache, number = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with ThreadPoolExecutor(number) as tasks:
    pulls = [
        tasks.submit(resolve_model, "models:/crowd@champion", uri=uri, cache=cache)
        for _ in range(number)
    ]
print(len({pull.result().path for pull in pulls}), len(pulls))
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with mlflow_server(tmp_path_factory.mktemp("server")) as url:
        yield url


def large_entry(folder: Path) -> Path:
    """A few megabytes of weights."""
    return write_entry(folder, "".join(map(chr, range(32, 126))) * 10_000)


def test_200_pulls_at_once_are_one_download(server: str, tmp_path: Path) -> None:
    entry = large_entry(tmp_path / "entry")
    register_export(entry, "crowd", uri=server, alias="champion")
    cache = tmp_path / "cache"
    with Cable(int(server.rpartition(":")[2])) as cable:
        before = cable.budget
        words = [f"http://127.0.0.1:{cable.port}", str(cache), str(NUM_THREADS)]
        tasks = [
            subprocess.Popen(
                [sys.executable, "-W", "ignore", "-c", PULL, *words],
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for _ in range(NUM_PROCESSES)
        ]
        said = [task.communicate(timeout=300) for task in tasks]
        received = before - cable.budget
    assert [out.strip() for out, _ in said] == [f"1 {NUM_THREADS}"] * NUM_PROCESSES, said
    size = (entry / "model.safetensors").stat().st_size
    assert size < received < 2 * size  # the answers to 200 questions, and the weights once
    copy = resolve_model("models:/crowd@champion", uri=server, cache=cache).path
    assert (copy / "model.safetensors").read_bytes() == (entry / "model.safetensors").read_bytes()


def test_a_server_that_dies_in_the_middle_leaves_no_half_model(
    server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    entry = large_entry(tmp_path / "entry")
    register_export(entry, "cut", uri=server, alias="champion")
    cache = tmp_path / "cache"
    with Cable(int(server.rpartition(":")[2])) as cable:
        uri = f"http://127.0.0.1:{cable.port}"
        describe_model("models:/cut@champion", uri=uri)
        cable.budget = 1_000_000  # of 3.7 MB of weights
        with pytest.raises(ValueError, match=r"MLflow at http|broke off, nothing kept"):
            resolve_model("models:/cut@champion", uri=uri, cache=cache)
        assert {path.name for path in cache.iterdir()} == {"locks", "pulls"}
        assert list((cache / "pulls").iterdir()) == []
        cable.budget = 1 << 40
        assert resolve_model("models:/cut@champion", uri=uri, cache=cache).version == 1


def test_credentials_stay_where_they_were(
    server: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    secret = "hunter2"
    uri = server.replace("http://", f"http://me:{secret}@")
    caplog.set_level("DEBUG", "finetune")
    caplog.set_level("DEBUG", "pretrain")
    entry = write_entry(tmp_path / "entry", "x")
    register_export(entry, "secret", uri=uri, alias="champion")
    pulled = resolve_model("models:/secret@champion", uri=uri, cache=tmp_path / "cache")
    facts = describe_model("models:/secret/1", uri=uri)
    kept = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert pulled.path / "MODEL_CARD.md" in kept
    texts = [path.read_bytes().decode("latin-1") for path in kept]
    texts += [json.dumps(facts), caplog.text]
    assert [text for text in texts if secret in text] == []


def test_a_training_keeps_credentials_to_itself(
    server: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Neither its files and log, nor what it sends: the database and files of the server."""
    write_labelled(tmp_path / "a.h5ad", 60)
    words = ["--encoder", "none", "--data.path", "a.h5ad", "--output", "run", "--epochs", "1"]
    words += ["--head.kind", "pooled", "--fresh.encoder.dim", "16", "--fresh.encoder.depth", "1"]
    secrets = {"MLFLOW_TRACKING_TOKEN": "token-hunter3", "AWS_SECRET_ACCESS_KEY": "key-hunter4"}
    environ = {"MLFLOW_TRACKING_URI": server.replace("://", "://me:hunter2@"), **secrets}
    done = subprocess.run(
        [sys.executable, "-m", "launchers.scbert", "finetune", *words],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SCBERT_LOG": "DEBUG", **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    register_export(tmp_path / "run" / "export", "trained", uri=server)
    (folder,) = tmp_path_factory.getbasetemp().glob("server?")
    kept = [path for place in (tmp_path, folder) for path in place.rglob("*") if path.is_file()]
    assert {"mlflow.db", "server.log", "config.json", "MODEL_CARD.md"} <= {p.name for p in kept}
    assert b"scbert-finetune" in (folder / "mlflow.db").read_bytes()  # the run has arrived
    assert "hunter" not in done.stdout + done.stderr
    assert [path for path in kept if b"hunter" in path.read_bytes()] == []


def post(url: str, body: bytes, kind: str = "application/json") -> tuple[int, Any]:
    request = urllib.request.Request(f"{url}/invocations", body, {"Content-Type": kind})
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def test_a_registered_model_labels_cells_over_http(server: str, tmp_path: Path) -> None:
    export = write_classifier(tmp_path / "export")
    register_export(export, "served", uri=server, alias="champion")
    counts = labelled_cells(8, 7).X.toarray()
    model, _ = load_classifier(export)
    expected = predict(model, sparse.csr_matrix(counts), 8, progress=False).best
    records = [
        {"genes": [GENES[place] for place in np.flatnonzero(row)], "counts": row[row > 0].tolist()}
        for row in counts
    ]
    url = f"http://127.0.0.1:{free_port()}"
    words = ["mlflow", "models", "serve", "--model-uri", "models:/served@champion"]
    words += ["--env-manager", "local", "--host", "127.0.0.1", "--port", url.rpartition(":")[2]]
    with started(words, f"{url}/ping", tmp_path / "serve.log", MLFLOW_TRACKING_URI=server):
        for form in (records, [{"counts": row.tolist()} for row in counts]):
            code, answer = post(url, json.dumps({"dataframe_records": form}).encode())
            assert (code, [record["label"] for record in answer["predictions"]]) == (200, expected)
        asked = {"dataframe_records": records[:1], "params": {"probabilities": True}}
        _, answer = post(url, json.dumps(asked).encode())
        assert sum(answer["predictions"][0]["probabilities"].values()) == pytest.approx(1)
        for body, kind, code, message in (
            ({"dataframe_records": [{"counts": [1]}]}, "application/json", 400, "has 1 counts"),
            ({"dataframe_records": records * 200}, "application/json", 400, "send 1 to 1000"),
            ({"cells": 1}, "application/json", 400, "dataframe_records"),
            ({"dataframe_records": [{"genes": []}]}, "application/json", 400, "counts"),
            (records, "image/png", 415, "content types"),
        ):
            found, text = post(url, json.dumps(body).encode(), kind)
            assert (found, message in text) == (code, True), text
        assert post(url, b"{not json")[0] == 400


def test_mlflow_models_predict_labels_a_file(server: str, tmp_path: Path) -> None:
    register_export(write_classifier(tmp_path / "export"), "predicted", uri=server)
    request = {"dataframe_records": [{"genes": ["GENE0"], "counts": [5]}]}
    (tmp_path / "cells.json").write_text(json.dumps(request))
    words = ["mlflow", "models", "predict", "--model-uri", "models:/predicted/1"]
    words += ["--env-manager", "local", "--input-path", str(tmp_path / "cells.json")]
    words += ["--content-type", "json", "--output-path", str(tmp_path / "labels.json")]
    started_at = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", *words],
        env={**os.environ, "MLFLOW_TRACKING_URI": server},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print(f"mlflow models predict took {time.monotonic() - started_at:.1f} s")
    answer = json.loads((tmp_path / "labels.json").read_text())
    assert set(answer["predictions"][0]) == {"label", "confidence", "novel"}
