"""Pretraining from a store on a server: the same losses as from the disk, or one sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cells import file_bytes
from tests.support.http_server import serve_folder
from tests.support.s3_server import s3_environment, serve_s3, upload
from tests.support.tiny import tiny_store

ROOT = Path(__file__).resolve().parents[2]
SMALL = [
    *("--encoder.dim", "16", "--encoder.depth", "1", "--encoder.heads", "2", "--epochs", "1"),
    *("--encoder.dim_head", "8", "--encoder.num_features", "16", "--log_every", "1"),
    *("--batch.global_size", "16", "--batch.micro_size", "16", "--optim.schedule", "constant"),
]


def pretrain(store: str, output: Path, environ: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = ["--store", store, "--output", str(output), *SMALL]
    return subprocess.run(
        [sys.executable, "-m", "launchers.scbert", "pretrain", *words],
        cwd=ROOT,
        env={**os.environ, "MLFLOW_TRACKING_URI": f"sqlite:///{output}.db", **environ},
        capture_output=True,
        text=True,
        check=False,
    )


def losses(output: Path) -> list[tuple[int, float]]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [(line["step"], line["loss"]) for line in lines if "loss" in line]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_store_on_s3_trains_as_one_on_the_disk(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "s.zarr")
    done = pretrain(str(store.path), tmp_path / "local", {})
    assert done.returncode == 0, done.stderr
    with serve_s3("cells") as endpoint:
        upload(file_bytes(store.path), f"{endpoint}/cells/s.zarr")
        done = pretrain("s3://cells/s.zarr", tmp_path / "remote", s3_environment(endpoint))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "remote") == losses(tmp_path / "local")
    assert len(losses(tmp_path / "local")) >= 3

    with serve_folder(tmp_path) as server:
        server.fault = lambda path: "404" if "/X/data/c/" in path else ""
        done = pretrain(f"{server.url}/s.zarr", tmp_path / "lost", {})
    assert done.returncode == 2
    assert f"error: {server.url}/s.zarr" in done.stderr
