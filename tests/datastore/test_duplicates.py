"""Cells that occur twice are found, whatever source, slice or worker they come from."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore import duplicates
from datastore.append import append_store
from datastore.config import PanelConfig
from datastore.ingest import build_store
from datastore.store import CellStore, generation_folder
from tests.support.cells import (
    RawCells,
    Stop,
    align_by_hand,
    file_bytes,
    gene_names,
    random_cells,
    store_config,
    stored_cells,
    write_sources,
)


def overlapping() -> list[RawCells]:
    """Three sources of other gene orders that share cells, and repeat some of their own."""
    genes = gene_names(12)
    first = random_cells("a", 1, 30, genes)
    second = random_cells("b", 2, 25, genes[::-1])
    third = random_cells("c", 3, 20, genes[3:] + genes[:3])
    second.counts[4:10] = first.counts[20:26, ::-1]
    third.counts[0:2] = np.roll(first.counts[20:22], -3, axis=1)
    third.counts[5:9] = np.roll(second.counts[0:4, ::-1], -3, axis=1)
    third.counts[19] = third.counts[18]
    first.counts[7] = first.counts[3]
    return [first, second, third]


CELLS = overlapping()


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sources(tmp_path_factory.mktemp("raw"), CELLS)


def by_dictionary(built: CellStore) -> tuple[dict[tuple[str, str], int], set[tuple[str, int]]]:
    """Pairs of sources and the cells they share, and all cells but the first of each kind."""
    raw = {cells.name: cells for cells in CELLS}
    first_of: dict[bytes, str] = {}
    pairs: dict[tuple[str, str], int] = {}
    repeated = set()
    for line in built.header.sources:  # in the store's order of sources
        name = line["name"]
        for row, counts in enumerate(align_by_hand(raw[name], built.panel.names)):
            content = counts.tobytes()
            if content in first_of:
                pair = name, first_of[content]
                pairs[pair] = pairs.get(pair, 0) + 1
                repeated.add((name, row))
            else:
                first_of[content] = name
    return pairs, repeated


@pytest.mark.parametrize("cells_at_once", [2**22, 20])
@pytest.mark.parametrize("workers", [1, 2])
def test_shared_cells_are_reported_and_kept(
    tmp_path: Path,
    sources: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cells_at_once: int,
    workers: int,
) -> None:
    monkeypatch.setattr(duplicates, "_CELLS_AT_ONCE", cells_at_once)
    with caplog.at_level(logging.WARNING, "datastore"):
        built = build_store(store_config(sources, tmp_path / "s.zarr", workers=workers))
    pairs, repeated = by_dictionary(built)
    assert sum(pairs.values()) == len(repeated) >= 14
    assert built.num_cells == 75
    folder = generation_folder(built.path, 0)
    report = json.loads((folder / "harmonization.json").read_text())
    assert {(s["source"], s["first"]): s["cells"] for s in report["shared_cells"]} == pairs
    text = (folder / "harmonization.txt").read_text()
    for (source, first), cells in pairs.items():
        whose = "the same source" if source == first else first
        assert f"{source}: {cells} cells have the counts of cells of {whose}" in text
        assert (
            f"{cells} cells of {source} have the counts of earlier cells of {first}" in caplog.text
        )
    assert "--duplicates drop leaves them out" in caplog.text
    for line in built.header.sources:
        assert line["cells_repeated"] == sum(name == line["name"] for name, _ in repeated)


@pytest.mark.parametrize("changes", [{}, {"cells_per_slice": 3, "cells_per_partition": 7}])
def test_all_but_the_first_are_dropped_when_asked(
    tmp_path: Path, sources: list[str], changes: dict[str, Any]
) -> None:
    config = store_config(sources, tmp_path / "s.zarr", duplicates="drop", **changes)
    built = build_store(config)
    _, repeated = by_dictionary(built)
    every = {(cells.name, row) for cells in CELLS for row in range(len(cells.counts))}
    found = stored_cells(built)
    assert found.keys() == every - repeated
    contents = [counts.tobytes() for counts in found.values()]
    assert len(set(contents)) == len(contents) == built.num_cells
    assert sum(line["cells_kept"] for line in built.header.sources) == built.num_cells


@pytest.fixture
def grown_from(tmp_path: Path, sources: list[str]) -> CellStore:
    """A store of the first of the sources, two of whose cells are the same."""
    (tmp_path / "panel.txt").write_text("\n".join(gene_names(12)))
    panel = PanelConfig(file=str(tmp_path / "panel.txt"))
    return build_store(store_config(sources[:1], tmp_path / "s.zarr", panel=panel))


@pytest.mark.parametrize("cells_at_once", [2**22, 20])
def test_an_append_knows_the_cells_of_the_store(
    sources: list[str],
    grown_from: CellStore,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    cells_at_once: int,
) -> None:
    monkeypatch.setattr(duplicates, "_CELLS_AT_ONCE", cells_at_once)
    assert grown_from.header.sources[0]["cells_repeated"] == 1
    with caplog.at_level(logging.WARNING, "datastore"):
        grown = append_store(store_config(sources[1:], grown_from.path, append=True))
    pairs, repeated = by_dictionary(grown)
    del pairs["a", "a"]  # what the store repeats itself is no news
    report = json.loads((generation_folder(grown.path, 1) / "harmonization.json").read_text())
    assert {(s["source"], s["first"]): s["cells"] for s in report["shared_cells"]} == pairs
    assert {first for _, first in pairs} >= {"a", "b"}
    for line in grown.header.sources:
        assert line["cells_repeated"] == sum(name == line["name"] for name, _ in repeated)
    assert grown.num_cells == 75
    assert "have the counts of earlier cells of a: kept" in caplog.text


def test_an_append_drops_what_the_store_has(
    sources: list[str], grown_from: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = store_config(sources[1:], grown_from.path, append=True, duplicates="drop", workers=1)
    with monkeypatch.context() as patch:
        Stop(patch, duplicates, "_find_in_range").at = 1
        with pytest.raises(OSError, match="the disk is full"):
            append_store(config)
    read = Stop(monkeypatch, duplicates, "open_store")
    grown = append_store(config)
    assert read.calls == 0  # the hashes of the store's cells are among the work that was kept
    _, repeated = by_dictionary(grown)
    every = {(cells.name, row) for cells in CELLS for row in range(len(cells.counts))}
    in_store = {(name, row) for name, row in repeated if name == "a"}
    assert stored_cells(grown).keys() == every - (repeated - in_store)


def test_nothing_is_looked_for_when_all_are_kept(tmp_path: Path, sources: list[str]) -> None:
    kept = build_store(store_config(sources, tmp_path / "k.zarr", duplicates="keep"))
    assert all(line["cells_repeated"] == 0 for line in kept.header.sources)
    reported = build_store(store_config(sources, tmp_path / "r.zarr"))
    name = "dataset_0/X/data/c/0"
    assert file_bytes(kept.path)[name] == file_bytes(reported.path)[name]


def test_empty_and_poor_cells_are_counted(tmp_path: Path) -> None:
    cells = random_cells("a", 5, 40, gene_names(12))
    cells.counts[[3, 8, 39]] = 0
    cells.counts[5, 1:] = 0
    cells.counts[5, 0] = 1
    sources = write_sources(tmp_path, [cells])
    built = build_store(store_config(sources, tmp_path / "s.zarr", min_genes=4))
    expressed = (cells.counts > 0).sum(axis=1)
    line = built.header.sources[0]
    assert line["cells_empty"] == (expressed == 0).sum() >= 3
    assert line["cells_poor"] == ((expressed > 0) & (expressed < 4)).sum() >= 1
    assert line["cells_kept"] == (expressed >= 4).sum() == built.num_cells
    report = json.loads((generation_folder(built.path, 0) / "harmonization.json").read_text())
    entry = report["sources"][0]
    assert (entry["empty_cells"], entry["poor_cells"]) == (line["cells_empty"], line["cells_poor"])


def test_cells_equal_on_the_panel_only_count_as_equal(tmp_path: Path) -> None:
    """What the store does not keep cannot tell two cells apart."""
    cells = random_cells("a", 5, 2, gene_names(12))
    cells.counts[0] = cells.counts[1]
    cells.counts[0, 11] += 1
    sources = write_sources(tmp_path, [cells])
    (tmp_path / "panel.txt").write_text("\n".join(gene_names(11)))
    panel = PanelConfig(file=str(tmp_path / "panel.txt"))
    config = store_config(sources, tmp_path / "s.zarr", panel=panel, duplicates="drop")
    assert build_store(config).num_cells == 1


def test_a_gene_that_one_source_lacks_matters_only_to_cells_that_express_it(tmp_path: Path) -> None:
    """The hash is over counts above zero, so a gene not measured is like one not expressed."""
    genes = gene_names(12)
    whole = random_cells("a", 6, 2, genes)
    whole.counts[0, 11], whole.counts[1, 11] = 0, 3
    fewer = random_cells("b", 7, 2, genes[:11])
    fewer.counts[:] = whole.counts[:, :11]
    (tmp_path / "panel.txt").write_text("\n".join(genes))
    panel = PanelConfig(file=str(tmp_path / "panel.txt"))
    sources = write_sources(tmp_path, [whole, fewer])
    config = store_config(sources, tmp_path / "s.zarr", panel=panel, duplicates="drop")
    assert build_store(config).num_cells == 3
