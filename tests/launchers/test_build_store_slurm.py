"""Ingest under a real Slurm: by jobs of its own (`--slurm.jobs`), and by the tasks of an array."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from datastore.ingest import build_store
from tests.support.cells import (
    file_bytes,
    gene_names,
    random_cells,
    store_config,
    three_sources,
    write_sources,
)
from tests.support.documents import ROOT, inline_code, shown
from tests.support.slurm import Slurm

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(600)]


@pytest.fixture
def sources(tmp_path: Path) -> list[str]:
    return write_sources(tmp_path / "raw", three_sources())


def ingest(slurm: Slurm, folder: Path, output: str) -> subprocess.CompletedProcess[str]:
    launcher = str(ROOT / "launchers" / "build_store.py")
    sizes = {"min_genes": 1, "cells_per_partition": 25, "cells_per_shard": 16}
    sizes |= {"cells_per_chunk": 4, "cells_per_slice": 9}
    flags = [text for name, value in sizes.items() for text in (f"--{name}", str(value))]
    page = ROOT / "docs" / "cluster.md"
    (jobs,) = [code for code in inline_code(page) if code.startswith("--slurm.jobs")]
    flags += jobs.replace("jobs 8", "jobs 2").replace("cores 4", "cores 1").split()
    flags += ["--slurm.memory", "1GB", "--slurm.walltime", "00:10:00"]  # an hour is allowed
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


def array_command(num_tasks: int) -> str:
    """The line of docs/cluster.md for so many tasks, a core each."""
    smaller = {"--array=1-20": f"--array=1-{num_tasks}", "--cpus-per-task=4": "--cpus-per-task=1"}
    return shown("cluster.md", "ingest_array.sbatch", {**smaller, "cells.zarr": "s.zarr"})


def leader(folder: Path, former: set[str], seconds: float = 120) -> int:
    """Wait until another task leads and work has begun; return its number."""
    deadline = time.monotonic() + seconds
    while True:
        with contextlib.suppress(FileNotFoundError):
            facts = json.loads((folder / "s.zarr.array" / "leader.json").read_text())
            begun = any((folder / "s.zarr.building" / "spool").iterdir())
            if begun and facts["address"] not in former:
                former.add(facts["address"])
                return int(facts["task"])
        assert time.monotonic() < deadline, "no task leads"
        time.sleep(0.05)


def kill_task(folder: Path, number: int) -> None:
    """Kill the process of an array's task in a folder, as a node without memory does."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            words = (process / "cmdline").read_bytes().split(b"\0")
            if (
                b"--array.task" in words
                and words[words.index(b"--array.task") + 1] == b"%d" % number
                and (process / "cwd").samefile(folder)
            ):
                os.kill(int(process.name), signal.SIGKILL)


def test_an_array_builds_the_same_store_though_leaders_are_lost(
    slurm: Slurm, tmp_path: Path
) -> None:
    genes = gene_names(400)
    cells = [random_cells(f"s{number}", number, 1200, genes) for number in range(6)]
    sizes = {"cells_per_slice": 50, "cells_per_partition": 200}
    raw = write_sources(tmp_path / "raw", cells)
    expected = build_store(store_config(raw, tmp_path / "here.zarr", **sizes))
    sizes |= {"min_genes": 1, "cells_per_shard": 16, "cells_per_chunk": 4}
    small = " ".join(f"--{name}={value}" for name, value in sizes.items())
    job = slurm.submit(f"{array_command(6)} {small}", tmp_path)
    former: set[str] = set()
    slurm.call("scontrol", "requeue", f"{job}_{leader(tmp_path, former)}")  # as preemption does
    kill_task(tmp_path, leader(tmp_path, former))
    deadline = time.monotonic() + 300
    while slurm.call("squeue", "--noheader").strip():
        assert time.monotonic() < deadline, slurm.call("squeue")
        time.sleep(0.5)
    said = {file.name: file.read_text() for file in tmp_path.glob("scbert-ingest-*.log")}
    assert len(said) == 6
    assert sum("store id" in text for text in said.values()) == 1, said
    assert all("store id" in t or "has worked for another" in t for t in said.values()), said
    assert any("requeued after exit code 137" in text for text in said.values()), said
    assert file_bytes(tmp_path / "s.zarr") == file_bytes(expected.path)
    assert not list(tmp_path.glob("s.zarr.*"))


def test_an_array_larger_than_the_sources_is_refused(slurm: Slurm, tmp_path: Path) -> None:
    write_sources(tmp_path / "raw", three_sources()[:1])
    job = slurm.submit(array_command(2), tmp_path)
    slurm.wait(f"{job}_1", {"FAILED"}, 60)
    slurm.wait(f"{job}_2", {"FAILED"}, 60)
    for log in tmp_path.glob("scbert-ingest-*.log"):
        assert "there is 1 source; submit with --array=1-1" in log.read_text()
        assert "not requeued" in log.read_text()
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == {"raw", "launchers"}
