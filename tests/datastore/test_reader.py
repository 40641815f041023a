"""Cells by position: any positions, any order, the counts that anndata reads, or an error."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from numpy.typing import NDArray
from scipy import sparse

from datastore import reader as reader_module
from datastore.arenas import Arena, CellBlock
from datastore.buffers import BufferPool
from datastore.genes import GenePanel
from datastore.reader import CellReader
from datastore.store import CellStore, StoreFormatError, open_store
from datastore.store_writing import (
    ArraySizes,
    write_manifest,
    write_partition,
    write_record,
    write_root,
)
from tests.support.cells import dense_store, gene_names, random_counts
from tests.support.stores import flip_bit, write_small_store


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
    "one cell thrice": [42, 42, 42],
    "repeated among others": [5, 60, 5, 6, 60, 5],
    "every other": list(range(1, 70, 2)),
    "scattered": np.random.default_rng(0).integers(0, 70, 200).tolist(),
}


def assert_read(store: CellStore, positions: NDArray[np.int64]) -> None:
    cells = CellReader(store).read(positions)
    np.testing.assert_array_equal(cells.positions, positions)
    assert cells.indptr.dtype == np.int64
    assert cells.indptr[0] == 0
    assert cells.indptr[-1] == len(cells.genes) == len(cells.counts)
    dense = to_dense(cells, len(store.panel))
    np.testing.assert_array_equal(dense, dense_store(store)[positions])


@pytest.mark.parametrize("request_name", REQUESTS)
def test_requests_equal_the_dense_matrix(store: CellStore, request_name: str) -> None:
    assert_read(store, np.array(REQUESTS[request_name], np.int64))


def test_cells_at_the_edges_of_parts(store: CellStore) -> None:
    starts = store.partition_starts
    assert len(starts) == 4
    assert 20 < starts[1] < starts[2] < 60  # "across two edges of parts" is what it says
    assert_read(store, starts[[2, 0, 1]])  # the first cell of each part
    for start in starts[1:-1]:
        assert_read(store, np.array([start - 1, start]))
        assert_read(store, np.array([start, start - 1, start]))


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


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize(
    ("bridge", "limit", "at_once"),
    [(1, 8, 4096), (3, 8, 4096), (64, 8, 4096), (64, 1, 4096), (64, 0, 7), (5, 8, 1)],
)
def test_how_stretches_are_cut_changes_nothing(
    store: CellStore,
    monkeypatch: pytest.MonkeyPatch,
    memory_map: bool,
    bridge: int,
    limit: int,
    at_once: int,
) -> None:
    monkeypatch.setattr(reader_module, "_BRIDGE", bridge)
    monkeypatch.setattr(reader_module, "_SPAN_LIMIT", limit)
    monkeypatch.setattr(reader_module, "_SPAN_FLOOR", limit)
    monkeypatch.setattr(reader_module, "_CELLS_AT_ONCE", at_once)
    reader, expected = CellReader(store, memory_map), dense_store(store)
    rng = np.random.default_rng(bridge + at_once)
    for _ in range(10):
        positions = rng.integers(0, 70, rng.integers(0, 90))
        cells = reader.read(positions)
        np.testing.assert_array_equal(cells.positions, positions)
        np.testing.assert_array_equal(to_dense(cells, len(store.panel)), expected[positions])


def test_scattered_cells_do_not_drag_the_store_along(
    store: CellStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader_module, "_SPAN_FLOOR", 17)
    reader, arena = CellReader(store), Arena()
    dense = reader.plan(np.arange(0, 22))
    assert len(dense.stretches) == 1
    assert len(reader.plan(np.array([0, 4, 9, 21])).stretches) == 1
    few = reader.plan(np.array([0, 10]))  # a fixed number may be read along for any
    assert len(few.stretches) == 1
    lone = reader.plan(np.array([0, 21]))  # 20 cells read along for two wanted ones
    assert len(lone.stretches) == 2
    assert lone.num_values == (dense_store(store)[[0, 21]] > 0).sum()
    assert len(reader.start(lone, arena).result().counts) == lone.num_values


def test_cells_cut_from_an_arena_stay_when_it_is_filled_again(store: CellStore) -> None:
    reader, arena, pool = CellReader(store), Arena(), BufferPool()
    expected = dense_store(store)
    rng = np.random.default_rng(2)
    kept = []
    for _ in range(12):
        positions = rng.permutation(70)[: rng.integers(1, 70)]
        cells = reader.start(reader.plan(positions), arena).result()
        rows = rng.permutation(len(positions))
        kept.append((positions[rows], cells.take(rows, pool)))
    for positions, block in kept:
        np.testing.assert_array_equal(block.positions, positions)
        np.testing.assert_array_equal(to_dense(block, len(store.panel)), expected[positions])


def test_partitions_of_other_widths_are_read_together(tmp_path: Path) -> None:
    counts = random_counts(5, 40, 30)
    counts[25, 3] = 70_000  # the second part needs four bytes a count, the first two
    panel = GenePanel(gene_names(30))
    for number, part in enumerate((counts[:20], counts[20:])):
        obs = pd.DataFrame(index=pd.Index([f"c{row}" for row in range(20)], dtype=object))
        sizes = ArraySizes(cells_per_chunk=4, cells_per_shard=16)
        folder = tmp_path / f"dataset_{number}"
        write_partition(folder, sparse.csr_matrix(part), obs, panel, sizes)
        write_record(tmp_path, number)
    write_root(tmp_path, panel)
    write_manifest(tmp_path, panel, [20, 20], int((counts > 0).sum()), 0, [])
    reader = CellReader(open_store(tmp_path))
    types = [reader.read(np.arange(a, b)).counts.dtype for a, b in ((0, 20), (20, 40), (0, 40))]
    assert types == [np.uint16, np.uint32, np.uint32]
    plans = [reader.plan(np.arange(a, b)) for a, b in ((0, 20), (20, 40), (0, 40))]
    assert [plan.num_bytes / plan.num_values for plan in plans] == [4, 6, 6]
    rows = np.random.default_rng(0).permutation(40)
    np.testing.assert_array_equal(to_dense(reader.read(rows), 30), counts[rows])


def test_cells_without_counts_are_cells(tmp_path: Path) -> None:
    counts = random_counts(6, 30, 12)
    counts[[0, 7, 8, 29]] = 0
    reader = CellReader(write_small_store(tmp_path, counts))
    for rows in ([0], [7, 8], [29, 0, 8, 5], list(range(30))):
        np.testing.assert_array_equal(to_dense(reader.read(np.array(rows)), 12), counts[rows])
    nothing = write_small_store(tmp_path / "nothing", np.zeros((5, 12), np.int64))
    assert CellReader(nothing).read(np.arange(5)).indptr.tolist() == [0] * 6


def test_a_cell_of_very_many_counts_makes_the_arena_grow(tmp_path: Path) -> None:
    counts = np.zeros((6, 20_000), np.int64)
    counts[:, :3] = 1
    counts[3] = np.arange(20_000) % 500 + 1
    reader, arena = CellReader(write_small_store(tmp_path, counts)), Arena()
    for rows in ([0, 1], [3], [5], [2, 3, 4]):
        plan = reader.plan(np.array(rows))
        block = reader.start(plan, arena).result().take(np.arange(len(rows)))
        np.testing.assert_array_equal(to_dense(block, 20_000), counts[rows])


# --- damage ---


def flips_that_pass(folder: Path, array: str, flips: int, seed: int) -> list[tuple[str, int, int]]:
    """Flip random bits of an array's files, one at a time; those that reading did not find."""
    small = write_small_store(
        folder, random_counts(seed, 600, 60), ArraySizes(cells_per_chunk=64, cells_per_shard=256)
    )
    files = [file for file in (small.path / "dataset_0" / "X" / array).rglob("*") if file.is_file()]
    sizes = np.array([file.stat().st_size for file in files])
    rng = np.random.default_rng(seed)
    passed = []
    for _ in range(flips):
        place = int(rng.integers(sizes.sum()))
        number = int(np.searchsorted(np.cumsum(sizes), place, side="right"))
        place, bit = place - int(sizes[:number].sum()), int(rng.integers(8))
        flip_bit(files[number], place, bit)
        try:
            CellReader(small).read(np.arange(600))
        except StoreFormatError as error:
            found = f"dataset_0/X/{array}" in str(error)
        else:
            found = False
        if not found:
            passed.append((str(files[number]), place, bit))
        flip_bit(files[number], place, bit)
    CellReader(small).read(np.arange(600))  # it was the flips that were found
    return passed


