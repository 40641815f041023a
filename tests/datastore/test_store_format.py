"""What docs/store_format.md says: its code runs word for word, and its list of files is true."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore.store import CellStore, open_store
from tests.support.cells import dense_store, file_bytes

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = (ROOT / "docs" / "store_format.md").read_text()
RESULT = ROOT / "benchmarks" / "results" / "panglao_rehearsal.json"
SNIPPETS = re.findall(r"```python\n(.*?)```", DOCUMENT, re.DOTALL)


@pytest.mark.parametrize("place", range(len(SNIPPETS)))
def test_code_of_the_page_runs(
    place: int, copied_store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = open_store(copied_store.path.rename(copied_store.path.with_name("cells.zarr")))
    monkeypatch.chdir(opened.path.parent)
    names: dict[str, Any] = {}
    exec(compile(SNIPPETS[place], f"snippet {place}", "exec"), names)
    np.testing.assert_array_equal(np.asarray(names["counts"]), dense_store(opened)[:10])


def test_files_of_the_page_are_those_of_a_store(store: CellStore) -> None:
    block = re.search(r"```\ncells\.zarr/\n(.*?)```", DOCUMENT, re.DOTALL)
    assert block is not None
    patterns = []
    for line in block[1].splitlines():
        name = line.split("  ")[0].strip()
        pattern = (
            re.escape(name).replace("<k>", r"\d+").replace("<g>", r"\d+").replace(r"\*\*", ".+")
        )
        patterns.append(pattern.replace("<column>", r"[^/]+"))
    for name in file_bytes(store.path):
        assert any(re.fullmatch(pattern, name) for pattern in patterns), name
    for pattern in patterns:
        assert any(re.fullmatch(pattern, name) for name in file_bytes(store.path)), pattern


def test_figures_of_the_page_are_those_of_the_benchmark() -> None:
    figures = json.loads(RESULT.read_text())["figures"]
    ingest, epoch, later = figures["ingest"], figures["epoch"], figures["at_100_million"]
    for row in (
        f"| sources | {figures['sources']} files, {len(figures['broken_files_named'])} broken ones "
        f"beside them, {figures['files']['bytes'] / 1e6:,.0f} MB |",
        f"| cells | {figures['cells']:,}, "
        f"{figures['expressed_panel_genes_per_cell']:,.0f} expressed panel genes each |",
        f"| ingest by two Dask workers | {ingest['seconds']:,.0f} s; at most "
        f"{ingest['worker_peak_mb']:,.0f} MB a worker, {ingest['peak_mb']:,.0f} MB in the process "
        "that leads |",
        f"| store | {figures['store_bytes'] / 1e6:,.0f} MB, {figures['bytes_per_cell']:,.0f} bytes "
        "a cell |",
        f"| open, and see that every file is there | {figures['open']['seconds']:.3f} s |",
        f"| verify | {figures['verify']['seconds']:.2f} s, from the page cache |",
        f"| append ten samples | {figures['append']['cells']:,} cells in "
        f"{figures['append']['seconds']:.0f} s |",
        f"| an epoch, counts, two ranks | {epoch['cells_per_second']:,.0f} cells/s, "
        f"{epoch['cells_per_cpu_second']:,.0f} per CPU-second; first batch after "
        f"{epoch['first_batch_seconds']:.2f} s; {epoch['rank_peak_mb']:,.0f} MB a rank |",
        f"| ingest | {later['ingest_hours']:.1f} h for {later['files']:,.0f} files |",
        f"| memory of the process that leads | {later['coordinator_gigabytes']:.0f} GB |",
        f"| store size | {later['store_gigabytes']:.0f} GB |",
        f"| reading an epoch, if the disk keeps up | {later['epoch_hours_of_two_ranks']:.2f} h |",
        f"| memory of a worker at these sizes | "
        f"{figures['ingest_of_whole_sizes']['worker_peak_mb']:,.0f} MB |",
    ):
        assert row in DOCUMENT, row
