"""Bins against floor(log2(1 + x)) in exact rational arithmetic."""

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from datastore.binning import (
    bin_cells,
    bin_counts,
    library_sizes,
    spread,
    to_dense,
    tokenize,
)
from datastore.buffers import BufferPool
from datastore.config import BinningConfig
from tests.support.cells import random_counts


def exact_bin(count: int, library: int, config: BinningConfig) -> int:
    """min(top, floor(log2(1 + x))) without rounding: the bit length of floor(1 + x), less 1."""
    x = Fraction(count) * Fraction(config.target_sum) / library
    return min(config.top_bin, math.floor(1 + x).bit_length() - 1)


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(BinningConfig(), id="scBERT"),
        pytest.param(BinningConfig(top_bin=1), id="expressed or not"),
        pytest.param(BinningConfig(target_sum=1e6, top_bin=12), id="counts per million"),
        pytest.param(BinningConfig(target_sum=0.5, top_bin=3), id="scale below one"),
    ],
)
def test_bins_equal_exact_arithmetic(config: BinningConfig) -> None:
    rng = np.random.default_rng(0)
    counts: NDArray[np.int64] = np.concatenate([np.arange(1, 200), rng.integers(1, 2**32, 300)])
    libraries: NDArray[np.int64] = counts + rng.integers(0, 60_000, len(counts))
    expected = [exact_bin(int(c), int(n), config) for c, n in zip(counts, libraries, strict=True)]
    np.testing.assert_array_equal(bin_counts(counts, libraries, config), expected)


def test_exact_bin_agrees_with_the_logarithm_away_from_edges() -> None:
    config = BinningConfig(top_bin=30)
    for count in range(1, 300):
        x = count * 10_000 / 7_919  # a prime: x is never a whole number here
        assert exact_bin(count, 7_919, config) == math.floor(math.log2(1 + x))


@pytest.mark.parametrize("power", range(1, 14))
def test_edges_belong_to_the_upper_bin(power: int) -> None:
    config = BinningConfig(top_bin=30)
    edge = 2**power - 1  # with a library of 10,000 the count is x
    library = np.full(3, 10_000)
    bins = bin_counts(np.array([edge - 1, edge, edge + 1]), library, config)
    below = power - 1 if edge > 1 else 0
    assert bins.tolist() == [below, power, power]
    # The same edge met through a division that floats cannot make exactly.
    scaled = bin_counts(np.array([3 * edge, 3 * edge - 1]), np.full(2, 30_000), config)
    assert scaled.tolist() == [power, below]


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.int64, np.float32])
def test_number_types_give_the_same_bins(dtype: type) -> None:
    counts: NDArray[Any] = np.array([1, 2, 700, 65_535], dtype)
    bins = bin_counts(counts, np.full(4, 70_000), BinningConfig())
    assert bins.dtype == np.uint8
    assert bins.tolist() == [exact_bin(c, 70_000, BinningConfig()) for c in (1, 2, 700, 65_535)]


def test_the_top_bin_takes_all_above() -> None:
    counts = np.array([30, 31, 62, 63, 10_000])
    assert bin_counts(counts, np.full(5, 10_000), BinningConfig()).tolist() == [4, 5, 5, 5, 5]


def test_tokens_equal_a_loop_over_the_dense_matrix() -> None:
    counts = random_counts(4, 20, 12)
    counts[3] = 0
    counts[19] = 0
    rows, genes = np.nonzero(counts)
    indptr = np.concatenate([[0], np.cumsum((counts > 0).sum(axis=1))])
    config = BinningConfig(target_sum=100.0)
    tokens = tokenize(indptr, genes, counts[rows, genes], 12, config)
    assert tokens.dtype == np.uint8
    for row in range(20):
        library = int(counts[row].sum())
        for gene in range(12):
            count = int(counts[row, gene])
            assert tokens[row, gene] == (exact_bin(count, library, config) if count else 0)
    assert set(tokens.ravel()) == set(range(6))


def random_rows(rng: np.random.Generator, depth: float) -> tuple[Any, Any]:
    """Cells in CSR form, some without counts, with heavy tails; uint32."""
    lengths = rng.integers(0, 30, 25) * (rng.random(25) < 0.8)
    counts = np.minimum(rng.pareto(0.7, int(lengths.sum())) * depth, 4e9).astype(np.uint32) + 1
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64), counts


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(BinningConfig(), id="scBERT"),
        pytest.param(BinningConfig(top_bin=1), id="expressed or not"),
        pytest.param(BinningConfig(target_sum=1e6, top_bin=12), id="counts per million"),
        pytest.param(BinningConfig(target_sum=0.5, top_bin=3), id="scale below one"),
        pytest.param(BinningConfig(target_sum=96.0, top_bin=6), id="many at an edge"),
    ],
)
def test_cells_get_the_bins_of_exact_arithmetic(config: BinningConfig) -> None:
    rng = np.random.default_rng(1)
    pool = BufferPool()
    for depth in (0.6, 3.0, 1000.0) * 4:
        indptr, counts = random_rows(rng, depth)
        library = np.repeat([int(counts[a:b].sum()) for a, b in pairwise(indptr)], np.diff(indptr))
        expected = [exact_bin(int(c), int(n), config) for c, n in zip(counts, library, strict=True)]
        for kind in (np.uint32, np.int64, np.float64):
            bins = bin_cells(indptr, counts.astype(kind), config, pool)
            assert bins.dtype == np.uint8
            np.testing.assert_array_equal(bins, expected)
        narrow = np.minimum(counts, 65_535).astype(np.uint16)
        np.testing.assert_array_equal(
            bin_cells(indptr, narrow, config), bin_cells(indptr, narrow.astype(np.int64), config)
        )


