"""Tokens in training order: those of the dense matrix, from any step on, read ahead or not."""

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.binning import tokenize
from datastore.config import BinningConfig, OrderConfig
from datastore.loader import CellLoader, TokenBatch
from datastore.reader import CellBlock, CellReader
from datastore.sampler import CellOrder, CellSampler
from datastore.store import CellStore
from tests.support.cells import dense_store

BINNING = BinningConfig(target_sum=200.0)
BATCH = 16
AHEADS = (1, 16, 40, 10**6)


def make_sampler(rank: int, world_size: int, accumulation: int = 2) -> CellSampler:
    order = CellOrder(3, 70, 4, OrderConfig(lanes=4, block=8, window=8))
    return CellSampler(order, BATCH, rank, world_size, accumulation)


def make_loader(store: CellStore, ahead: int, rank: int = 0, world_size: int = 1) -> CellLoader:
    sampler = make_sampler(rank, world_size)
    return CellLoader(CellReader(store), sampler, len(store.panel), BINNING, ahead)


def assert_equal_steps(one: list[list[TokenBatch]], other: list[list[TokenBatch]]) -> None:
    assert len(one) == len(other)
    for left, right in zip(one, other, strict=True):
        for a, b in zip(left, right, strict=True):
            np.testing.assert_array_equal(a.positions, b.positions)
            np.testing.assert_array_equal(a.tokens, b.tokens)


@pytest.mark.parametrize("ahead", AHEADS)
@pytest.mark.parametrize("world_size", [1, 3])
def test_tokens_are_those_of_the_dense_matrix(
    store: CellStore, ahead: int, world_size: int
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
def test_starting_midway_gives_the_tail(store: CellStore, ahead: int, first_step: int) -> None:
    whole = list(make_loader(store, 40).epoch(0))
    tail = list(make_loader(store, ahead).epoch(0, first_step))
    assert_equal_steps(tail, whole[first_step:])


def test_a_rank_without_a_share_gets_empty_batches(store: CellStore) -> None:
    # 67 cells in steps of 16: the last step has 3 cells for 5 ranks.
    for ahead in (1, 10**6):
        last = [next(make_loader(store, ahead, rank, 5).epoch(0, 4)) for rank in range(5)]
        assert [sum(len(b.positions) for b in step) for step in last] == [1, 1, 1, 0, 0]
        assert [batch.tokens.shape for batch in last[4]] == [(0, len(store.panel))] * 2


def test_nothing_is_read_before_it_is_asked_for(store: CellStore) -> None:
    reads: list[int] = []

    class CountingReader(CellReader):
        def read(self, positions: NDArray[np.int64]) -> CellBlock:
            reads.append(len(positions))
            return super().read(positions)

    loader = CellLoader(
        CountingReader(store), make_sampler(0, 1), len(store.panel), BINNING, 2 * BATCH
    )
    steps = loader.epoch(0)
    assert reads == []
    next(steps)
    assert reads == [32]
    list(steps)
    assert reads == [32, 32, 3]
