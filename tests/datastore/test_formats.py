"""Every format gives the same counts as the dense matrix it was written from, in any slices."""

import bz2
import gzip
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import h5py
import numpy as np
import pytest
from scipy import sparse

from datastore import stored_arrays
from datastore.formats import FORMATS, r_gene_symbol
from datastore.manifest import ListedSource
from datastore.raw_cells import ReadOptions
from datastore.recognition import recognise
from datastore.sources import Source, open_source, scan_listed, scan_source
from datastore.text_tables import Orientation
from tests.support.cells import RawCells, random_cells, write_h5ad
from tests.support.raw_files import (
    adata_of,
    cell_names,
    r_integers,
    r_matrix,
    r_strings,
    write_10x_h5,
    write_10x_mtx,
    write_loom,
    write_r_objects,
    write_rdata,
    write_table,
    write_zarr,
)

GENES = [
    "ACTB",
    "MT-ND1",
    "CD3D",
    "GNLY",
    "HLA-DRA",
    "NKX2-1",
    "AC1.2",
    "PPBP",
    "IL7R",
    "LYZ",
    "B2M",
]
RAW = random_cells("pbmc", 5, 23, GENES)
RAW.counts[4] = 0  # a cell without counts
RAW.counts[:, 3] = 0  # a gene without


def dense(source: Source, step: int = 1000) -> np.ndarray:
    with open_source(source) as cells:
        starts = range(0, source.num_cells, step)
        parts = [cells.counts(a, min(a + step, source.num_cells)).toarray() for a in starts]
    return np.concatenate(parts)


def with_raw(folder: Path) -> Path:
    adata = adata_of(RAW)
    adata.raw = adata
    adata = adata[:, 2:5].copy()
    adata.X = np.log1p(adata.X.toarray())
    adata.write_h5ad(folder / "pbmc.h5ad")
    return folder / "pbmc.h5ad"


# name → (format, decoded whole, how to write it)
FILES: dict[str, tuple[str, bool, Callable[[Path], Path]]] = {
    "h5ad CSR": ("h5ad", False, lambda f: write_h5ad(f, RAW)),
    "h5ad CSC": ("h5ad", True, lambda f: write_h5ad(f, RAW, sparse.csc_matrix(RAW.counts))),
    "h5ad dense": ("h5ad", False, lambda f: write_h5ad(f, RAW, RAW.counts.astype(np.float32))),
    "zarr CSR": ("zarr", False, lambda f: write_zarr(f / "pbmc.zarr", adata_of(RAW))),
    "zarr CSC": (
        "zarr",
        True,
        lambda f: write_zarr(f / "pbmc.zarr", adata_of(RAW, sparse.csc_matrix(RAW.counts))),
    ),
    "zarr dense": (
        "zarr",
        False,
        lambda f: write_zarr(f / "pbmc.zarr", adata_of(RAW, RAW.counts), 2),
    ),
    "10x h5 v2": ("10x h5", False, lambda f: write_10x_h5(f / "pbmc.h5", RAW, 2)),
    "10x h5 v3": ("10x h5", False, lambda f: write_10x_h5(f / "pbmc.h5", RAW, 3)),
    "10x h5 v3, antibodies": ("10x h5", False, lambda f: write_10x_h5(f / "pbmc.h5", RAW, 3, 2)),
    "10x mtx v2": ("10x mtx", True, lambda f: write_10x_mtx(f / "pbmc", RAW, 2)),
    "10x mtx v3": ("10x mtx", True, lambda f: write_10x_mtx(f / "pbmc", RAW, 3)),
    "10x mtx v3, antibodies": ("10x mtx", True, lambda f: write_10x_mtx(f / "pbmc", RAW, 3, 2)),
    "loom": ("loom", False, lambda f: write_loom(f / "pbmc.loom", RAW)),
    "RData gzip": ("rdata", True, lambda f: write_rdata(f / "pbmc.sparse.RData", RAW)),
    "RData bzip2": ("rdata", True, lambda f: write_rdata(f / "pbmc.rda", RAW, bz2.compress)),
    "RData xz": ("rdata", True, lambda f: write_rdata(f / "pbmc.RData", RAW, lzma.compress)),
    "RData plain": ("rdata", True, lambda f: write_rdata(f / "pbmc.RData", RAW, bytes)),
    "csv of genes": ("table", True, lambda f: write_table(f / "pbmc.csv", RAW, True)),
    "csv of cells": ("table", True, lambda f: write_table(f / "pbmc.csv", RAW, False)),
    "tsv.gz of genes": ("table", True, lambda f: write_table(f / "pbmc.tsv.gz", RAW, True)),
    "csv as R writes it": ("table", True, lambda f: write_table(f / "pbmc.csv", RAW, True, None)),
    "10x named .h5ad": ("10x h5", False, lambda f: write_10x_h5(f / "pbmc.h5ad", RAW, 3)),
}


