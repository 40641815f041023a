"""Packed cells equal aligned matrices, and their hashes tell cells apart."""

from itertools import combinations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import sparse

from datastore import kernels
from datastore.genes import align_counts
from datastore.packing import (
    PackedCells,
    cells_of,
    pack_counts,
    packed_digests,
    unpack_counts,
    unpack_genes,
    widen,
)


@pytest.fixture(params=["native", "numpy"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every test runs by the kernels and by NumPy; a missing compiler is a failure."""
    assert kernels.missing() is None
    if request.param == "numpy":
        monkeypatch.setattr(kernels, "missing", lambda: "not wanted")
    return str(request.param)


def dense(cells: PackedCells, num_genes: int) -> NDArray[np.int64]:
    """Unpack one number at a time."""
    bits = 16 if cells.packed.dtype == np.uint32 else 32
    counts = np.zeros((len(cells.indptr) - 1, num_genes), np.int64)
    for row in range(len(counts)):
        genes = [int(p) >> bits for p in cells.packed[cells.indptr[row] : cells.indptr[row + 1]]]
        assert genes == sorted(set(genes))
        for place, packed in zip(genes, cells.packed[cells.indptr[row] :], strict=False):
            counts[row, place] = int(packed) & (2**bits - 1)
    return counts


def aligned(
    counts: NDArray[np.int64], places: NDArray[np.int64], num_genes: int
) -> NDArray[np.int64]:
    expected = np.zeros((len(counts), num_genes), np.int64)
    for column, place in enumerate(places):
        if place >= 0:
            expected[:, place] += counts[:, column]
    return expected


def matrix(num_cells: int, num_genes: int, share: float = 0.4, high: int = 50) -> NDArray[np.int64]:
    rng = np.random.default_rng(num_cells)
    counts = rng.integers(1, high, (num_cells, num_genes))
    return np.where(rng.random(counts.shape) < share, counts, 0)


PLACES = {
    "reversed": np.arange(12)[::-1].copy(),
    "some unknown": np.array([3, -1, 0, -1, 7, 2, -1, 11, 9, 5, 4, -1]),
    "two columns of one gene": np.array([3, 1, 3, 0, 7, 2, 7, 11, 9, 5, 7, -1]),
    "all unknown": np.full(12, -1),
}


@pytest.mark.parametrize("places", list(PLACES))
@pytest.mark.parametrize("num_cells", [0, 1, 63, 64, 65, 200])
@pytest.mark.parametrize("kind", [np.float32, np.int64, np.uint8])
def test_packing_is_alignment(places: str, num_cells: int, kind: type) -> None:
    counts = matrix(num_cells, 12)
    cells = pack_counts(sparse.csr_matrix(counts.astype(kind)), PLACES[places], 12)
    np.testing.assert_array_equal(dense(cells, 12), aligned(counts, PLACES[places], 12))
    by_scipy = align_counts(sparse.csr_matrix(counts), PLACES[places], 12)
    np.testing.assert_array_equal(cells.indptr, by_scipy.indptr)
    np.testing.assert_array_equal(unpack_genes(cells.packed), by_scipy.indices)
    np.testing.assert_array_equal(unpack_counts(cells.packed), by_scipy.data)


@pytest.mark.parametrize("index", [np.int32, np.int64])
@pytest.mark.parametrize(
    "kind", [np.float32, np.float64, np.uint16, np.int32, np.uint32, np.int64, np.uint8]
)
def test_all_types_of_counts(way: str, kind: type, index: type) -> None:
    counts = matrix(40, 200, high=250)
    raw = sparse.csr_matrix(counts.astype(kind))
    raw.indices, raw.indptr = raw.indices.astype(index), raw.indptr.astype(index)
    kernel = f"pack_{raw.indices.dtype.str[1:]}_{raw.data.dtype.str[1:]}"
    assert kernels.has(kernel) == (way == "native" and kind is not np.uint8)
    places = np.random.default_rng(1).permutation(300)[:200]
    np.testing.assert_array_equal(
        dense(pack_counts(raw, places, 300), 300), aligned(counts, places, 300)
    )


def test_a_column_that_the_source_does_not_have_is_refused() -> None:
    raw = sparse.csr_matrix(np.eye(3, dtype=np.float32))
    with pytest.raises(IndexError):
        pack_counts(raw, np.arange(2), 3)


def test_genes_outside_the_panel_are_refused() -> None:
    raw = sparse.csr_matrix(np.ones((2, 3), np.float32))
    with pytest.raises(ValueError, match="place 500 lies outside the panel of 3 genes"):
        pack_counts(raw, np.array([0, 1, 500]), 3)
    with pytest.raises(IndexError):
        packed_digests(pack_counts(raw, np.arange(3), 3), 2)


def test_counts_of_another_byte_order() -> None:
    raw = sparse.csr_matrix(np.array([[1.0, 2.0]]))
    raw.data = raw.data.astype(">i4")
    assert unpack_counts(pack_counts(raw, np.arange(2), 2).packed).tolist() == [1, 2]


def test_files_may_be_unsorted_name_a_gene_twice_and_store_zeros() -> None:
    data = np.array([5, 0, 7, 2, 9, 1], np.int32)
    indices, indptr = np.array([2, 0, 1, 1, 2, 0]), np.array([0, 3, 5, 6])
    raw = sparse.csr_matrix((data, indices, indptr), shape=(3, 3))
    assert dense(pack_counts(raw, np.arange(3), 3), 3).tolist() == [[0, 7, 5], [0, 2, 9], [1, 0, 0]]
    twice = sparse.csr_matrix((data, np.array([2, 0, 2, 1, 1, 0]), indptr), shape=(3, 3))
    assert dense(pack_counts(twice, np.arange(3), 3), 3).tolist() == [
        [0, 0, 12],
        [0, 11, 0],
        [1, 0, 0],
    ]


@pytest.mark.parametrize(
    ("count", "num_genes", "kind"),
    [
        pytest.param(65_535, 65_536, np.uint32, id="the most that 32 bits hold"),
        pytest.param(65_536, 10, np.uint64, id="a high count"),
        pytest.param(1, 65_537, np.uint64, id="many genes"),
        pytest.param(2**32 - 1, 10, np.uint64, id="the highest count"),
    ],
)
def test_the_width_fits(count: int, num_genes: int, kind: type) -> None:
    raw = sparse.csr_matrix(np.array([[count, 3]]))
    cells = pack_counts(raw, np.array([num_genes - 1, 0]), num_genes)
    assert cells.packed.dtype == kind
    assert unpack_genes(cells.packed).tolist() == [0, num_genes - 1]
    assert unpack_counts(cells.packed).tolist() == [3, count]
    wide = widen(cells.packed)
    assert wide.dtype == np.uint64
    assert unpack_genes(wide).tolist() == [0, num_genes - 1]
    assert unpack_counts(wide).tolist() == [3, count]


def test_sums_beyond_a_count_are_refused() -> None:
    raw = sparse.csr_matrix(np.array([[2**32 - 1, 1]]))
    with pytest.raises(ValueError, match="add up to 4294967296"):
        pack_counts(raw, np.array([0, 0]), 3)


def test_cells_are_the_rows() -> None:
    counts = matrix(30, 12)
    blocks = [
        pack_counts(sparse.csr_matrix(part), np.arange(12), 12) for part in np.split(counts, [7, 7])
    ]
    for cell, row in zip(cells_of(blocks), counts, strict=True):
        assert unpack_genes(cell).tolist() == np.flatnonzero(row).tolist()
        assert unpack_counts(cell).tolist() == row[row > 0].tolist()


def test_cells_of_two_widths_come_in_one() -> None:
    wide = pack_counts(sparse.csr_matrix(np.array([[70_000, 1]])), np.arange(2), 2)
    narrow = pack_counts(sparse.csr_matrix(np.array([[0, 4], [5, 6]])), np.arange(2), 2)
    cells = cells_of([narrow, wide])
    assert {cell.dtype for cell in cells} == {np.dtype(np.uint64)}
    assert [unpack_counts(cell).tolist() for cell in cells] == [[4], [5, 6], [70_000, 1]]
    assert [unpack_genes(cell).tolist() for cell in cells] == [[1], [0, 1], [0, 1]]


def test_equal_cells_have_equal_hashes_and_others_do_not() -> None:
    counts = matrix(400, 12, share=0.5, high=3)
    counts = counts[counts.any(axis=1)]
    hashes = packed_digests(pack_counts(sparse.csr_matrix(counts), np.arange(12), 12), 12)
    by_content: dict[bytes, set[int]] = {}
    for row, value in zip(counts, hashes.tolist(), strict=True):
        by_content.setdefault(row.tobytes(), set()).add(value)
    assert all(len(values) == 1 for values in by_content.values())
    assert len(set(hashes.tolist())) == len(by_content) > 100


def test_hashes_do_not_depend_on_width_or_neighbours() -> None:
    counts = matrix(50, 12, share=0.9)
    counts[:, 0] = 1
    narrow = pack_counts(sparse.csr_matrix(counts), np.arange(12), 12)
    wide = PackedCells(narrow.indptr, widen(narrow.packed))
    hashes = packed_digests(narrow, 12)
    np.testing.assert_array_equal(packed_digests(wide, 12), hashes)
    rows = np.random.default_rng(0).permutation(50)
    mixed = pack_counts(sparse.csr_matrix(counts[rows]), np.arange(12), 12)
    np.testing.assert_array_equal(packed_digests(mixed, 12), hashes[rows])
    counts[rows[:20]] = 0
    hashes[rows[:20]] = 0
    some_empty = pack_counts(sparse.csr_matrix(counts), np.arange(12), 12)
    np.testing.assert_array_equal(packed_digests(some_empty, 12), hashes)


def test_near_cells_have_other_hashes() -> None:
    """One count more, two genes exchanged, a doubled cell: what a weak sum would confuse."""
    base = np.array([4, 1, 2, 8, 0, 3])
    near = [base, base * 2, base[::-1].copy(), base + 1]
    for a, b in combinations(range(6), 2):
        swapped = base.copy()
        swapped[[a, b]] = swapped[[b, a]]
        near.append(swapped)
        moved = base.copy()
        moved[a] += 1
        near.append(moved)
    unique = np.unique(np.array(near), axis=0)
    cells = pack_counts(sparse.csr_matrix(unique), np.arange(6), 6)
    assert len(np.unique(packed_digests(cells, 6))) == len(unique)
