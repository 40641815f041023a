"""Plots show the numbers that they were given, which are counted by hand."""

import subprocess
import sys
from pathlib import Path

import anndata
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from sklearn.calibration import calibration_curve

import finetune
from finetune import pl
from finetune.metrics import score

TRUTH = ["a", "a", "b", "b", "b", "c"]
GIVEN = ["a", "b", "b", "b", "c", "c"]


def test_confusion_and_scores_draw_into_given_axes() -> None:
    scores = score(TRUTH, GIVEN, ["a", "b", "c"])
    axes = Figure().subplots()
    assert pl.confusion(scores, ax=axes) is axes
    assert sorted(text.get_text() for text in axes.texts) == ["1", "1", "1", "1", "2"]
    bars = pl.scores({"scBERT": scores, "other": scores}, measure="macro_f1")
    assert [bar.get_width() for bar in bars.patches] == [scores.macro_f1] * 2  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match="methods is empty"):
        pl.scores({})
    with pytest.raises(ValueError, match="measure is 'f2'"):
        pl.scores({"x": scores}, measure="f2")


def test_risk_is_the_share_of_errors_among_the_surest() -> None:
    confidence = np.array([0.9, 0.5, 0.8, 0.6])
    is_right = np.array([True, False, False, True])
    risk = [0, 1 / 2, 1 / 3, 1 / 2]
    line = pl.risk_coverage(confidence, is_right).lines[0]
    np.testing.assert_allclose(np.asarray(line.get_xdata(), np.float64), [0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(np.asarray(line.get_ydata(), np.float64), risk)


def test_reliability_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.2, 1, 400)
    is_right = rng.random(400) < confidence**2
    mean, share, cells = pl.reliability(confidence, is_right)
    theirs, ours = calibration_curve(is_right, confidence, n_bins=15)
    np.testing.assert_allclose(share, theirs)
    np.testing.assert_allclose(mean, ours)
    assert cells.sum() == 400
    axes = pl.calibration(confidence, is_right)
    error = (cells * abs(mean - share)).sum() / 400
    assert axes.get_title() == f"Calibration, expected error {error:.3f}"


def test_top_genes_are_shown_for_their_types(tmp_path: Path) -> None:
    table = pd.DataFrame(
        {
            "cell_type": ["a", "a", "b"],
            "rank": [1, 2, 1],
            "gene": ["G1", "G2", "G2"],
            "specific": [3.0, 1.0, 2.0],
        }
    )
    axes = pl.top_genes(table, num_top=2)
    np.testing.assert_array_equal(axes.images[0].get_array(), [[3, 1], [0, 2]])
    pl.save(axes, tmp_path / "genes.svg")
    assert "<svg" in (tmp_path / "genes.svg").read_text()[:500]
    adata = anndata.AnnData(np.zeros((2, 2), np.float32), uns={"scbert": {"top_genes": table}})
    assert pl.top_genes(adata).get_yticklabels()[0].get_text() == "a"
    with pytest.raises(ValueError, match=r"run finetune\.gene_attention"):
        pl.top_genes(anndata.AnnData(np.zeros((2, 2), np.float32)))
    with pytest.raises(ValueError, match="table of top genes is empty"):
        pl.top_genes(table[:0])


def test_umap_uses_a_layout_that_is_there() -> None:
    adata = anndata.AnnData(np.zeros((3, 2), np.float32))
    with pytest.raises(ValueError, match=r"run finetune\.annotate"):
        pl.umap(adata)
    adata.obs["scbert_label"] = ["a", "b", "b"]
    adata.obs["scbert_novel"] = [False, False, True]
    adata.obsm["X_scbert"] = np.eye(3, dtype=np.float32)
    adata.obsm["X_umap_scbert"] = np.arange(6.0).reshape(3, 2)
    axes = pl.umap(adata)
    drawn = np.concatenate([np.asarray(cells.get_offsets()) for cells in axes.collections])
    np.testing.assert_array_equal(drawn, adata.obsm["X_umap_scbert"])


def test_import_is_light_and_names_are_there() -> None:
    code = "import sys, finetune; print(sorted({'torch','matplotlib','mlflow'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True,
        cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    assert done.stdout.strip() == "[]"
    assert callable(finetune.annotate)
    assert callable(finetune.gene_attention)
    assert finetune.pl is pl
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = finetune.nothing
