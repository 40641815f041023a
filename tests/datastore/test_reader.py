"""Cells by position: any positions, any order, the counts that anndata reads."""

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.reader import CellBlock, CellReader
from datastore.store import CellStore
from tests.support.cells import dense_store


def to_dense(cells: CellBlock, num_genes: int) -> NDArray[np.int64]:
    dense = np.zeros((len(cells.positions), num_genes), np.int64)
    for row in range(len(cells.positions)):
        for place in range(cells.indptr[row], cells.indptr[row + 1]):
            dense[row, cells.genes[place]] += cells.counts[place]
    return dense


REQUESTS = {
    "one cell": [33],
    "first and last": [0, 69],
    "all": list(range(70)),
    "backwards": list(range(69, -1, -1)),
    "across two edges of parts": list(range(20, 60)),
    "last of a part, first of the next": [24, 25],
    "first of each part": [50, 0, 25],
    "one cell thrice": [42, 42, 42],
    "repeated among others": [5, 60, 5, 6, 60, 5],
    "every other": list(range(1, 70, 2)),
    "scattered": np.random.default_rng(0).integers(0, 70, 200).tolist(),
}


@pytest.mark.parametrize("request_name", REQUESTS)
def test_requests_equal_the_dense_matrix(store: CellStore, request_name: str) -> None:
    assert store.partition_starts.tolist() == [0, 25, 50, 70]
    positions = np.array(REQUESTS[request_name], np.int64)
    cells = CellReader(store).read(positions)
    np.testing.assert_array_equal(cells.positions, positions)
    assert cells.indptr.dtype == np.int64
    assert cells.indptr[0] == 0
    assert cells.indptr[-1] == len(cells.genes) == len(cells.counts)
    dense = to_dense(cells, len(store.panel))
    np.testing.assert_array_equal(dense, dense_store(store)[positions])


def test_no_positions_give_no_cells(store: CellStore) -> None:
    cells = CellReader(store).read(np.empty(0, np.int64))
    assert (len(cells.positions), cells.indptr.tolist(), len(cells.counts)) == (0, [0], 0)
    assert len(cells.take(np.empty(0, np.int64)).positions) == 0


@pytest.mark.parametrize("positions", [[70], [-1], [3, 700, 4], [0, -70]])
def test_positions_outside_are_refused(store: CellStore, positions: list[int]) -> None:
    with pytest.raises(IndexError, match=r"positions must lie in \[0, 70\)"):
        CellReader(store).read(np.array(positions))


def test_rows_are_taken_in_any_order(store: CellStore) -> None:
    cells = CellReader(store).read(np.arange(70))
    rows = np.array([69, 3, 3, 0, 41])
    taken = cells.take(rows)
    np.testing.assert_array_equal(taken.positions, rows)
    dense = to_dense(taken, len(store.panel))
    np.testing.assert_array_equal(dense, dense_store(store)[rows])


def test_a_reader_serves_again_and_again(store: CellStore) -> None:
    reader = CellReader(store)
    expected = dense_store(store)
    rng = np.random.default_rng(1)
    for _ in range(20):
        positions = rng.integers(0, 70, rng.integers(0, 12))
        dense = to_dense(reader.read(positions), len(store.panel))
        np.testing.assert_array_equal(dense, expected[positions])