@pytest.mark.parametrize("name", FILES)
def test_every_format_is_the_dense_matrix(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, whole, write = FILES[name]
    path = write(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    source = scan_source(path, None)
    assert (recognise(path), source.format, source.whole) == (kind, kind, whole)
    assert (source.name, source.num_cells, source.genes) == ("pbmc", 23, tuple(GENES))
    monkeypatch.setattr(stored_arrays, "_VALUES_AT_ONCE", 60)  # dense files in several steps
    for step in (1, 7, 23):
        np.testing.assert_array_equal(dense(source, step), RAW.counts)
    with open_source(source) as cells:
        assert cells.cell_names(5, 9).tolist() == [f"pbmc/{name}" for name in cell_names(RAW)[5:9]]
    assert sorted(tmp_path.rglob("*")) == before  # nothing is written beside a source


def test_every_format_has_a_round_trip() -> None:
    assert {kind for kind, _, _ in FILES.values()} == set(FORMATS)


def test_raw_has_genes_of_its_own(tmp_path: Path) -> None:
    path = with_raw(tmp_path)
    assert scan_source(path, None).genes == tuple(GENES[2:5])
    source = scan_source(path, "raw")
    assert source.genes == tuple(GENES)
    np.testing.assert_array_equal(dense(source, 7), RAW.counts)
    with pytest.raises(ValueError, match=r"no layer 'counts'; it has none \(and raw\)"):
        scan_source(path, "counts")


def test_a_layer_of_a_loom_is_read(tmp_path: Path) -> None:
    path = write_loom(tmp_path / "a.loom", RAW)
    np.testing.assert_array_equal(dense(scan_source(path, "spliced")), RAW.counts + 1)
    with pytest.raises(ValueError, match=r"a\.loom has no layer 'x'; it has \['spliced'\]"):
        scan_source(path, "x")


@pytest.mark.parametrize("suffix", ["h5ad", "zarr"])
def test_obs_columns_are_carried_as_text(tmp_path: Path, suffix: str) -> None:
    adata = adata_of(RAW)
    adata.obs["cell_type"] = np.resize(["T", "B", "NK"], 23)
    adata.obs["donor"] = np.arange(23) % 4
    adata.obs["stage"] = [None, *["late"] * 22]
    adata.obs["stage"] = adata.obs["stage"].astype("category")
    path = tmp_path / f"a.{suffix}"
    adata.write_h5ad(path) if suffix == "h5ad" else write_zarr(path, adata)
    options = ReadOptions(obs_columns=("stage", "donor", "absent", "cell_type"))
    source = scan_listed(ListedSource(path), options)
    assert source.options.obs_columns == ("stage", "donor", "cell_type")
    with open_source(source) as cells:
        obs = cells.obs(0, 5)
    assert {name: values.tolist() for name, values in obs.items()} == {
        "stage": [None, "late", "late", "late", "late"],
        "donor": ["0", "1", "2", "3", "0"],
        "cell_type": ["T", "B", "NK", "T", "B"],
    }


@pytest.mark.parametrize(
    ("name", "symbol"),
    [
        ("TSPAN6_ENSG00000000003.14", "TSPAN6"),
        ("NKX2-1-ENSG00000136352", "NKX2-1"),
        ("mt-Nd1_ENSMUSG00000064341.1", "mt-Nd1"),
        ("RP11-34P13.7_ENSG00000238009.6", "RP11-34P13.7"),
        ("ENSG00000000003.14", "ENSG00000000003.14"),
        ("CD3D", "CD3D"),
        ("MY-ENSEMBLE", "MY-ENSEMBLE"),
    ],
)
def test_symbols_of_panglao_rows(name: str, symbol: str) -> None:
    assert r_gene_symbol(name) == symbol


# --- tables ---


@pytest.mark.parametrize("genes_in_rows", [True, False])
def test_a_table_is_turned_by_known_genes_or_by_word(tmp_path: Path, genes_in_rows: bool) -> None:
    raw = RawCells("odd", RAW.counts[:, :3], ("Q1", "Q2", "Q3"))
    path = write_table(tmp_path / "odd.csv", raw, genes_in_rows, corner="name")
    with pytest.raises(ValueError, match=r"odd\.csv: neither of rows .* --orientation genes_x"):
        scan_source(path, None)
    word: Orientation = "genes_x_cells" if genes_in_rows else "cells_x_genes"
    for options in (ReadOptions(orientation=word), ReadOptions(known_genes=frozenset({"Q2"}))):
        source = scan_listed(ListedSource(path), options)
        assert (source.genes, source.options.orientation) == (raw.genes, word)
        np.testing.assert_array_equal(dense(source), raw.counts)


def test_a_table_of_genes_against_genes_is_ambiguous(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text(",ACTB,B2M\nVIM,1,2\nRPL3,3,4\n")
    with pytest.raises(ValueError, match=r"both of rows \('VIM', ...\) and columns \('ACTB'"):
        scan_source(tmp_path / "a.csv", None)


# --- refusals ---


def text(content: str, name: str = "a.csv") -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        (folder / name).write_bytes(content.encode())
        return folder / name

    return write


def cut(write: Callable[[Path], Path], share: float = 0.6) -> Callable[[Path], Path]:
    def write_part(folder: Path) -> Path:
        path = write(folder)
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * share)])
        return path

    return write_part


