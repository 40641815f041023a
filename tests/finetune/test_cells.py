"""An AnnData from a user: the matrix that was asked for, with the genes that belong to it."""

from pathlib import Path

import numpy as np
import pytest

from datastore.genes import GenePanel
from finetune.cells import panel_counts, read_adata
from tests.support.cells import gene_names, random_cells
from tests.support.raw_files import adata_of, write_10x_h5

RAW = random_cells("a", 0, 12, gene_names(6))


def test_raw_is_read_with_its_own_genes(tmp_path: Path) -> None:
    whole = adata_of(RAW)
    cells = whole[:, :2].copy()
    cells.raw = whole
    cells.X = np.log1p(cells.X.toarray())
    cells.write_h5ad(tmp_path / "a.h5ad")
    adata = read_adata(tmp_path / "a.h5ad", "raw")
    counts = panel_counts(adata, GenePanel(gene_names(6)), "a", "raw", 1.0)
    np.testing.assert_array_equal(counts.toarray(), RAW.counts)
    with pytest.raises(ValueError, match=r"no layer 'x'; it has none \(and raw\)"):
        read_adata(tmp_path / "a.h5ad", "x")


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    path = write_10x_h5(tmp_path / "a.h5", RAW, 3)
    with pytest.raises(ValueError, match=r"a\.h5 is a 10x h5 source; write it as \.h5ad"):
        read_adata(path, None)
