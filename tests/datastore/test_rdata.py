"""PanglaoDB's `.sparse.RData`, written by R itself, against counts computed here.

Needs Rscript and R's package Matrix (Debian: r-base-core, r-cran-matrix). Where SCBERT_REQUIRE_R is
set, as in CI, their absence is a failure.
"""

import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.config import PanelConfig
from datastore.ingest import build_store
from datastore.manifest import list_sources
from datastore.sources import open_source, scan_source
from tests.support.cells import RawCells, expected_cells, store_config, stored_cells

NUM_GENES, NUM_CELLS = 40, 25
SYMBOLS = ("TSPAN6", "HLA-A", "MT-ND1", "Y_RNA", "RP11-34P13.7", "C1orf112")
GENES = (*SYMBOLS, *(f"GENE{place}" for place in range(len(SYMBOLS), NUM_GENES)))
FILES = (
    *("gzip.sparse.RData", "bzip2.sparse.RData", "xz.sparse.RData", "plain.sparse.RData"),
    *("gzip2.sparse.RData", "compact.sparse.RData", "ascii.sparse.RData"),
)
R_PROGRAM = f"""
suppressPackageStartupMessages(library(Matrix))
genes <- {NUM_GENES}; cells <- {NUM_CELLS}
count <- function(g, c) {{
  v <- (g * 7 + c * 13 + (g * c) %% 5) %% 11
  ifelse(v < 5, v * (1 + c * 40), 0)
}}
dense <- outer(0:(genes - 1), 0:(cells - 1), count)
dense[2, 3] <- 70000
symbols <- c({", ".join(f'"{name}"' for name in GENES)})
rownames(dense) <- sprintf("%s_ENSG%011d.%d", symbols, 1:genes, 1:genes)
colnames(dense) <- sprintf("c%d", 0:(cells - 1))
sm <- as(as(as(dense, "dMatrix"), "generalMatrix"), "CsparseMatrix")
stopifnot(is(sm, "dgCMatrix"))
note <- list(made = "by R", when = Sys.Date())
save(sm, note, file = "gzip.sparse.RData")
save(sm, file = "bzip2.sparse.RData", compress = "bzip2")
save(sm, file = "xz.sparse.RData", compress = "xz")
save(sm, file = "plain.sparse.RData", compress = FALSE)
save(note, sm, file = "gzip2.sparse.RData", version = 2)
save(sm, file = "ascii.sparse.RData", ascii = TRUE)
# R keeps sequences and texts of numbers in compact forms, and saves them so.
colnames(sm) <- as.character(0:(cells - 1))
save(sm, file = "compact.sparse.RData")
counts <- sm[, 1:3]
save(counts, file = "othername.RData")
sm <- dense
save(sm, file = "dense.RData")
"""


def known_counts() -> NDArray[np.int64]:
    """What the R program computes, cells × genes."""
    counts = np.zeros((NUM_CELLS, NUM_GENES), np.int64)
    for cell in range(NUM_CELLS):
        for gene in range(NUM_GENES):
            value = (gene * 7 + cell * 13 + (gene * cell) % 5) % 11
            counts[cell, gene] = value * (1 + cell * 40) if value < 5 else 0
    counts[2, 1] = 70_000
    return counts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files made by R."""
    if shutil.which("Rscript") is None:
        problem = "Rscript is missing: apt-get install r-base-core r-cran-matrix"
        if os.environ.get("SCBERT_REQUIRE_R"):
            pytest.fail(problem)
        pytest.skip(problem)
    folder = tmp_path_factory.mktemp("r")
    (folder / "make.R").write_text(R_PROGRAM)
    done = subprocess.run(
        ["Rscript", "--vanilla", "make.R"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_r_is_read_exactly(folder: Path, name: str) -> None:
    source = scan_source(folder / name, None)
    assert (source.format, source.num_cells, source.genes) == ("rdata", NUM_CELLS, GENES)
    with open_source(source) as cells:
        np.testing.assert_array_equal(cells.counts(0, NUM_CELLS).toarray(), known_counts())
        barcodes = cells.cell_names(0, NUM_CELLS)
    before = "" if name.startswith("compact") else "c"
    sample = name.removesuffix(".sparse.RData")
    assert list(barcodes) == [f"{sample}/{before}{cell}" for cell in range(NUM_CELLS)]


def test_files_of_r_become_a_store(folder: Path, tmp_path: Path) -> None:
    sources = [str(folder / name) for name in FILES[:2]]
    store = build_store(
        store_config(sources, tmp_path / "s.zarr", panel=PanelConfig(), duplicates="keep")
    )
    known = [
        RawCells(source.source_name, known_counts(), GENES) for source in list_sources(sources)
    ]
    expected = expected_cells(known, store.panel.names)
    found = stored_cells(store)
    assert found.keys() == expected.keys()
    for cell, counts in expected.items():
        np.testing.assert_array_equal(found[cell], counts)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        pytest.param("othername.RData", "no R object sm but counts", id="another object"),
        pytest.param("dense.RData", "sm is not a dgCMatrix; in R: sm <- as", id="dense"),
    ],
)
def test_other_objects_of_r_are_refused(folder: Path, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}.*{message}"):
        scan_source(folder / name, None)


@pytest.mark.parametrize("name", FILES[:4])
def test_a_cut_file_of_r_is_refused(folder: Path, tmp_path: Path, name: str) -> None:
    content = (folder / name).read_bytes()
    for share in (0.3, 0.9):
        cut = tmp_path / name
        cut.write_bytes(content[: int(len(content) * share)])
        with pytest.raises(ValueError, match="cut short or damaged"):
            scan_source(cut, None)