@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_reading_finds_flipped_bits(tmp_path: Path, array: str) -> None:
    assert flips_that_pass(tmp_path, array, 40, seed=1) == []


@pytest.mark.slow
@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_reading_finds_a_thousand_flipped_bits(tmp_path: Path, array: str) -> None:
    assert flips_that_pass(tmp_path, array, 1000, seed=2) == []


@pytest.mark.parametrize("memory_map", [True, False])
@pytest.mark.parametrize("array", ["data", "indices", "indptr"])
def test_cut_and_missing_files_are_named(
    copied_store: CellStore, memory_map: bool, array: str
) -> None:
    shards = sorted((copied_store.partition_path(1) / "X" / array / "c").iterdir())
    whole = shards[-1].read_bytes()
    for damage in ("cut", "empty", "missing"):
        shards[-1].unlink()
        if damage != "missing":
            shards[-1].write_bytes(whole[: len(whole) // 2] if damage == "cut" else b"")
        with pytest.raises(StoreFormatError, match=rf"dataset_1/X/{array}.* copy the store again"):
            CellReader(copied_store, memory_map).read(np.arange(70))
        untouched = np.arange(copied_store.partition_starts[1])
        assert len(CellReader(copied_store, memory_map).read(untouched).positions) >= 20
        shards[-1].write_bytes(whole)