def test_every_count_around_every_edge_gets_its_bin() -> None:
    config = BinningConfig()
    for library in [*range(1, 40), 9_999, 10_000, 10_001, 30_000, 322_580]:
        edges = [-(-(2**edge - 1) * library // 10_000) for edge in range(1, 6)]
        near = {c + d for c in edges for d in (-1, 0, 1) if 0 < c + d <= library}
        for count in near:  # a cell of two genes
            counts = np.array([count, library - count], np.uint32)
            bins = bin_cells(np.array([0, 2]), counts, config)
            assert bins[0] == exact_bin(count, library, config), (count, library)


def test_sums_of_cells() -> None:
    indptr = np.array([0, 0, 2, 2, 5, 5])
    counts = np.array([65_535, 65_535, 1, 2, 3], np.uint16)
    assert library_sizes(indptr, counts).tolist() == [0, 131_070, 0, 6, 0]
    assert library_sizes(indptr, counts.astype(np.float32)).tolist() == [0, 131_070, 0, 6, 0]
    assert library_sizes(np.array([0]), counts[:0]).tolist() == []
    for length in (2**16, 2**16 + 2):  # the longest cell that is summed in 32 bits, and a longer
        highest = np.full(length, 65_535, np.uint16)
        assert library_sizes(np.array([0, length]), highest).tolist() == [65_535 * length]


def test_cells_are_spread() -> None:
    counts = random_counts(7, 37, 23, share=0.3)
    counts[[0, 5, 36]] = 0
    rows = sparse.csr_matrix(counts.astype(np.float32))
    dense = to_dense(rows.indptr.astype(np.int64), rows.indices, rows.data, 23)
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, counts)


def test_ranges_in_any_order_are_spread() -> None:
    counts = random_counts(8, 37, 23, share=0.3).astype(np.uint16)
    counts[[0, 5, 36]] = 0
    flat = sparse.csr_matrix(counts)
    rows = np.array([36, 4, 5, 4, 0, 20])
    starts, stops = flat.indptr[rows], flat.indptr[rows + 1]
    genes = flat.indices.astype(np.uint16)
    pool = BufferPool()
    for kind in (np.float32, np.uint32):  # the second finds the first one's numbers in its memory
        dense = spread(starts, stops, genes, flat.data, 23, np.dtype(kind), pool)
        assert dense.dtype == kind
        np.testing.assert_array_equal(dense, counts[rows])
        del dense
    with pytest.raises(ValueError, match="lies outside the panel of 22 genes"):
        spread(flat.indptr[:-1], flat.indptr[1:], genes, flat.data, 22, np.dtype(np.float32))


def test_a_gene_outside_the_panel_is_refused() -> None:
    one = np.array([1], np.uint16)
    assert to_dense(np.array([0, 1]), np.array([4]), one, 5).tolist() == [[0, 0, 0, 0, 1]]
    with pytest.raises(ValueError, match="gene 5 lies outside the panel of 5 genes"):
        to_dense(np.array([0, 1]), np.array([5]), one, 5)


def test_no_cells_and_empty_cells() -> None:
    nothing = np.empty(0, np.uint16)
    assert tokenize(np.array([0]), nothing, nothing, 5, BinningConfig()).shape == (0, 5)
    empty = tokenize(np.array([0, 0, 0]), nothing, nothing, 5, BinningConfig())
    np.testing.assert_array_equal(empty, np.zeros((2, 5)))


def test_vocabulary() -> None:
    config = BinningConfig(top_bin=5)
    assert (config.mask_token, config.num_tokens) == (6, 7)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"target_sum": 0.0}, "binning.target_sum is 0.0", id="no scale"),
        pytest.param({"target_sum": float("nan")}, "binning.target_sum", id="scale not a number"),
        pytest.param({"top_bin": 0}, "binning.top_bin is 0", id="no bin"),
        pytest.param({"top_bin": 31}, "1 to 30", id="too many bins"),
    ],
)
def test_unusable_settings_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BinningConfig(**settings)  # type: ignore[arg-type]
