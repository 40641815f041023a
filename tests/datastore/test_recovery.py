"""Counts come back exactly from normalised expression, or not at all."""

import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import StoreConfig
from datastore.ingest import build_store
from datastore.manifest import ListedSource
from datastore.raw_cells import ReadOptions
from datastore.recovery import MOST, UnprovenCounts, recover_counts
from datastore.sources import open_source, scan_listed
from datastore.store import generation_folder
from tests.support.cells import (
    RawCells,
    expected_cells,
    gene_names,
    store_config,
    stored_cells,
    write_h5ad,
)

Array = NDArray[np.float32]

LOGARITHMS: dict[str, Callable[[Array], Array]] = {
    "log1p": np.log1p,
    "log2(x + 1)": lambda x: np.log2(x + np.float32(1)),
    "log1p / ln 2": lambda x: np.divide(np.log1p(x), np.log(2), dtype=np.float32),
    "log10(x + 1)": lambda x: np.log10(x + np.float32(1)),
    "none": lambda x: x,
}


def realistic_counts(seed: int, num_cells: int, num_genes: int, depth: float) -> NDArray[np.int64]:
    """Negative binomial counts around gene levels of a wide range, mostly zeros and ones."""
    rng = np.random.default_rng(seed)
    level = np.exp(rng.normal(0, 2, num_genes))
    mean = depth * level / level.sum() * np.exp(rng.normal(0, 0.4, (num_cells, 1)))
    return np.asarray(rng.negative_binomial(2, 2 / (2 + mean)), np.int64)


def normalise(
    counts: NDArray[np.int64], target: float | None, logarithm: Callable[[Array], Array]
) -> sparse.csr_matrix:
    """Scale cells to a total (the median one if none is given) and take a logarithm, in float32."""
    matrix = sparse.csr_matrix(counts.astype(np.float32))
    total = np.asarray(matrix.sum(axis=1), np.float32).ravel()
    factor = total / np.float32(np.median(total) if target is None else target)
    matrix.data = logarithm(matrix.data / np.repeat(factor, np.diff(matrix.indptr)))
    return matrix


@pytest.mark.parametrize("depth", [2_000, 100_000, 1_000_000])
@pytest.mark.parametrize("target", [1e4, 1e6, None], ids=str)
@pytest.mark.parametrize("logarithm", LOGARITHMS)
def test_counts_come_back(logarithm: str, target: float | None, depth: float) -> None:
    counts = realistic_counts(1, 40, 3_000, depth)
    recovered = recover_counts(normalise(counts, target, LOGARITHMS[logarithm]))
    assert recovered.dtype == np.uint32
    np.testing.assert_array_equal(recovered.toarray(), counts)


@pytest.mark.parametrize("kind", [np.float64, np.float32])
def test_values_computed_in_double_precision_do_as_well(kind: type[np.floating]) -> None:
    counts = realistic_counts(2, 30, 500, 5_000)
    values = np.log1p(counts / counts.sum(axis=1, keepdims=True) * 1e4).astype(kind)
    recovered = recover_counts(sparse.csr_matrix(values))
    np.testing.assert_array_equal(recovered.toarray(), counts)


def test_normalising_the_recovered_counts_gives_the_values_back() -> None:
    values = normalise(realistic_counts(3, 30, 2_000, 20_000), 1e4, np.log1p)
    again = normalise(recover_counts(values).toarray(), 1e4, np.log1p)
    np.testing.assert_array_equal(again.toarray(), values.toarray())


@pytest.mark.parametrize("decimals", [3, 4, 6])
def test_values_rounded_to_a_few_decimals(decimals: int) -> None:
    counts = realistic_counts(12, 60, 1_000, 2_000)
    values = normalise(counts, 1e4, np.log1p)
    values.data = np.round(values.data, decimals)
    np.testing.assert_array_equal(recover_counts(values).toarray(), counts)


