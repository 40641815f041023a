"""Scanned sources come in a fixed order and share the names of their genes."""

import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datastore.config import PanelConfig
from datastore.scanning import scan_sources
from tests.support.cells import gene_names, random_cells, store_config, write_sources


def one_by_one(title: str, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
    return [task[0](*task[1:]) for task in tasks]


def test_sources_come_by_digest_and_each_name_is_kept_once(tmp_path: Path) -> None:
    """Memory for names must not grow with the number of sources that have the same."""
    genes = gene_names(20)
    cells = [
        random_cells("a", 0, 5, genes),
        random_cells("b", 1, 5, genes[::-1]),
        random_cells("c", 2, 5, genes),
        random_cells("d", 3, 5, genes[4:]),
    ]
    paths = write_sources(tmp_path, cells)
    orders = [
        scan_sources(store_config(listed, tmp_path / "s.zarr"), one_by_one)[0]
        for listed in (paths, paths[::-1])
    ]
    assert orders[0] == orders[1]
    assert [source.sha256 for source in orders[0]] == sorted(s.sha256 for s in orders[0])
    found = {source.name: source for source in orders[0]}
    assert {name: source.genes for name, source in found.items()} == {
        raw.name: raw.genes for raw in cells
    }
    assert found["a"].genes is found["c"].genes
    assert len({id(name) for source in found.values() for name in source.genes}) == 20


def test_what_goes_to_workers_and_back_is_short(tmp_path: Path) -> None:
    """Thousands of sources with long lists of genes would fill the process that leads."""
    genes = [f"GENE{place:05d}" for place in range(20_000)]
    (tmp_path / "panel.txt").write_text("\n".join(genes) + "\n")
    (path,) = write_sources(tmp_path, [random_cells("a", 0, 3, genes)])
    config = store_config(
        [path], tmp_path / "s.zarr", panel=PanelConfig(file=str(tmp_path / "panel.txt"))
    )
    sent: list[int] = []
    came: list[int] = []

    def noting(title: str, tasks: Sequence[tuple[Any, ...]]) -> list[Any]:
        sent.extend(len(pickle.dumps(task)) for task in tasks)
        results = one_by_one(title, tasks)
        came.extend(len(pickle.dumps(result)) for result in results)
        return results

    (source,), _ = scan_sources(config, noting)
    assert source.genes == tuple(genes)
    assert max(sent) < 2_000
    assert max(came) < 5 * len(genes)  # as they are, the names take 12 bytes each
