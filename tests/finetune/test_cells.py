"""An AnnData from a user: where its counts are, and which of a model's genes they belong to."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from datastore.genes import GenePanel
from finetune.annotation_config import GeneTablesConfig
from finetune.cells import panel_counts, read_adata
from finetune.config import FinetuneConfig, FreshConfig, LabelledConfig
from finetune.query import adata_query
from finetune.sides import sides_of
from tests.support.cells import gene_names, random_cells
from tests.support.labelled import GENES, labelled_cells, write_encoder
from tests.support.raw_files import adata_of, write_10x_h5

RAW = random_cells("a", 0, 12, gene_names(6))


@pytest.mark.parametrize("layer", ["raw", None], ids=["named", "found"])
def test_raw_is_read_with_its_own_genes(tmp_path: Path, layer: str | None) -> None:
    whole = adata_of(RAW)
    cells = whole[:, :2].copy()
    cells.raw = whole
    cells.X = np.log1p(cells.X.toarray())
    cells.write_h5ad(tmp_path / "a.h5ad")
    adata = read_adata(tmp_path / "a.h5ad", layer)
    counts = panel_counts(adata_query(adata, layer), GenePanel(gene_names(6)), 1.0)
    np.testing.assert_array_equal(counts.toarray(), RAW.counts)
    with pytest.raises(ValueError, match=r"no layer 'x'; it has none \(and raw\)"):
        read_adata(tmp_path / "a.h5ad", "x")


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    path = write_10x_h5(tmp_path / "a.h5", RAW, 3)
    with pytest.raises(ValueError, match=r"a\.h5 is a 10x h5 source; write it as \.h5ad"):
        read_adata(path, None)


@pytest.mark.parametrize("encoder", ["exported", "none"])
def test_labelled_cells_with_ensembl_ids_are_learnt_from_as_those_with_symbols(
    tmp_path: Path, encoder: str
) -> None:
    ids = [f"ENSG{place:011d}.2" for place in range(len(GENES))]
    table = tmp_path / "ids.tsv"
    table.write_text("".join(f"{i[:-2]}\t{gene}\n" for i, gene in zip(ids, GENES, strict=True)))
    start = str(write_encoder(tmp_path / "encoder")) if encoder == "exported" else "none"

    def counts(names: list[str], tables: GeneTablesConfig) -> np.ndarray:
        adata: anndata.AnnData = labelled_cells(30, seed=1)
        adata.var_names = names
        config = FinetuneConfig(
            encoder=start,
            data=LabelledConfig(path="adata", panel=tables),
            output=str(tmp_path / "run"),
            fresh=FreshConfig(num_genes=20),
        )
        sides = sides_of(adata, config)
        assert set(sides.start.panel.names) <= set(GENES)
        return np.asarray(sides.learn.counts.toarray())

    by_symbol = counts(list(GENES), GeneTablesConfig())
    by_id = counts(ids, GeneTablesConfig(ensembl=str(table)))
    assert by_symbol.sum() > 0
    np.testing.assert_array_equal(by_id, by_symbol)
    if encoder == "exported":
        with pytest.raises(ValueError, match=r"its genes look like Ensembl ids .* give a table"):
            counts(ids, GeneTablesConfig())
