"""`build_store.py --slurm.jobs` under a real Slurm: jobs of its own do the work, and then go."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from datastore.ingest import build_store
from tests.support.cells import file_bytes, store_config, three_sources, write_sources
from tests.support.cluster import ROOT
from tests.support.slurm import Slurm, missing, start_slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    assert not missing(), f"these tests start Slurm: {missing()}"
    with start_slurm(tmp_path_factory.mktemp("slurm") / "cluster", 2) as running:
        yield running


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return write_sources(tmp_path / "raw", three_sources())


def ingest(slurm: Slurm, folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    launcher = str(ROOT / "launchers" / "build_store.py")
    sizes = {"min_genes": 1, "cells_per_partition": 25, "cells_per_shard": 16}
    sizes |= {"cells_per_chunk": 4, "cells_per_slice": 9}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    flags += ["--slurm.jobs", "2", "--slurm.cores", "1", "--slurm.memory", "1GB"]
    flags += ["--slurm.walltime", "00:10:00"]  # the partition allows an hour
    return subprocess.run(
        [sys.executable, launcher, "--sources", f"[{folder}/raw]", "--output", output, *flags],
        env={**os.environ, "SLURM_CONF": str(slurm.folder / "slurm.conf")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def states(slurm: Slurm) -> dict[str, str]:
    """State of each job that the controller still knows, by its name and number."""
    lines = slurm.call("squeue", "-h", "-t", "all", "-o", "%j-%i %T").split("\n")
    return dict(line.split() for line in lines if line)


def test_jobs_build_the_same_store(slurm: Slurm, tmp_path: Path, sources: list[str]) -> None:
    expected = build_store(store_config(sources, tmp_path / "here.zarr"))
    done = ingest(slurm, tmp_path, str(tmp_path / "s.zarr"))
    assert done.returncode == 0, done.stderr
    assert "asked Slurm for 2 jobs" in done.stderr
    assert file_bytes(tmp_path / "s.zarr") == file_bytes(expected.path)
    ended = states(slurm)
    assert len([name for name in ended if name.startswith("dask-worker")]) == 2
    assert not {"RUNNING", "PENDING"} & set(ended.values())


def test_a_refusal_ends_the_jobs(slurm: Slurm, tmp_path: Path, sources: list[str]) -> None:
    (tmp_path / "raw" / "cut.h5ad").write_bytes(Path(sources[0]).read_bytes()[:2000])
    done = ingest(slurm, tmp_path, "s.zarr")
    assert done.returncode == 2, done.stderr
    assert "cut.h5ad" in done.stderr
    assert not list(tmp_path.glob("s.zarr*"))
    assert not {"RUNNING", "PENDING"} & set(states(slurm).values())
