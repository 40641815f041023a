"""Tasks of an array build one store together; whichever of them are lost, it is the same store."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from datastore.array_ingest import ingest_in_array
from datastore.ingest import build_store
from datastore.worker_config import ArrayConfig
from tests.support.cells import (
    file_bytes,
    gene_names,
    random_cells,
    store_config,
    three_sources,
    write_sources,
)

ROOT = Path(__file__).resolve().parents[2]


class Array:
    """Processes as Slurm would start them for one array."""

    def __init__(self, folder: Path, tasks: int, *flags: str) -> None:
        self.folder, self.tasks = folder, tasks
        sizes: dict[str, object] = {
            "min_genes": 1,
            "cells_per_partition": 25,
            "cells_per_shard": 16,
        }
        sizes |= {"cells_per_shard": 16, "cells_per_chunk": 4, "cells_per_slice": 9}
        sizes |= {
            "workers": 1,
            "array.job": "77",
            "sources": "[raw]",
            "output": "s.zarr",
            "array.tasks": tasks,
        }
        self._flags = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
        self._flags += flags

    def start(self, task: int) -> subprocess.Popen[str]:
        launcher = str(ROOT / "launchers" / "build_store.py")
        return subprocess.Popen(
            [sys.executable, launcher, *self._flags, "--array.task", str(task)],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def leader(self, former: set[str], seconds: float = 60) -> int:
        """Wait until a new task leads and work has begun; return its number."""
        deadline = time.monotonic() + seconds
        while True:
            with contextlib.suppress(FileNotFoundError):
                facts = json.loads((self.folder / "s.zarr.array" / "leader.json").read_text())
                begun = any((self.folder / "s.zarr.building" / "spool").iterdir())
                if begun and facts["address"] not in former:
                    former.add(facts["address"])
                    return int(facts["task"])
            assert time.monotonic() < deadline, "no task leads"
            time.sleep(0.02)


def ended(processes: Sequence[subprocess.Popen[str]]) -> list[tuple[int, str]]:
    said = [process.communicate(timeout=240)[0] for process in processes]
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.multiprocess
def test_tasks_build_the_store_of_a_single_run(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "raw", three_sources())
    expected = build_store(store_config(sources, tmp_path / "alone.zarr"))
    array = Array(tmp_path, 3)
    first = ended([array.start(task) for task in (1, 2)])
    assert (tmp_path / "s.zarr.array").is_dir()  # the third may come at any time
    found = [*first, *ended([array.start(3)])]
    assert [code for code, _ in found] == [0, 0, 0], found
    assert sum("store id" in text for _, text in found) == 1
    assert sum("has worked for another" in text for _, text in found) == 2
    assert file_bytes(tmp_path / "s.zarr") == file_bytes(expected.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.zarr", "raw", "s.zarr"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_what_is_refused_is_refused_by_every_task(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "raw", three_sources())
    (tmp_path / "raw" / "cut.h5ad").write_bytes(Path(sources[0]).read_bytes()[:2000])
    array = Array(tmp_path, 2)
    found = ended([array.start(task) for task in (1, 2)])
    assert [code for code, _ in found] == [2, 2], found
    assert all("cut.h5ad" in text and "Traceback" not in text for _, text in found)
    assert sum("was refused: " in text for _, text in found) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["raw"]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_leaders_that_are_killed_leave_the_work_to_others(tmp_path: Path) -> None:
    genes = gene_names(400)
    cells = [random_cells(f"s{number}", number, 1200, genes) for number in range(4)]
    sources = write_sources(tmp_path / "raw", cells)
    sizes = {"cells_per_slice": 50, "cells_per_partition": 200}
    expected = build_store(store_config(sources, tmp_path / "alone.zarr", **sizes))
    array = Array(tmp_path, 4, *(f"--{name}={value}" for name, value in sizes.items()))
    running = {task: array.start(task) for task in range(1, 5)}
    former: set[str] = set()
    for _ in range(2):
        number = array.leader(former)
        os.killpg(running[number].pid, signal.SIGKILL)  # as Slurm does, with its workers
        ended([running[number]])
        running[number] = array.start(number)  # requeued
    found = ended(list(running.values()))
    assert [code for code, _ in found] == [0, 0, 0, 0], found
    assert sum("store id" in text for _, text in found) == 1
    assert file_bytes(tmp_path / "s.zarr") == file_bytes(expected.path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone.zarr", "raw", "s.zarr"]


def test_an_array_of_more_tasks_than_sources_is_refused(tmp_path: Path) -> None:
    sources = write_sources(tmp_path / "raw", three_sources())
    config = store_config(sources, tmp_path / "s.zarr", array=ArrayConfig(tasks=4, job="1"))
    with pytest.raises(ValueError, match=r"tasks is 4, but there are 3 sources; .* --array=1-3"):
        ingest_in_array(config, build_store)
    assert not list(tmp_path.glob("s.zarr*"))


@pytest.mark.parametrize(
    ("array", "settings", "message"),
    [
        pytest.param({"tasks": -1}, {}, "array.tasks is -1; give 0", id="negative"),
        pytest.param({"tasks": 2}, {}, "array.job is empty; give the number", id="no job"),
        pytest.param(
            {"tasks": 2, "job": "1"}, {"scheduler": "tcp://a:1"}, "leave scheduler", id="scheduler"
        ),
    ],
)
def test_unusable_settings_are_refused(
    tmp_path: Path, array: dict[str, object], settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        store_config(["a.h5ad"], tmp_path, array=ArrayConfig(**array), **settings)  # type: ignore[arg-type]