def test_too_few_decimals_are_refused_and_not_guessed() -> None:
    counts = realistic_counts(12, 60, 1_000, 50_000)
    values = normalise(counts, 1e4, np.log1p)
    values.data = np.round(values.data, 2)
    with pytest.raises(UnprovenCounts):
        recover_counts(values)


@pytest.mark.parametrize(
    "cell",
    [
        pytest.param([2, 3, 7], id="smallest is 2"),
        pytest.param([6, 10, 15], id="pairs have common factors"),
        pytest.param([MOST, MOST + 1, 333, 4_127], id="smallest is the most"),
        pytest.param([5_000, 1, 70_001, 3, 12], id="large and small"),
        pytest.param([1], id="one gene"),
        pytest.param([], id="no gene"),
        pytest.param([1, 1, 1], id="all the same"),
    ],
)
@pytest.mark.parametrize("logarithm", ["log1p", "log2(x + 1)", "none"])
def test_cells_of_few_genes(cell: list[int], logarithm: str) -> None:
    counts = np.zeros((3, 300), np.int64)
    counts[0], counts[2] = realistic_counts(4, 2, 300, 3_000)
    counts[1, : len(cell)] = cell
    with np.errstate(invalid="ignore"):  # a cell without counts has no total
        values = normalise(counts, 1e4, LOGARITHMS[logarithm])
    np.testing.assert_array_equal(recover_counts(values).toarray(), counts)


def test_genes_may_have_been_dropped_after_scaling() -> None:
    counts = realistic_counts(5, 50, 4_000, 5_000)
    kept = np.random.default_rng(0).permutation(4_000)[:400]
    values = normalise(counts, 1e4, np.log1p)[:, kept]
    np.testing.assert_array_equal(recover_counts(values).toarray(), counts[:, kept])


def test_a_common_factor_leaves_no_trace() -> None:
    values = normalise(np.array([[2, 4, 6], [1, 5, 9]]), 1e4, np.log1p)
    assert recover_counts(values).toarray().tolist() == [[1, 2, 3], [1, 5, 9]]


def test_stored_zeros_are_zeros_and_the_input_stays() -> None:
    counts = realistic_counts(6, 5, 200, 1_000)
    values = normalise(counts, 1e4, np.log1p)
    values.data[3] = 0
    counts[0, values.indices[3]] = 0
    before = values.copy()
    recovered = recover_counts(values)
    np.testing.assert_array_equal(recovered.toarray(), counts)
    assert recovered.nnz == values.nnz - 1
    assert (before != values).nnz == 0


def test_many_cells_are_done_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datastore.recovery._VALUES_AT_ONCE", 1_000)
    counts = realistic_counts(7, 101, 300, 1_000)
    counts[[0, 17, 40, 100]] = 0
    counts[80:95] = 0
    with np.errstate(invalid="ignore"):
        values = normalise(counts, 1e4, np.log1p)
    np.testing.assert_array_equal(recover_counts(values).toarray(), counts)


# --- what cannot be proved ---


def spoil_one_value(values: sparse.csr_matrix) -> None:
    values.data[values.indptr[33] + 5] *= 1.0001


def averaged_cells(values: sparse.csr_matrix) -> None:
    values.data[values.indptr[33] : values.indptr[34]] *= np.random.default_rng(0).uniform(
        0.5, 1, values.indptr[34] - values.indptr[33]
    )


def four_decimals(values: sparse.csr_matrix) -> None:
    start, stop = values.indptr[33:35]
    values.data[start:stop] = np.round(values.data[start:stop], 4)


@pytest.mark.parametrize("spoil", [spoil_one_value, averaged_cells, four_decimals])
def test_a_cell_that_is_not_counts_is_named(spoil: Callable[[sparse.csr_matrix], None]) -> None:
    values = normalise(realistic_counts(8, 60, 800, 5_000), 1e4, np.log1p)
    spoil(values)
    with pytest.raises(UnprovenCounts) as refusal:
        recover_counts(values)
    assert refusal.value.row == 33


