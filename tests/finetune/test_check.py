"""What is said of a file, compared with how the file was made."""

import json
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
from scipy import sparse

from datastore.genes import GenePanel
from finetune.annotation_config import GeneTablesConfig
from finetune.check import check, gene_tables
from finetune.scales import scale_of
from launchers import check as launcher
from tests.support.labelled import GENES, labelled_cells, write_classifier

PANEL = GenePanel(GENES)


def _scaled(dense: np.ndarray) -> np.ndarray:
    return np.asarray(dense / dense.sum(axis=1, keepdims=True) * 1e4)


SCALES = [
    pytest.param(lambda x: x, "counts", id="counts"),
    pytest.param(_scaled, "counts per 10,000", id="CP10k"),
    pytest.param(lambda x: np.log1p(_scaled(x)), "log(1 + counts per 10,000)", id="log1p"),
    pytest.param(lambda x: np.log2(1 + _scaled(x)), "log2(1 + counts per 10,000)", id="log2"),
    pytest.param(
        lambda x: np.log1p(_scaled(x))[:, 5:], "log-normalised expression", id="genes left out"
    ),
    pytest.param(
        lambda x: x - x.mean(axis=0), "scaled expression with negative values", id="centred"
    ),
    pytest.param(lambda x: x * np.nan, "values that are not all finite", id="nan"),
    pytest.param(lambda x: 30 * x + 0.25, "values that are not whole (normalised or estimated), "
                 "without a logarithm", id="estimated"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "name"), SCALES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_scale_is_told(
    change: Callable[[np.ndarray], np.ndarray], name: str, dtype: type[np.floating]
) -> None:
    dense = labelled_cells(30, seed=0).X.toarray().astype(np.float64) + 1
    scale = scale_of(sparse.csr_matrix(change(dense).astype(dtype)))
    assert scale.name == name
    assert scale.is_counts == (name == "counts")


def test_no_numbers_and_no_values() -> None:
    assert scale_of(sparse.csr_matrix((3, 4))).is_counts
    flags = sparse.csr_matrix(np.ones((2, 2), bool))
    assert not scale_of(flags).is_counts


def _write(path: Path, change: Callable[[anndata.AnnData], anndata.AnnData | None]) -> Path:
    cells = labelled_cells(30, seed=5)
    changed = change(cells)
    (cells if changed is None else changed).write_h5ad(path)
    return path


def test_a_good_file_is_described(tmp_path: Path) -> None:
    found = check(_write(tmp_path / "a.h5ad", lambda c: None), PANEL)
    assert (found.cells, found.genes, found.counts_from) == (30, 32, "X")
    assert found.scales == {"X": "counts"}
    assert found.panel["share_found"] == 1.0
    assert found.problems == ()
    assert found.plan[0] == "counts are taken from X"
    assert found.whole == {
        "empty_cells": 0,
        "cells_with_the_counts_of_another": 0,
        "repeated_cell_names": 0,
        "cells_without_panel_genes": 0,
    }


def test_empty_and_repeated_cells_and_names_are_counted(tmp_path: Path) -> None:
    def spoil(cells: anndata.AnnData) -> anndata.AnnData:
        dense = cells.X.toarray()
        dense[3] = 0
        dense[7:10] = dense[12]
        dense[20, :16] = 0  # all that the panel below has
        cells.X = sparse.csr_matrix(dense)
        cells.obs_names = ["same", "same", *(f"c{row}" for row in range(28))]
        return cells

    found = check(_write(tmp_path / "a.h5ad", spoil), GenePanel(GENES[:16]))
    assert found.whole == {
        "empty_cells": 1,
        "cells_with_the_counts_of_another": 3,
        "repeated_cell_names": 1,
        "cells_without_panel_genes": 2,
    }


def test_counts_in_another_place_are_found(tmp_path: Path) -> None:
    def hide(cells: anndata.AnnData) -> None:
        cells.layers["counts"] = cells.X.copy()
        cells.X = sparse.csr_matrix(np.log1p(_scaled(cells.X.toarray())))

    found = check(_write(tmp_path / "a.h5ad", hide), PANEL)
    assert found.scales == {"X": "log(1 + counts per 10,000)", "layers['counts']": "counts"}
    assert found.counts_from == "layers['counts']"
    assert found.plan[0] == "counts are taken from layers['counts']"


def test_what_would_be_refused_is_a_problem(tmp_path: Path) -> None:
    def scale(cells: anndata.AnnData) -> None:
        cells.X = sparse.csr_matrix(np.log1p(_scaled(cells.X.toarray())))

    path = _write(tmp_path / "a.h5ad", scale)
    found = check(path, GenePanel(("OTHER", "GENES")))
    assert found.counts_from is None
    assert "X holds log(1 + counts per 10,000)" in found.problems[0]
    assert "0 of 2 panel genes" in found.problems[1]
    recovered = check(path, PANEL, recover_counts=True)
    assert recovered.problems == ()
    assert recovered.plan[0] == "counts are computed back from X"


def test_a_bad_value_further_down_is_found(tmp_path: Path) -> None:
    def spoil(cells: anndata.AnnData) -> anndata.AnnData:
        many = anndata.concat([cells] * 40)
        many.X.data[len(many.X.data) // 3] = 0.5
        return many

    with pytest.warns(UserWarning, match="not unique"):
        path = _write(tmp_path / "a.h5ad", spoil)
    assert "not whole (0.5, row" in check(path).problems[0]


def test_names_of_other_kinds_are_translated_by_tables(tmp_path: Path) -> None:
    def rename(cells: anndata.AnnData) -> None:
        cells.var_names = [f"ENSG{place:011d}.4" for place in range(cells.n_vars)]

    path = _write(tmp_path / "a.h5ad", rename)
    found = check(path, PANEL)
    assert found.gene_names == "Ensembl ids"
    assert "look like Ensembl ids" in found.problems[0]
    table = tmp_path / "ids.tsv"
    table.write_text("".join(f"ENSG{place:011d}\t{gene}\n" for place, gene in enumerate(GENES)))
    tables = gene_tables(GeneTablesConfig(ensembl=str(table)))
    found = check(path, PANEL, tables=tables)
    assert found.problems == ()
    assert found.panel["found_under_another_name"] == 32
    assert any("genes of another name" in sentence for sentence in found.plan)


def test_mouse_cells_are_known_by_their_names(tmp_path: Path) -> None:
    mouse = {gene: f"Gene{place}x" for place, gene in enumerate(GENES)}
    path = _write(tmp_path / "a.h5ad", lambda c: c[:, :].copy())
    cells = anndata.read_h5ad(path)
    cells.var_names = [mouse[gene] for gene in cells.var_names]
    cells.write_h5ad(path)
    assert check(path, PANEL).species == "mouse"
    table = tmp_path / "pairs.csv"
    table.write_text("human,mouse\n" + "".join(f"{a},{b}\n" for a, b in mouse.items()))
    tables = gene_tables(GeneTablesConfig(orthologues=str(table)))
    assert check(path, PANEL, tables=tables).panel["share_found"] == 1.0


def test_launcher_prints_facts_and_its_exit_code_says_whether_it_would_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = _write(tmp_path / "a.h5ad", lambda c: None)
    write_classifier(tmp_path / "model")
    assert launcher.main([str(path), "--model", str(tmp_path / "model")]) == 0
    text = capsys.readouterr().out
    assert "annotation: counts are taken from X" in text
    assert "share found" in text
    write_classifier(tmp_path / "other", genes=tuple(f"OTHER{place}" for place in range(32)))
    assert launcher.main([str(path), "--model", str(tmp_path / "other"), "--json"]) == 2
    facts = json.loads(capsys.readouterr().out)
    assert facts["cells"] == 30
    assert "0 of 32 panel genes" in facts["problems"][0]


@pytest.mark.parametrize(
    ("file", "model", "message"),
    [
        pytest.param("none.h5ad", None, "no such file", id="no file"),
        pytest.param("text.h5ad", None, "another kind of file", id="text"),
        pytest.param("a.h5ad", "none", "no model folder", id="no model"),
        pytest.param("a.h5ad", ".", "is not an export", id="no export"),
    ],
)
def test_launcher_refuses(
    file: str,
    model: str | None,
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _write(tmp_path / "a.h5ad", lambda c: None)
    (tmp_path / "text.h5ad").write_text("text")
    words = [str(tmp_path / file)]
    if model is not None:
        words += ["--model", str(tmp_path / model)]
    assert launcher.main(words) == 2
    assert message in capsys.readouterr().err
