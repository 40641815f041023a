"""The report of what became of every gene name, and what a store built with tables keeps."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from datastore import write_pass
from datastore.config import PanelConfig
from datastore.gene_tables import GeneTables
from datastore.genes import GenePanel, match_genes
from datastore.harmonize import species_of, translate, write_report
from datastore.ingest import build_store
from datastore.store import CellStore, StoreFormatError, open_store
from datastore.verification import verify_store
from tests.support.cells import (
    RawCells,
    random_counts,
    store_config,
    stored_parts,
    write_sources,
)
from tests.support.genes import (
    HGNC,
    genes_by_hand,
    small_tables,
    write_ensembl,
    write_hgnc,
    write_orthologues,
)


@pytest.fixture(scope="module")
def hgnc(tmp_path_factory: pytest.TempPathFactory) -> GeneTables:
    return small_tables(tmp_path_factory.mktemp("hgnc"), "hgnc")


def test_what_is_left_out_is_said_with_the_reason(hgnc: GeneTables) -> None:
    names = ["QARS", "LCA10", "CEP290", "SHARED", "CD20", "NOVEL"]
    translation = translate(names, "pbmc", hgnc)
    assert translation.genes == (None, None, "CEP290", None, "MS4A1", "NOVEL")
    assert dict(translation.ambiguous) == {
        0: "QARS -> EPRS1 or QARS1",
        1: "LCA10 -> CEP290, which has a column of its own",
        3: "SHARED -> ONE or TWO",
    }


@pytest.mark.parametrize(
    ("names", "species"),
    [
        pytest.param(["CD3E", "C1orf112", "RP11-34P13.7", "HLA-A"], "human", id="human symbols"),
        pytest.param(["Cd3e", "Gm1992", "H2-K1", "1700001C02Rik", "mt-Nd1"], "mouse", id="mouse"),
        pytest.param(["ENSG00000198851.4", "ERCC-00002"], "human", id="human ids"),
        pytest.param(["ENSMUSG00000032093", "GFP"], "mouse", id="an id says more than case"),
        pytest.param(["ENSDARG00000000001", "ENSDARG00000000002"], None, id="zebrafish ids"),
        pytest.param(["mm10___Cd3e", "mm10___Lyz2"], "mouse", id="genome in front"),
        pytest.param([], None, id="nothing"),
    ],
)
def test_species_are_told_apart(names: list[str], species: str | None) -> None:
    assert species_of(names, "pbmc") == species


def test_a_few_stray_genes_do_not_mix_a_source() -> None:
    strays = [f"ENSMUSG{number:011d}" for number in range(20)]
    names = [f"ENSG{number:011d}" for number in range(80)]
    assert species_of(names + strays, "pbmc") == "human"
    with pytest.raises(ValueError, match="80 genes are human, 21 mouse"):
        species_of([*names, *strays, "ENSMUSG00000000099"], "pbmc")


def test_the_report_accounts_for_every_name(tmp_path: Path, hgnc: GeneTables) -> None:
    names = ["CD20", "AARS1", "AARS", "QARS", "LYZ", *(f"LOC{number}" for number in range(25))]
    panel = GenePanel(("LYZ", "MS4A1", "AARS1", "CD3E"))
    _, line = match_genes(names, panel, "pbmc", 0.3, hgnc)
    write_report(tmp_path, [line, replace(line, source="again")], [0.75, 1.0], hgnc)
    report = json.loads((tmp_path / "harmonization.json").read_text())
    assert report["tables"] == dict(hgnc.digests)
    assert report["sources"][0] == {
        "source": "pbmc",
        "species": "human",
        "genes_in_source": 30,
        "panel_genes": 4,
        "panel_genes_found": 3,
        "share_found": 0.75,
        "share_of_counts_kept": 0.75,
        "renamed": {"count": 2, "first": ["CD20 -> MS4A1", "AARS -> AARS1"]},
        "summed": {"count": 1, "first": ["AARS -> AARS1"]},
        "dropped": {"count": 25, "first": [f"LOC{number}" for number in range(20)]},
        "ambiguous": {"count": 1, "first": ["QARS -> EPRS1 or QARS1"]},
    }
    table = (tmp_path / "harmonization.txt").read_text().splitlines()
    assert table[1].split() == ["pbmc", "30", "75.0%", "75.0%", "2", "1", "25", "1"]
    assert table[2].split() == ["again", "30", "75.0%", "100.0%", "2", "1", "25", "1"]
    assert "pbmc, summed: AARS -> AARS1" in table
    assert any(row.startswith("pbmc, dropped: LOC0, ") and row.endswith(", …") for row in table)


# --- in a store ---

SOURCES = [
    RawCells("old", random_counts(1, 20, 5, 0.8), ("CD20", "QARS", "AARS", "LYZ", "AARS1")),
    RawCells(
        "ids",
        random_counts(2, 20, 4, 0.8),
        ("ENSG00000090382.9", "ENSG00000282222", "ENSG00000156738.1", "ENSG00000198851"),
    ),
    RawCells("spleen", random_counts(3, 20, 3, 0.9), ("Cd3e", "Lyzl1", "Ms4a1")),
]
MEANING: dict[str, list[str | None]] = {
    "old": ["MS4A1", None, "AARS1", "LYZ", "AARS1"],
    "ids": ["LYZ", "AC073488.4", "MS4A1", "CD3E"],
    "spleen": ["CD3E", None, "MS4A1"],
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], PanelConfig]:
    """The sources, and a panel with all three tables."""
    folder = tmp_path_factory.mktemp("files")
    config = PanelConfig(
        hgnc=write_hgnc(folder / "hgnc.txt"),
        ensembl=write_ensembl(folder / "ids.tsv"),
        orthologues=write_orthologues(folder / "orthologues.csv"),
    )
    return write_sources(folder / "raw", SOURCES), config


def build(files: tuple[list[str], PanelConfig], folder: Path, **panel: Any) -> CellStore:
    config = replace(files[1], **panel)
    sizes = {"cells_per_slice": 15, "cells_per_partition": 40}
    return build_store(store_config(files[0], folder / "s.zarr", panel=config, **sizes))


@pytest.mark.parametrize(
    ("share", "genes"),
    [
        pytest.param(0.0, {"MS4A1", "AARS1", "LYZ", "CD3E", "AC073488.4"}, id="union"),
        pytest.param(0.6, {"MS4A1", "LYZ", "CD3E"}, id="two of three"),
        pytest.param(1.0, {"MS4A1"}, id="intersection"),
    ],
)
def test_a_store_of_three_naming_habits_equals_a_loop(
    files: tuple[list[str], PanelConfig], tmp_path: Path, share: float, genes: set[str]
) -> None:
    built = build(files, tmp_path, min_source_share=share)
    assert set(built.panel.names) == genes
    assert verify_store(built.path) == []
    manifest = json.loads((built.path / "manifest.json").read_text())
    folder = "records/generation_0"
    names = {f"{folder}/{name}" for name in ("harmonization.json", "harmonization.txt")}
    assert names | {f"{folder}/measured.npy"} <= manifest["files"].keys()
    report = json.loads((built.path / folder / "harmonization.json").read_text())
    shares = {line["source"]: line["share_of_counts_kept"] for line in report["sources"]}
    stored = {
        (source, int(row)): counts
        for part in stored_parts(built)
        for source, row, counts in zip(
            part.obs["source"], part.obs["source_row"], part.X.toarray(), strict=True
        )
    }
    for raw in SOURCES:
        by_hand = np.zeros((len(raw.counts), len(built.panel)), np.int64)
        for column, gene in enumerate(MEANING[raw.name]):
            if gene in genes:
                by_hand[:, built.panel.positions[str(gene)]] += raw.counts[:, column]
        assert shares[raw.name] == by_hand.sum() / raw.counts.sum()
        measured = [gene in MEANING[raw.name] for gene in built.panel.names]
        assert built.measured(raw.name).tolist() == measured
        for row, counts in enumerate(by_hand):
            if counts.any():
                np.testing.assert_array_equal(stored.pop((raw.name, row)), counts)
    assert not stored


def test_meanings_by_hand_agree_with_the_rows() -> None:
    for name, gene in zip(SOURCES[0].genes, MEANING["old"], strict=True):
        assert genes_by_hand(name) == {gene} or (gene is None and len(genes_by_hand(name)) > 1)


def test_a_ranked_panel_counts_translated_genes(
    files: tuple[list[str], PanelConfig], tmp_path: Path
) -> None:
    built = build(files, tmp_path, size=2, rank_by="detection", min_share_found=0.0)
    detected = {
        gene: sum(
            (raw.counts[:, [meant == gene for meant in MEANING[raw.name]]] > 0).any(axis=1).sum()
            for raw in SOURCES
        )
        for gene in ("MS4A1", "AARS1", "LYZ", "CD3E", "AC073488.4")
    }
    ranked = sorted(detected, key=lambda gene: -detected[gene])
    assert detected[ranked[1]] > detected[ranked[2]]  # no tie at the edge
    assert set(built.panel.names) == set(ranked[:2])


def test_a_changed_table_begins_the_ingest_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sources = write_sources(tmp_path / "raw", SOURCES[:1])
    panel = PanelConfig(hgnc=write_hgnc(tmp_path / "hgnc.txt"))
    config = store_config(sources, tmp_path / "s.zarr", panel=panel)

    def full_disk(*_: Any) -> None:
        raise OSError("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(write_pass, "stream_partition", full_disk)
        with pytest.raises(OSError, match="the disk is full"):
            build_store(config)
    write_hgnc(tmp_path / "hgnc.txt", [row for row in HGNC if row[0] != "EPRS1"])
    assert set(build_store(config).panel.names) == {"MS4A1", "QARS1", "AARS1", "LYZ"}


def test_a_gene_not_measured_is_told_from_zero(store: CellStore) -> None:
    assert store.measured("beta").sum() == 31
    assert not store.measured("alpha")[store.panel.positions["ONLY_BETA"]]
    assert store.measured("alpha").dtype == np.bool_
    assert store.measured("alpha").shape == (len(store.panel),)
    with pytest.raises(ValueError, match=r"no source 'delta'; it has .*alpha"):
        store.measured("delta")


def test_a_store_without_measured_genes_says_so(copied_store: CellStore) -> None:
    opened = open_store(copied_store.path)
    (copied_store.path / "records/generation_0/measured.npy").unlink()
    with pytest.raises(StoreFormatError, match=r"measured\.npy is missing"):
        opened.measured("alpha")
