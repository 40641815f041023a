"""A store labelled part by part, by whomever: the same as in one go."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from distributed import LocalCluster

from datastore.config import StoreConfig
from datastore.ingest import build_store
from finetune.annotation import annotate_file
from finetune.annotation_config import AnnotateConfig
from finetune.annotation_parts import annotate_part, annotate_store
from launchers import annotate as launcher
from tests.support.labelled import write_classifier, write_labelled

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    write_classifier(folder / "model")
    write_labelled(folder / "a.h5ad", 70, seed=2)
    build_store(
        StoreConfig(
            sources=[str(folder / "a.h5ad")],
            output=str(folder / "cells.zarr"),
            min_genes=1,
            cells_per_partition=25,
        )
    )
    annotate_file(_config(folder, folder / "whole.h5ad"), CPU)
    return folder


def _config(folder: Path, output: Path) -> AnnotateConfig:
    return AnnotateConfig(
        model=str(folder / "model"), input=str(folder / "cells.zarr"), output=str(output)
    )


def _same(folder: Path, output: Path) -> None:
    whole, parts = anndata.read_h5ad(folder / "whole.h5ad"), anndata.read_h5ad(output)
    assert list(parts.obs_names) == list(whole.obs_names)
    assert list(parts.obs["scbert_label"]) == list(whole.obs["scbert_label"])
    # the same products in other batch shapes
    np.testing.assert_allclose(parts.obsm["scbert_prob"], whole.obsm["scbert_prob"], atol=2e-6)
    np.testing.assert_allclose(parts.obsm["X_scbert"], whole.obsm["X_scbert"], atol=5e-6)
    tables = [path.with_suffix(".csv").read_text() for path in (folder / "whole.h5ad", output)]
    lines = [[line.split(",")[:2] for line in table.splitlines()] for table in tables]
    assert lines[0] == lines[1]


def test_one_run_does_all_parts_and_leaves_no_folder(folder: Path, tmp_path: Path) -> None:
    result = annotate_store(_config(folder, tmp_path / "o.h5ad"), CPU)
    assert result is not None
    assert result.num_cells == 70
    assert sum(result.cells_of.values()) == 70
    _same(folder, tmp_path / "o.h5ad")
    assert {path.name for path in tmp_path.iterdir()} == {"o.h5ad", "o.csv"}


def test_parts_by_themselves_are_joined_without_being_done_again(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = _config(folder, tmp_path / "o.h5ad")
    words = ["--model", config.model, "--output", config.output]
    for part in ("2", "0"):
        assert launcher.main([config.input, *words, "--part", part]) == 0
    assert "part 2 is done" in capsys.readouterr().out
    assert not (tmp_path / "o.h5ad").exists()
    done: list[int] = []

    def counted(config: AnnotateConfig, folder: str, part: int) -> int:
        done.append(part)
        return annotate_part(config, folder, part)

    monkeypatch.setattr("finetune.annotation_parts.annotate_part", counted)
    assert launcher.main([config.input, *words]) == 0
    assert done == [1]
    _same(folder, tmp_path / "o.h5ad")


def test_dask_workers_give_the_same_labels(folder: Path, tmp_path: Path) -> None:
    with LocalCluster(
        n_workers=1, threads_per_worker=2, processes=False, dashboard_address=None
    ) as cluster:
        config = replace(_config(folder, tmp_path / "o.h5ad"), scheduler=cluster.scheduler_address)
        annotate_store(config, CPU)
    _same(folder, tmp_path / "o.h5ad")


def test_what_does_not_belong_together_is_refused(folder: Path, tmp_path: Path) -> None:
    config = _config(folder, tmp_path / "o.h5ad")
    annotate_store(replace(config, part=1), CPU)
    with pytest.raises(ValueError, match=r"parts of another annotation \(novelty_threshold diff"):
        annotate_store(replace(config, novelty_threshold=0.9), CPU)
    with pytest.raises(ValueError, match=r"part is 3; .* has 3 parts, numbered from 0"):
        annotate_store(replace(config, part=3), CPU)
    (tmp_path / "o.h5ad.parts" / "part_000001.npz").write_bytes(b"PK torn")
    with pytest.raises(ValueError, match=r"part_000001\.npz is damaged .*remove it"):
        annotate_store(config, CPU)
    assert not (tmp_path / "o.h5ad").exists()
    (tmp_path / "o.h5ad.parts" / "part_000001.npz").unlink()
    annotate_store(config, CPU)
    _same(folder, tmp_path / "o.h5ad")


@pytest.mark.slow
def test_the_slurm_script_labels_the_part_of_its_task(folder: Path, tmp_path: Path) -> None:
    root = Path(__file__).resolve().parents[2]
    config = _config(folder, tmp_path / "o.h5ad")
    words = [config.input, "--model", config.model, "--output", config.output]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environ = {"PATH": path, "SLURM_SUBMIT_DIR": str(root), "SLURM_ARRAY_TASK_ID": "1"}
    script = root / "launchers" / "slurm" / "annotate_array.sbatch"
    done = subprocess.run(
        ["bash", str(script), *words],
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "part 1 is done" in done.stdout
    parts = {path.name for path in (tmp_path / "o.h5ad.parts").iterdir()}
    assert parts == {"plan.json", "part_000001.npz"}