def without(name: str) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_10x_mtx(folder / "pbmc", RAW, 3)
        (path / name).unlink()
        return path

    return write


def one_barcode_less(folder: Path) -> Path:
    path = write_10x_mtx(folder / "pbmc", RAW, 2)
    lines = (path / "barcodes.tsv").read_text().splitlines(keepends=True)
    (path / "barcodes.tsv").write_text("".join(lines[:-1]))
    return path


def cut_matrix(folder: Path) -> Path:
    path = write_10x_mtx(folder / "pbmc", RAW, 3)
    matrix = path / "matrix.mtx.gz"
    matrix.write_bytes(matrix.read_bytes()[:-40])
    return path


def two_genomes(folder: Path) -> Path:
    path = write_10x_h5(folder / "pbmc.h5", RAW, 2)
    with h5py.File(path, "r+") as file:
        file.copy("GRCh38", "mm10")
    return path


def nameless_loom(folder: Path) -> Path:
    path = write_loom(folder / "pbmc.loom", RAW)
    with h5py.File(path, "r+") as file:
        file.move("row_attrs/Gene", "row_attrs/Thing")
    return path


def r_without_sm(folder: Path) -> Path:
    objects = {"seurat": r_strings(["a"]), "genes": r_strings(["b"])}
    return write_r_objects(folder / "pbmc.RData", objects)


def r_other_class(folder: Path) -> Path:
    return write_r_objects(folder / "pbmc.RData", {"sm": r_integers(np.arange(3))})


