"""Synthetic cells are what they say: the distribution, the files, the same ones again."""

from pathlib import Path

import anndata
import numpy as np
import pytest

from benchmarks.cells import DISPERSION, Corpus, _draw, _profiles, blocks, generate

SMALL = Corpus(num_cells=300, num_genes=200, expressed=40, num_sources=3, num_types=2)


def test_counts_are_negative_binomial() -> None:
    means = np.tile(np.array([0.01, 0.3, 2.0, 40.0], np.float32), (40_000, 1))
    rows, genes, counts = _draw(np.random.default_rng(0), means)
    dense = np.zeros(means.shape)
    dense[rows, genes] = counts
    assert (counts >= 1).all()
    for gene, mean in enumerate(means[0].astype(float)):
        variance = mean + mean**2 / DISPERSION
        zero = (1 + mean / DISPERSION) ** -DISPERSION
        # five standard errors of 40,000 draws; the variance has a heavy-tailed one
        assert abs(dense[:, gene].mean() - mean) < 5 * np.sqrt(variance / 40_000)
        assert dense[:, gene].var() == pytest.approx(variance, rel=0.15)
        assert (dense[:, gene] == 0).mean() == pytest.approx(zero, abs=0.0125)


def test_files_hold_the_cells_in_the_order_of_each_source(tmp_path: Path) -> None:
    paths = generate(tmp_path, SMALL)
    assert SMALL.source_sizes() == [150, 100, 50]
    sums = np.zeros(200)
    for number, path in enumerate(paths):
        adata = anndata.read_h5ad(path)
        assert adata.shape == (SMALL.source_sizes()[number], 200)
        order = SMALL.gene_order(number)
        assert list(adata.var_names) == [SMALL.gene_names()[place] for place in order]
        assert adata.X.has_sorted_indices
        assert set(adata.obs["cell_type"]) <= {"type0", "type1"}
        sums[order] += np.asarray(adata.X.sum(axis=0)).ravel()
        assert adata.X.nnz / adata.n_obs == pytest.approx(40, rel=0.4)
    assert not np.array_equal(SMALL.gene_order(0), SMALL.gene_order(1))
    drawn = np.zeros(200)
    for number, cells in enumerate(SMALL.source_sizes()):
        for _, genes, counts, _ in blocks(SMALL, number, cells, _profiles(SMALL)):
            drawn += np.bincount(genes, counts, 200)
    np.testing.assert_array_equal(sums, drawn)


def test_the_same_corpus_is_made_once_and_alike(tmp_path: Path) -> None:
    one, other = generate(tmp_path / "one", SMALL), generate(tmp_path / "other", SMALL)
    before = one[0].stat().st_mtime_ns
    for left, right in zip(one, other, strict=True):
        np.testing.assert_array_equal(
            anndata.read_h5ad(left).X.toarray(), anndata.read_h5ad(right).X.toarray()
        )
    assert generate(tmp_path / "one", SMALL)[0].stat().st_mtime_ns == before
    generate(tmp_path / "one", Corpus(**{**SMALL.__dict__, "seed": 1}))
    assert one[0].stat().st_mtime_ns != before
