"""Labels for a store under a real Slurm: by the tasks of an array, and by jobs of its own."""

import os
import subprocess
import sys
import time
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch

from datastore.config import StoreConfig
from datastore.ingest import build_store
from finetune.annotation import annotate_file
from finetune.annotation_config import AnnotateConfig
from launchers import annotate as launcher
from tests.support.documents import ROOT, inline_code, shown
from tests.support.labelled import write_classifier, write_labelled
from tests.support.slurm import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of three partitions, a classifier, and all labels by one process."""
    folder = tmp_path_factory.mktemp("labels")
    write_classifier(folder / "model")
    raw = write_labelled(folder / "a.h5ad", 70, seed=2)
    build_store(
        StoreConfig(
            sources=[str(raw)],
            output=str(folder / "cells.zarr"),
            min_genes=1,
            cells_per_partition=25,
        )
    )
    paths = {name: str(folder / name) for name in ("model", "cells.zarr", "whole.h5ad")}
    annotate_file(
        AnnotateConfig(model=paths["model"], input=paths["cells.zarr"], output=paths["whole.h5ad"]),
        torch.device("cpu"),
    )
    return folder


def same_labels(folder: Path, output: Path) -> None:
    whole, parts = anndata.read_h5ad(folder / "whole.h5ad"), anndata.read_h5ad(output)
    assert list(parts.obs_names) == list(whole.obs_names)
    assert list(parts.obs["scbert_label"]) == list(whole.obs["scbert_label"])
    np.testing.assert_allclose(parts.obsm["scbert_prob"], whole.obsm["scbert_prob"], atol=2e-6)


def run_array(slurm: Slurm, folder: Path, tasks: str) -> str:
    """Submit the line of docs/cluster.md for some tasks, and wait until all have ended."""
    smaller = {"--array 0-11": f"--array {tasks}", "models:/scbert-mytissue@champion": "model"}
    job = slurm.submit(shown("cluster.md", "annotate_array.sbatch", smaller), folder)
    deadline = time.monotonic() + 300
    while slurm.call("squeue", "--noheader").strip():
        assert time.monotonic() < deadline, slurm.call("squeue")
        time.sleep(0.5)
    return job


def test_an_array_labels_its_parts_and_one_process_joins_them(
    slurm: Slurm, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = run_array(slurm, folder, "0-2")
    logs = {file.name: file.read_text() for file in folder.glob("scbert-annotate-*.log")}
    assert logs.keys() == {f"scbert-annotate-{job}_{task}.log" for task in range(3)}
    parts = folder / "labelled.h5ad.parts"
    done = {path: path.stat().st_mtime_ns for path in parts.glob("part_*.npz")}
    assert len(done) == 3, logs
    # A part that was lost is done again by its task; the others are left alone.
    lost = parts / "part_000001.npz"
    lost.unlink()
    run_array(slurm, folder, "0-1")
    assert lost.exists()
    assert all(path.stat().st_mtime_ns == at for path, at in done.items() if path != lost)
    monkeypatch.chdir(folder)
    words = ["cells.zarr", "--model", "model", "--output", "labelled.h5ad"]
    assert launcher.main(words) == 0
    same_labels(folder, folder / "labelled.h5ad")
    assert not parts.exists()


def test_jobs_of_its_own_give_the_same_labels(slurm: Slurm, folder: Path) -> None:
    (jobs,) = [
        code
        for code in inline_code(ROOT / "docs" / "cluster.md")
        if code.startswith("--slurm.jobs")
    ]
    words = [sys.executable, str(ROOT / "launchers" / "annotate.py"), "cells.zarr"]
    words += ["--model", "model", "--output", "by_jobs.h5ad"]
    words += jobs.replace("jobs 8", "jobs 2").replace("cores 4", "cores 1").split()
    words += ["--slurm.memory", "1GB", "--slurm.walltime", "00:10:00"]
    done = subprocess.run(
        words,
        env={**os.environ, "SLURM_CONF": str(slurm.folder / "slurm.conf")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "asked Slurm for 2 jobs" in done.stderr
    same_labels(folder, folder / "by_jobs.h5ad")
    assert not slurm.call("squeue", "--noheader").strip()
