"""The order of cells: each once, the same for any number of ranks, a pure function."""

import tracemalloc
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore.config import OrderConfig
from datastore.randomness import derive_key, mix, permute
from datastore.sampler import CellOrder, CellSampler


@dataclass(frozen=True)
class Case:
    """Cells [start, start + n) and how they are ordered and dealt."""

    n: int
    lanes: int
    block: int
    window: int
    batch: int
    start: int = 0

    def order(self, seed: int = 0) -> CellOrder:
        config = OrderConfig(lanes=self.lanes, block=self.block, window=self.window)
        return CellOrder(self.start, self.start + self.n, seed, config)

    def sampler(
        self, rank: int = 0, world_size: int = 1, accumulation: int = 1, seed: int = 0
    ) -> CellSampler:
        return CellSampler(self.order(seed), self.batch, rank, world_size, accumulation)


CASES = [
    pytest.param(Case(n=96, lanes=4, block=8, window=6, batch=12), id="all divides"),
    pytest.param(Case(n=101, lanes=4, block=8, window=6, batch=12), id="nothing divides"),
    pytest.param(Case(n=101, lanes=7, block=9, window=5, batch=10, start=50), id="held-out tail"),
    pytest.param(Case(n=1, lanes=4, block=8, window=6, batch=12), id="one cell"),
    pytest.param(Case(n=5, lanes=8, block=3, window=4, batch=2), id="fewer cells than lanes"),
    pytest.param(Case(n=33, lanes=2, block=64, window=6, batch=8), id="block above all cells"),
    pytest.param(Case(n=64, lanes=2, block=64, window=6, batch=8), id="one whole block"),
    pytest.param(Case(n=33, lanes=2, block=4, window=100, batch=8), id="window above a lane"),
    pytest.param(Case(n=33, lanes=1, block=1, window=1, batch=1), id="all ones"),
    pytest.param(Case(n=33, lanes=3, block=5, window=4, batch=100), id="batch above all cells"),
    pytest.param(Case(n=500, lanes=64, block=16, window=8, batch=128), id="default lanes"),
]
WORLDS = (1, 2, 3, 4, 7)


