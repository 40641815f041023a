"""Tokens in training order: those of the dense matrix, from any step on, read ahead or not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.arenas import Arena, ArenaCells, ReadPlan
from datastore.binning import tokenize
from datastore.config import BinningConfig, OrderConfig
from datastore.loader import CellLoader, TokenBatch
from datastore.reader import CellReader, PendingCells
from datastore.sampler import CellOrder, CellSampler
from datastore.store import CellStore, StoreFormatError
from tests.support.cells import dense_store
from tests.support.stores import flip_bit

BINNING = BinningConfig(target_sum=200.0)
BATCH = 16
AHEADS = ((1, 2**29), (1, 1), (3, 2000), (10**6, 2**29))
"""Windows and bytes that are read at once: a window, single steps, some, the whole epoch."""


def make_sampler(rank: int, world_size: int, accumulation: int = 2) -> CellSampler:
    order = CellOrder(3, 70, 4, OrderConfig(lanes=4, block=8, window=8))
    return CellSampler(order, BATCH, rank, world_size, accumulation)


def make_loader(
    store: CellStore, ahead: tuple[int, int], rank: int = 0, world_size: int = 1
) -> CellLoader:
    sampler = make_sampler(rank, world_size)
    return CellLoader(CellReader(store), sampler, len(store.panel), BINNING, *ahead)


def assert_equal_steps(one: list[list[TokenBatch]], other: list[list[TokenBatch]]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("ahead", AHEADS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_tokens_are_those_of_the_dense_matrix(
    store: CellStore, ahead: tuple[int, int], world_size: int
) -> None:
    dense = dense_store(store)
    seen = []
    for rank in range(world_size):
        sampler = make_sampler(rank, world_size)
        steps = list(make_loader(store, ahead, rank, world_size).epoch(1))
        assert len(steps) == sampler.steps_per_epoch == 5
        for step, batches in enumerate(steps):
            for batch, positions in zip(batches, sampler.micro_batches(1, step), strict=True):
                np.testing.assert_array_equal(batch.positions, positions)
                rows, genes = np.nonzero(dense[positions])
                ends = np.cumsum((dense[positions] > 0).sum(axis=1))
                expected = tokenize(
                    np.concatenate([[0], ends]).astype(np.int64),
                    genes,
                    dense[positions][rows, genes],
                    len(store.panel),
                    BINNING,
                )
                assert batch.tokens.dtype == np.uint8
                np.testing.assert_array_equal(batch.tokens, expected)
                seen.append(positions)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(3, 70))


@pytest.mark.parametrize("ahead", AHEADS)
@pytest.mark.parametrize("first_step", range(7))
def test_starting_midway_gives_the_tail(
    store: CellStore, ahead: tuple[int, int], first_step: int
) -> None:
    whole = list(make_loader(store, AHEADS[0]).epoch(0))
    tail = list(make_loader(store, ahead).epoch(0, first_step))
    assert_equal_steps(tail, whole[first_step:])


def test_a_rank_without_a_share_gets_empty_batches(store: CellStore) -> None:
    # 67 cells in steps of 16: the last step has 3 cells for 5 ranks.
    for ahead in AHEADS:
        last = [next(make_loader(store, ahead, rank, 5).epoch(0, 4)) for rank in range(5)]
        assert [sum(len(b.positions) for b in step) for step in last] == [1, 1, 1, 0, 0]
        assert [batch.tokens.shape for batch in last[4]] == [(0, len(store.panel))] * 2


class RecordingReader(CellReader):
    """Keeps the positions of each read, and the steps' worth of each plan."""

    def __init__(self, store: CellStore) -> None:
        super().__init__(store)
        self.planned: list[int] = []
        self.started: list[int] = []

    def plan(self, positions: NDArray[np.int64], with_tails: bool = False) -> ReadPlan:
        self.planned.append(len(positions))
        return super().plan(positions, with_tails)

    def start(self, plan: ReadPlan, arena: Arena, former: ArenaCells | None = None) -> PendingCells:
        self.started.append(len(plan.positions))
        return super().start(plan, arena, former)