def test_any_other_numbers_are_refused() -> None:
    rng = np.random.default_rng(9)
    for genes in (3, 10, 500):  # two values alone can be the ratio of two counts by chance
        for scale in (1.0, 5.0):
            values = sparse.csr_matrix(rng.uniform(0.01, scale, (8, genes)).astype(np.float32))
            for row in range(8):
                with pytest.raises(UnprovenCounts):
                    recover_counts(values[row])


def test_two_genes_that_any_numbers_could_be_are_refused() -> None:
    values = normalise(np.array([[89, 97, 0]]), 1e4, np.log1p)
    with pytest.raises(UnprovenCounts):
        recover_counts(values)


def test_counts_beyond_the_precision_are_refused_and_not_guessed() -> None:
    # 3 and 5 million differ by 1e-7 of themselves from their neighbours.
    values = normalise(np.array([[1, 2, 3_000_001, 5_000_002]]), 1e4, np.log1p)
    with pytest.raises(UnprovenCounts):
        recover_counts(values)


# --- in a source and in a store ---

COUNTS = realistic_counts(10, 64, 120, 600)
RAW = RawCells("pbmc", COUNTS, gene_names(120))


def test_a_source_is_recovered_only_where_it_is_allowed(tmp_path: Path) -> None:
    path = write_h5ad(tmp_path, RAW, normalise(COUNTS, 1e4, np.log1p))
    allowed = scan_listed(ListedSource(path), ReadOptions(recover_counts=True))
    with open_source(allowed) as cells:
        np.testing.assert_array_equal(cells.counts(5, 20).toarray(), COUNTS[5:20])
    with (
        open_source(scan_listed(ListedSource(path), ReadOptions())) as cells,
        pytest.raises(ValueError, match=r"log-normalised .*--layer counts.*--recover_counts true"),
    ):
        cells.counts(5, 20)


def test_the_refusal_names_the_cell(tmp_path: Path) -> None:
    values = normalise(COUNTS, 1e4, np.log1p)
    values.data[values.indptr[14]] += 0.001
    path = write_h5ad(tmp_path, RAW, values)
    source = scan_listed(ListedSource(path), ReadOptions(recover_counts=True))
    with (
        open_source(source) as cells,
        pytest.raises(ValueError, match=r"pbmc\.h5ad, X: .* cell pbmc/c14 \(row 14\) cannot be"),
    ):
        cells.counts(5, 20)


@pytest.mark.parametrize("value", [-0.5, np.nan, np.inf])
def test_what_no_count_can_become_is_refused_as_ever(tmp_path: Path, value: float) -> None:
    values = normalise(COUNTS, 1e4, np.log1p)
    values.data[values.indptr[14]] = value
    path = write_h5ad(tmp_path, RAW, values)
    source = scan_listed(ListedSource(path), ReadOptions(recover_counts=True))
    with (
        open_source(source) as cells,
        pytest.raises(ValueError, match=r"holds a (negative value|value that is not finite)"),
    ):
        cells.counts(5, 20)


def test_a_store_of_recovered_counts_holds_the_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = RawCells("plain", realistic_counts(11, 20, 120, 600), RAW.genes)
    sources = [
        str(write_h5ad(tmp_path, RAW, normalise(COUNTS, None, np.log1p))),
        str(write_h5ad(tmp_path, other)),
    ]
    config: StoreConfig = store_config(sources, tmp_path / "cells.zarr", recover_counts=True)
    with caplog.at_level(logging.INFO, "datastore"):
        built = build_store(config)
    recovered = {line["name"]: line["cells_recovered"] for line in built.header.sources}
    assert recovered == {"pbmc": 64, "plain": 0}
    assert "pbmc: the counts of 64 cells were computed back from normalised" in caplog.text
    report = (generation_folder(built.path, 0) / "harmonization.txt").read_text()
    assert "recovered cells" in report.splitlines()[0]
    found = stored_cells(built)
    expected = expected_cells([RAW, other], RAW.genes)
    assert set(found) == set(expected)
    for cell, counts in expected.items():
        np.testing.assert_array_equal(found[cell], counts)
