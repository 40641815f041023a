"""A chunk that two reads share is decoded by the first, and the cells stay what they are."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.arenas import Arena, ArenaCells, CellBlock
from datastore.config import BinningConfig, OrderConfig
from datastore.loader import CellLoader
from datastore.reader import CellReader
from datastore.sampler import CellOrder, CellSampler
from datastore.store import CellStore, StoreFormatError
from datastore.store_writing import ArraySizes
from tests.support.cells import random_counts
from tests.support.stores import flip_bit, write_small_store

CHUNK = 1024  # values, the smallest there is; a cell has about 60
COUNTS = random_counts(9, 600, 150)


@pytest.fixture
def long_store(tmp_path: Path) -> CellStore:
    return write_small_store(tmp_path, COUNTS, ArraySizes(cells_per_chunk=10, cells_per_shard=200))


def read(
    reader: CellReader, rows: range, former: ArenaCells | None = None
) -> tuple[ArenaCells, CellBlock]:
    plan = reader.plan(np.arange(rows.start, rows.stop), with_tails=True)
    cells = reader.start(plan, Arena(), former).result()
    return cells, cells.take(np.arange(len(rows)))


def assert_cells(block: CellBlock, rows: NDArray[np.int64]) -> None:
    np.testing.assert_array_equal(block.positions, rows)
    for row, (start, stop) in zip(rows, pairwise(block.indptr.tolist()), strict=True):
        expected = np.flatnonzero(COUNTS[row])
        np.testing.assert_array_equal(block.genes[start:stop], expected)
        np.testing.assert_array_equal(block.counts[start:stop], COUNTS[row, expected])


def damage_chunk(store: CellStore, array: str, number: int) -> None:
    path = store.path / "dataset_0" / "X" / array / "c" / "0"
    shard = path.read_bytes()
    chunks = round(60 * 200 / CHUNK)
    table = np.frombuffer(shard[-(16 * chunks + 4) : -4], "<u8").reshape(chunks, 2)
    flip_bit(path, int(table[number, 0]) + 20, 3)


def test_the_rest_of_a_chunk_is_not_decoded_again(long_store: CellStore) -> None:
    reader = CellReader(long_store, memory_map=False)
    first, block = read(reader, range(64))
    assert_cells(block, np.arange(64))
    (stretch,) = first.plan.stretches
    assert (stretch.stop + stretch.tail) % CHUNK == 0
    assert 0 < stretch.tail < CHUNK
    for array in ("data", "indices"):
        damage_chunk(long_store, array, stretch.stop // CHUNK)
    with pytest.raises(StoreFormatError, match="is damaged"):
        read(reader, range(64, 128))
    second, block = read(reader, range(64, 128), first)
    assert_cells(block, np.arange(64, 128))
    assert second.plan.stretches[0].start == stretch.stop


@pytest.mark.parametrize(
    ("rows", "then"),
    [
        pytest.param(range(64), range(65, 128), id="a cell is left out"),
        pytest.param(range(64), range(30, 128), id="cells come again"),
        pytest.param(range(64), range(64, 65), id="less than the tail is wanted"),
        pytest.param(range(500, 600), range(70), id="at the end of the array"),
        pytest.param(range(3), range(3, 60), id="too short for a tail"),
    ],
)
def test_any_next_read_is_right(long_store: CellStore, rows: range, then: range) -> None:
    reader = CellReader(long_store)
    first, block = read(reader, rows)
    assert_cells(block, np.array(rows))
    _, block = read(reader, then, first)
    assert_cells(block, np.array(then))


@pytest.mark.parametrize("first_step", [0, 5])
def test_an_epoch_of_long_windows_has_each_cell(long_store: CellStore, first_step: int) -> None:
    order = OrderConfig(lanes=2, block=256, window=48)
    sampler = CellSampler(CellOrder(0, 600, 3, order), 16, 0, 1, 1)
    loader = CellLoader(CellReader(long_store), sampler, 150, BinningConfig())
    number = first_step
    for (block,) in loader.cells(1, first_step):
        assert_cells(block, sampler.micro_batches(1, number)[0])
        number += 1
    assert number == sampler.steps_per_epoch