def test_one_read_is_ahead_of_the_one_in_use(store: CellStore) -> None:
    reader = RecordingReader(store)
    loader = CellLoader(reader, make_sampler(0, 1), len(store.panel), BINNING, windows_ahead=1)
    steps = loader.epoch(0)
    assert reader.planned == reader.started == []
    next(steps)  # a window of 4 lanes has 32 cells, 2 steps
    assert (reader.planned, reader.started) == ([32, 32], [32, 32])
    next(steps)
    assert reader.started == [32, 32]
    next(steps)
    assert (reader.planned, reader.started) == ([32, 32, 3], [32, 32, 3])
    assert len(list(steps)) == 2
    assert (reader.planned, reader.started) == ([32, 32, 3], [32, 32, 3])


@pytest.mark.parametrize(
    ("first_step", "reads"), [(0, [32, 32, 3]), (1, [16, 32, 3]), (2, [32, 3]), (3, [16, 3])]
)
def test_the_first_read_is_one_window(store: CellStore, first_step: int, reads: list[int]) -> None:
    reader = RecordingReader(store)
    loader = CellLoader(reader, make_sampler(0, 1), len(store.panel), BINNING, windows_ahead=2)
    assert len(list(loader.epoch(0, first_step))) == 5 - first_step
    assert reader.started == reads


def test_reads_begin_where_windows_do(store: CellStore) -> None:
    reader = RecordingReader(store)
    loader = CellLoader(reader, make_sampler(0, 1), len(store.panel), BINNING, windows_ahead=1)
    assert len(list(loader.epoch(0, 1))) == 4
    assert reader.started == [16, 32, 3]


def test_reads_are_bounded_in_bytes(store: CellStore) -> None:
    reader = RecordingReader(store)
    loader = CellLoader(
        reader, make_sampler(0, 1), len(store.panel), BINNING, windows_ahead=2, bytes_ahead=1600
    )
    assert len(list(loader.epoch(0))) == 5
    assert max(reader.started) == 16
    assert max(reader.planned) == 48  # which was too much


@pytest.mark.parametrize("ahead", AHEADS)
def test_all_forms_are_of_the_same_cells(store: CellStore, ahead: tuple[int, int]) -> None:
    dense, num_genes = dense_store(store), len(store.panel)
    loader = make_loader(store, ahead)
    forms = zip(loader.cells(0), loader.dense(0), loader.epoch(0), loader.packed(0), strict=True)
    kept = [step for steps in forms for step in zip(*steps, strict=True)]  # all are still whole
    assert sum(len(tokens.positions) for _, _, tokens, _ in kept) == 67
    for cells, counts, tokens, packed in kept:
        expected = dense[tokens.positions]
        assert counts.dtype == np.float32
        np.testing.assert_array_equal(counts, expected)
        rows = np.repeat(np.arange(len(expected)), np.diff(cells.indptr))
        np.testing.assert_array_equal(cells.positions, tokens.positions)
        np.testing.assert_array_equal(expected[rows, cells.genes], cells.counts)
        assert len(cells.counts) == (expected > 0).sum()
        spread = np.zeros((len(expected), num_genes), np.uint8)
        rows = np.repeat(np.arange(len(expected)), np.diff(packed.offsets))
        spread[rows, packed.genes] = packed.bins
        np.testing.assert_array_equal(packed.positions, tokens.positions)
        np.testing.assert_array_equal(spread, tokens.tokens)


def test_a_loader_uses_the_memory_of_batches_that_are_gone(store: CellStore) -> None:
    loader = make_loader(store, AHEADS[0])
    places = {
        batch.tokens.__array_interface__["data"][0]
        for epoch in range(10)
        for step in loader.epoch(epoch)
        for batch in step
    }
    assert len(places) <= 8  # of 100 batches


def test_a_damaged_chunk_stops_the_epoch(copied_store: CellStore) -> None:
    shard = sorted((copied_store.partition_path(2) / "X" / "data" / "c").iterdir())[0]
    flip_bit(shard, 5, 3)
    loader = make_loader(copied_store, AHEADS[0])
    with pytest.raises(StoreFormatError, match="dataset_2/X/data"):
        list(loader.epoch(0))