def epoch_by_hand(case: Case, seed: int, epoch: int) -> list[int]:
    """Lay out the whole epoch with lists: blocks, then lanes, then windows, then deal."""
    cells = list(range(case.start, case.start + case.n))
    size = max(1, min(case.block, case.n // case.lanes))
    full = case.n // size
    key = derive_key(seed, "blocks", epoch)
    blocks = [cells[k * size : (k + 1) * size] for k in range(full)]
    sequence = [blocks[int(permute(slot, full, key))] for slot in range(full)]
    # A short rest is inserted before one of the blocks, or after the last.
    sequence.insert(int(mix(key, full)) % (full + 1), cells[full * size :])
    flat = [cell for block in sequence for cell in block]

    lanes = [part.tolist() for part in np.array_split(np.array(flat), case.lanes)]
    shuffled = []
    for number, lane in enumerate(lanes):
        out = []
        for window, begin in enumerate(range(0, len(lane), case.window)):
            part = lane[begin : begin + case.window]
            window_key = mix(mix(derive_key(seed, "window", epoch), number), window)
            out += [part[int(permute(place, len(part), window_key))] for place in range(len(part))]
        shuffled.append(out)

    dealt = []
    while any(shuffled):
        dealt += [lane.pop(0) for lane in shuffled if lane]
    return dealt


@pytest.mark.parametrize("case", CASES)
def test_order_equals_lists_laid_out_by_hand(case: Case) -> None:
    for seed, epoch in [(0, 0), (0, 1), (9, 3)]:
        positions = case.order(seed).positions(epoch, np.arange(case.n))
        assert positions.tolist() == epoch_by_hand(case, seed, epoch)


@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("case", CASES)
def test_each_cell_once_and_the_same_batches_for_any_world(case: Case, world_size: int) -> None:
    alone = case.sampler()
    seen: list[NDArray[np.int64]] = []
    for step in range(alone.steps_per_epoch):
        shares = [
            case.sampler(rank, world_size, 3).micro_batches(2, step) for rank in range(world_size)
        ]
        assert {len(share) for share in shares} == {3}
        sizes = [sum(map(len, share)) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        assert all(max(map(len, s)) - min(map(len, s)) <= 1 for s in shares)
        batch = np.concatenate([cells for share in shares for cells in share])
        expected = np.concatenate(alone.micro_batches(2, step))
        assert len(expected) == min(case.batch, case.n - step * case.batch)
        np.testing.assert_array_equal(np.sort(batch), np.sort(expected))
        seen.append(batch)
    everything = np.sort(np.concatenate(seen))
    np.testing.assert_array_equal(everything, np.arange(case.start, case.start + case.n))


def test_a_sampler_keeps_no_state() -> None:
    case = Case(n=101, lanes=4, block=8, window=6, batch=12)
    first = case.sampler(1, 3, 2)
    sequence = [first.micro_batches(0, step) for step in range(first.steps_per_epoch)]
    for step in (5, 0, 8, 5, 3):  # another object, another order of calls
        again = case.sampler(1, 3, 2).micro_batches(0, step)
        for one, other in zip(sequence[step], again, strict=True):
            np.testing.assert_array_equal(one, other)
        for one, other in zip(sequence[step], first.micro_batches(0, step), strict=True):
            np.testing.assert_array_equal(one, other)


def test_places_may_be_asked_for_in_any_shape_and_order() -> None:
    order = Case(n=101, lanes=4, block=8, window=6, batch=12).order()
    whole = order.positions(0, np.arange(101))
    places = np.random.default_rng(0).permutation(101)[:100].reshape(4, 25)
    np.testing.assert_array_equal(order.positions(0, places), whole[places])


def test_epochs_and_seeds_have_different_orders() -> None:
    case = Case(n=5000, lanes=8, block=64, window=64, batch=64)
    orders = [
        case.order(seed).positions(epoch, np.arange(5000)) for seed in (0, 1) for epoch in (0, 1, 2)
    ]
    for number, one in enumerate(orders):
        for other in orders[:number]:
            assert (one == other).mean() < 0.01  # 1 in 5,000 is expected
            correlation = np.corrcoef(one, other)[0, 1]
            # 78 blocks are shuffled, so 1/sqrt(78) is the standard deviation.
            assert abs(correlation) < 4.5 / np.sqrt(78)


def test_batches_mix_far_parts_of_the_store() -> None:
    case = Case(n=16_384, lanes=64, block=64, window=64, batch=128)
    for step in (0, 17, 100):
        batch = np.concatenate(case.sampler().micro_batches(0, step))
        # Of 256 blocks, 64 lanes hold 64 different ones at any time.
        assert len(np.unique(batch // 64)) >= 64


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize(
    "batch",
    [pytest.param(16, id="each lane twice a batch"), pytest.param(8, id="each lane once a batch")],
)
def test_ranks_read_only_their_own_lanes(world_size: int, batch: int) -> None:
    case = Case(n=403, lanes=8, block=10, window=12, batch=batch)
    place_of = np.empty(403, np.int64)
    place_of[case.order().positions(0, np.arange(403))] = np.arange(403)
    lanes_per_rank = 8 // world_size
    whole_steps = 403 // batch  # the last, short batch is dealt evenly instead
    for rank in range(world_size):
        sampler = case.sampler(rank, world_size, 2)
        for step in range(whole_steps):
            lanes = place_of[np.concatenate(sampler.micro_batches(0, step))] % 8
            assert set(lanes // lanes_per_rank) == {rank}


def test_a_rank_reads_neighbours() -> None:
    """What a rank fetches ahead lies in few blocks, so reads are long."""
    case = Case(n=65_536, lanes=16, block=256, window=256, batch=64)
    sampler = case.sampler(1, 4)
    ahead = np.concatenate(
        [cells for step in range(64) for cells in sampler.micro_batches(0, step)]
    )
    assert len(ahead) == 64 * 16
    # 4 lanes, a window of 256 each, that touches at most 2 blocks.
    assert len(np.unique(ahead // 256)) <= 8


def test_a_billion_cells_are_ordered_in_small_memory() -> None:
    config = OrderConfig()
    order = CellOrder(0, 10**9, 0, config)
    sampler = CellSampler(order, 8192, 3, 64, 4)
    tracemalloc.start()
    for step in (0, 1, sampler.steps_per_epoch // 2, sampler.steps_per_epoch - 2):
        positions = np.concatenate(sampler.micro_batches(1, step))
        assert len(np.unique(positions)) == 128
        assert positions.min() >= 0
        assert positions.max() < 10**9
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * 2**20  # bytes; a list of a billion cells would take 8 GB
    places = np.arange(10**9 - 20_000, 10**9)
    assert len(np.unique(order.positions(0, places))) == 20_000


def test_the_last_step_may_be_smaller_but_none_is_empty() -> None:
    for n, batch in pairwise([12, 24, 25, 100, 7, 1, 3]):
        sampler = Case(n=n, lanes=4, block=8, window=6, batch=batch).sampler()
        sizes = [len(sampler.micro_batches(0, s)[0]) for s in range(sampler.steps_per_epoch)]
        assert sum(sizes) == n
        assert set(sizes[:-1]) <= {batch}
        assert 0 < sizes[-1] <= batch


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (5, 5), (6, 5), (-1, 5)])
def test_nothing_to_order_is_refused(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="nothing to order"):
        CellOrder(start, stop, 0, OrderConfig())


@pytest.mark.parametrize("name", ["lanes", "block", "window"])
def test_order_settings_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=f"order.{name} is 0; give 1 or more"):
        OrderConfig(**{name: 0})