def r_outside(folder: Path) -> Path:
    matrix = sparse.csc_matrix(RAW.counts.T)
    matrix.indices[0] = 5000
    sm = r_matrix(matrix, GENES, cell_names(RAW))
    return write_r_objects(folder / "pbmc.RData", {"sm": sm})


def zarr_of_something(folder: Path) -> Path:
    path = write_zarr(folder / "pbmc.zarr", adata_of(RAW))
    for file in (path / "obs").rglob("*"):
        if file.is_file():
            file.unlink()
    (path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group"}')
    return path


def r_short_names(folder: Path) -> Path:
    sm = r_matrix(sparse.csc_matrix(RAW.counts.T), GENES[:-2], cell_names(RAW))
    return write_r_objects(folder / "pbmc.RData", {"sm": sm})


def huge_mtx(folder: Path) -> Path:
    path = write_10x_mtx(folder / "pbmc", RAW, 2)
    kind = "%%MatrixMarket matrix coordinate integer general"
    (path / "matrix.mtx").write_text(f"{kind}\n11 23 999999999999999\n1 1 1\n")
    return path


def zarr_without(name: str, version: Literal[2, 3] = 3) -> Callable[[Path], Path]:
    def write(folder: Path) -> Path:
        path = write_zarr(folder / "pbmc.zarr", adata_of(RAW), version)
        (path / name).unlink()
        return path

    return write


def cut_zarr_chunk(folder: Path) -> Path:
    path = write_zarr(folder / "pbmc.zarr", adata_of(RAW))
    chunk = path / "var" / "_index" / "c" / "0"
    chunk.write_bytes(chunk.read_bytes()[:9])
    return path


def damaged_zarr(folder: Path) -> Path:
    path = write_zarr(folder / "pbmc.zarr", adata_of(RAW))
    (path / "zarr.json").write_text("{")
    return path


@pytest.mark.parametrize(
    ("write", "message"),
    [
        pytest.param(text(""), "is empty; fetch it again", id="empty"),
        pytest.param(text("a,b\n1,2\n", "a.h5ad"), "another kind .* rename a table", id="text"),
        pytest.param(text("<!DOCTYPE html>", "a.h5ad"), "web page, .* fetch it again", id="page"),
        pytest.param(text("PK\x03\x04", "a.h5ad"), "is an archive: unpack it", id="archive"),
        pytest.param(text("X\n\0\0\0\2", "a.rds"), r"is an \.rds file; in R: sm <-", id="rds"),
        pytest.param(text("%%MatrixMarket m", "m.mtx"), "name the 10x folder", id="matrix alone"),
        pytest.param(cut(lambda f: write_10x_h5(f / "a.h5", RAW, 3)), "cut short", id="cut 10x"),
        pytest.param(cut(lambda f: write_loom(f / "a.loom", RAW)), "cut short", id="cut loom"),
        pytest.param(cut(lambda f: write_rdata(f / "a.RData", RAW)), "cut short", id="cut RData"),
        pytest.param(
            cut(lambda f: write_rdata(f / "a.RData", RAW, bytes)), "cut short", id="cut plain RData"
        ),
        pytest.param(
            cut(lambda f: write_rdata(f / "a.RData", RAW, lzma.compress)),
            "cut short",
            id="cut xz RData",
        ),
        pytest.param(
            cut(lambda f: write_table(f / "a.csv.gz", RAW, True)), "cut short", id="cut csv.gz"
        ),
        pytest.param(
            cut(lambda f: write_table(f / "a.csv", RAW, True), 0.99), "line 12 has", id="cut csv"
        ),
        pytest.param(r_without_sm, "holds no R object sm but seurat, genes; in R", id="no sm"),
        pytest.param(r_other_class, "sm is not a dgCMatrix; in R", id="other class"),
        pytest.param(r_outside, "is damaged: .*; fetch it again", id="RData indices"),
        pytest.param(
            without("barcodes.tsv.gz"), "without barcodes.tsv .*half-copied", id="no cells"
        ),
        pytest.param(
            without("features.tsv.gz"), "without features.tsv or genes.tsv", id="no genes"
        ),
        pytest.param(without("matrix.mtx.gz"), "without matrix.mtx .*half-copied", id="no matrix"),
        pytest.param(
            one_barcode_less, "23 cells, but .* barcodes.tsv 22 cells; copy", id="22 names"
        ),
        pytest.param(cut_matrix, "pbmc is damaged or half-copied", id="cut matrix"),
        pytest.param(two_genomes, r"several genomes \(GRCh38, mm10\); split", id="two genomes"),
        pytest.param(
            nameless_loom, r"names no genes: row_attrs has \['Thing'\]", id="nameless loom"
        ),
        pytest.param(zarr_of_something, "Zarr folder but not an AnnData", id="other Zarr"),
        pytest.param(damaged_zarr, "damaged", id="damaged Zarr"),
        pytest.param(cut_zarr_chunk, "damaged or cut short", id="cut Zarr chunk"),
        *(
            pytest.param(
                zarr_without(f"X/{name}/c/0"),
                rf"half-copied: 1 of 1 chunks of .*{name} are missing; copy it again",
                id=f"Zarr without {name}",
            )
            for name in ("data", "indices", "indptr")
        ),
        pytest.param(zarr_without("X/data/0", 2), "half-copied: 1 of 1", id="Zarr 2 without data"),
        pytest.param(
            zarr_without("var/_index/c/0"), "chunks of the names in var", id="Zarr without genes"
        ),
        pytest.param(
            zarr_without("obs/_index/c/0"), "chunks of the names in obs", id="Zarr without cells"
        ),
        pytest.param(zarr_without("X/indptr/zarr.json"), "cut short", id="Zarr without pointers"),
        pytest.param(r_short_names, "not name every gene and cell", id="RData with few names"),
        pytest.param(huge_mtx, "pbmc is damaged or half-copied", id="mtx of absurd size"),
        pytest.param(text(",A,ACTB\nc1,1\n"), "line 2 has 2 fields instead of 3", id="short line"),
        pytest.param(
            text(",ACTB,label\nc1,1,T cell\n"), "line 2, column 'label' holds 'T cell'", id="words"
        ),
        pytest.param(text(",ACTB\n"), "no rows or columns of counts", id="header alone"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(
    tmp_path: Path, write: Callable[[Path], Path], message: str
) -> None:
    path = write(tmp_path)
    with pytest.raises(ValueError, match=message) as refusal:
        scan_source(path, None)
    assert str(path) in str(refusal.value)


@pytest.mark.parametrize(
    "write",
    [
        pytest.param(lambda raw, f: write_10x_mtx(f / "a", raw, 2), id="mtx"),
        pytest.param(lambda raw, f: write_10x_h5(f / "a.h5", raw, 3), id="10x h5"),
        pytest.param(lambda raw, f: write_loom(f / "a.loom", raw), id="loom"),
        pytest.param(lambda raw, f: write_rdata(f / "a.RData", raw), id="RData"),
        pytest.param(lambda raw, f: write_table(f / "a.csv", raw, True), id="csv"),
        pytest.param(lambda raw, f: write_zarr(f / "a.zarr", adata_of(raw)), id="zarr"),
    ],
)
def test_negative_values_are_refused_in_every_format(
    tmp_path: Path, write: Callable[[RawCells, Path], Path]
) -> None:
    counts = RAW.counts.copy()
    counts[13, 4] = -2
    source = scan_source(write(RawCells("a", counts, RAW.genes), tmp_path), None)
    with pytest.raises(ValueError, match=r"holds a negative value \(-2, row 13, column 4\)"):
        dense(source, 10)


def test_a_cut_gzip_says_so_at_once(tmp_path: Path) -> None:
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(b"x")[:5])
    with pytest.raises(ValueError, match=r"a\.csv\.gz cannot be decompressed: it is cut short"):
        scan_source(tmp_path / "a.csv.gz", None)
