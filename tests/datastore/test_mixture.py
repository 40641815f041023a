"""Several parts in one order: exact shares, each part read run by run, mixed as by chance."""

import time
import tracemalloc
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from datastore import mixture
from datastore.config import OrderConfig
from datastore.mixture import CellList, CellSpan, MixedOrder
from datastore.randomness import derive_key, mix, permute
from datastore.sampler import CellOrder, CellSampler

SMALL = OrderConfig(lanes=4, block=8, window=6)
WORLDS = (1, 2, 3, 7, 64)


def generations(sizes: Sequence[int], config: OrderConfig = SMALL, seed: int = 0) -> MixedOrder:
    """The order of a store that grew by these many cells at a time."""
    starts = np.cumsum([0, *sizes])
    parts = [CellSpan(int(a), size, 0, size) for a, size in zip(starts, sizes, strict=False)]
    return MixedOrder(tuple(parts), seed, config)


def part_of(positions: NDArray[np.int64], sizes: Sequence[int]) -> NDArray[np.int64]:
    return np.searchsorted(np.cumsum(sizes), positions, side="right")


def whole_epoch(order: MixedOrder, epoch: int = 0) -> NDArray[np.int64]:
    return order.positions(epoch, np.arange(order.num_cells))


@pytest.fixture
def short_strata(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixture, "STRATUM", 50)


# --- one part, several parts, laid out by hand ---


def test_one_part_is_ordered_as_a_range_is() -> None:
    order = MixedOrder((CellSpan(7, 500, 0, 500),), 3, SMALL)
    alone = CellOrder(7, 507, 3, SMALL)
    places = np.arange(500)
    for epoch in (0, 1, 5):
        np.testing.assert_array_equal(
            order.positions(epoch, places), alone.positions(epoch, places)
        )


@pytest.mark.usefixtures("short_strata")
def test_the_order_equals_lists_laid_out_by_hand() -> None:
    sizes, lanes = [210, 61, 7, 2], 4
    config = OrderConfig(lanes=lanes, block=8, window=100)
    order = generations(sizes, config, seed=5)
    for epoch in (0, 3):
        own: list[list[list[int]]] = []  # of each part, lane by lane
        for number, (start, size) in enumerate(zip(np.cumsum([0, *sizes]), sizes, strict=False)):
            seed = derive_key(5, "part", number) if number else 5
            window = [75, 25, 25, 25][number]  # of 100: the share of cells, a quarter at the least
            mine = OrderConfig(lanes=lanes, block=8, window=window)
            alone = CellOrder(int(start), int(start) + size, seed, mine)
            laid_out = alone.positions(epoch, np.arange(size)).tolist()
            own.append([laid_out[lane::lanes] for lane in range(lanes)])
        # Own lanes of 53 53 52 52, 16 15 15 15, 2 2 2 1 and 1 1 0 0 cells: each part's long ones
        # follow those of the part before it.
        turned = [[0, 1, 2, 3], [2, 3, 0, 1], [1, 2, 3, 0], [2, 3, 0, 1]]
        expected: list[list[int]] = []
        for lane in range(lanes):
            streams = [own[part][turned[part][lane]] for part in range(4)]
            lengths = [len(stream) for stream in streams]
            cells: list[int] = []
            for number, begin in enumerate(range(0, 70, 12)):
                edges = (begin, min(begin + 12, 70))
                low, high = (dealt_by_hand(lengths, turns, lane) for turns in edges)
                labels = [p for p in range(4) for _ in range(high[p] - low[p])]
                key = mix(mix(derive_key(5, "strata", epoch), lane), number)
                shuffle = sorted(range(len(labels)), key=lambda turn: int(mix(key, turn)))
                cells += [streams[part].pop(0) for part in (labels[turn] for turn in shuffle)]
            assert streams == [[]] * 4
            expected.append(cells)
        dealt = [expected[place % lanes][place // lanes] for place in range(280)]
        assert whole_epoch(order, epoch).tolist() == dealt


def dealt_by_hand(lengths: Sequence[int], turns: int, lane: int) -> list[int]:
    """Turns of each part among the first of a lane, in exact fractions."""
    dealt = []
    for number, length in enumerate(lengths):
        left = sum(lengths[number:])
        rounding = int((number * 2**0.5 + lane * (5**0.5 - 1) / 2) % 1 * left)
        dealt.append(int(Fraction(turns * length + rounding, max(left, 1))))
        turns -= dealt[-1]
    return dealt


# --- exactly once ---

GROWN = (400, 90, 3, 1, 77)


@pytest.mark.usefixtures("short_strata")
@pytest.mark.parametrize("world_size", WORLDS)
@pytest.mark.parametrize("accumulation", [1, 2, 5])
def test_each_cell_once_and_the_same_batches_for_any_world(
    world_size: int, accumulation: int
) -> None:
    order = generations(GROWN)
    alone = CellSampler(order, 64, 0, 1, 1)
    seen = []
    for step in range(alone.steps_per_epoch):
        ranks = [
            CellSampler(order, 64, rank, world_size, accumulation).micro_batches(1, step)
            for rank in range(world_size)
        ]
        sizes = [sum(map(len, micro)) for micro in ranks]
        assert max(sizes) - min(sizes) <= 1
        assert {len(micro) for micro in ranks} == {accumulation}
        batch = np.concatenate([cells for micro in ranks for cells in micro])
        expected = alone.micro_batches(1, step)[0]
        np.testing.assert_array_equal(np.sort(batch), np.sort(expected))
        seen.append(batch)
    np.testing.assert_array_equal(np.sort(np.concatenate(seen)), np.arange(sum(GROWN)))


def test_each_cell_once_over_whole_strata() -> None:
    sizes = (150_000, 40_000, 20_001)
    order = generations(sizes, OrderConfig())
    for epoch in (0, 1):
        positions = whole_epoch(order, epoch)
        np.testing.assert_array_equal(np.sort(positions), np.arange(sum(sizes)))
    assert (whole_epoch(order, 0) == positions).mean() < 0.001


def test_a_plan_of_steps_is_the_steps_one_by_one() -> None:
    for order in (generations(GROWN), CellOrder(0, 571, 0, SMALL)):
        sampler = CellSampler(order, 64, 1, 3, 2)
        plan = sampler.plan(2, range(3, sampler.steps_per_epoch))
        assert len(plan) == sampler.steps_per_epoch - 3
        for step, batches in enumerate(plan, 3):
            for one, other in zip(batches, sampler.micro_batches(2, step), strict=True):
                np.testing.assert_array_equal(one, other)
        assert sampler.plan(0, range(0)) == []


@pytest.mark.usefixtures("short_strata")
def test_places_may_be_asked_for_in_any_shape_and_order() -> None:
    order = generations(GROWN)
    whole = whole_epoch(order)
    places = np.random.default_rng(0).permutation(571)[:560].reshape(7, 80)
    again = generations(GROWN).positions(0, places)  # another object, nothing cached
    np.testing.assert_array_equal(again, whole[places])


@pytest.mark.parametrize("lanes", [1, 7, 64])
def test_shares_never_fall_and_end_exactly(lanes: int) -> None:
    rng = np.random.default_rng(0)
    for _ in range(10):
        sizes = rng.integers(1, 10 ** rng.integers(2, 5), rng.integers(1, 40)).tolist()
        order = generations(sizes, OrderConfig(lanes=lanes))
        lengths = order._lengths
        assert lengths.sum(axis=1).tolist() == sizes
        even = [len(lane) for lane in np.array_split(np.arange(sum(sizes)), lanes)]
        assert lengths.sum(axis=0).tolist() == even
        turns = range(0, even[0] + 1, max(1, even[0] // 500))
        dealt = np.array([order._dealt_before(turn) for turn in [*turns, even[0]]])
        expected = np.minimum(np.array([*turns, even[0]])[:, None], even)
        np.testing.assert_array_equal(dealt.sum(axis=1), expected)
        assert np.diff(dealt, axis=0).min() >= 0
        np.testing.assert_array_equal(dealt[-1], lengths)
        ideal = expected[:, None, :] * (lengths / np.maximum(even, 1))
        assert np.abs(dealt - ideal).max() < 6  # of 1,024 turns; worst 4.0, of 38 parts


def test_lists_and_turned_spans_are_parts() -> None:
    listed, turned = np.arange(0, 90, 3), CellSpan(100, 120, 40, 100)
    order = MixedOrder((CellList(listed.astype(np.uint32)), turned), 1, SMALL)
    cells = np.sort(whole_epoch(order))
    np.testing.assert_array_equal(cells[:30], listed)
    np.testing.assert_array_equal(cells[30:], np.sort(100 + (40 + np.arange(100)) % 120))


@pytest.mark.parametrize("parts", [(), (CellSpan(0, 5, 0, 5), CellSpan(5, 5, 0, 0))])
def test_parts_without_cells_are_refused(parts: tuple[CellSpan, ...]) -> None:
    with pytest.raises(ValueError, match="nothing to order"):
        MixedOrder(parts, 0, SMALL)


# --- mixing ---


def dispersion(labels: NDArray[np.int64], batch: int) -> float:
    """Variance of the labels' shares of batches over what drawing without replacement gives."""
    num_batches = len(labels) // batch
    totals = np.bincount(labels)
    rows = labels[: num_batches * batch].reshape(num_batches, batch)
    observed = np.stack([(rows == label).sum(axis=1) for label in range(len(totals))])
    share = totals / len(labels)
    finite = (len(labels) - batch) / (len(labels) - 1)
    squares = (observed - batch * share[:, None]) ** 2 / (batch * share[:, None] * finite)
    return float(squares.sum() / (num_batches * (len(totals) - 1)))


def test_the_measure_of_mixing_knows_good_from_bad() -> None:
    labels = np.repeat(np.arange(4), [60_000, 30_000, 20_000, 18_000])
    shuffled = np.random.default_rng(0).permutation(labels)
    assert dispersion(shuffled, 512) == pytest.approx(1, abs=0.15)
    by_64 = np.random.default_rng(0).permutation(labels[::64])  # runs of 64 cells of one source
    assert dispersion(np.repeat(by_64, 64), 512) > 20


def test_a_tiny_generation_is_spread_evenly() -> None:
    """Not in clumps of a cell per lane, though there is less than one in a lane's stratum."""
    sizes = (998_000, 2_000)
    positions = whole_epoch(generations(sizes, OrderConfig()))
    per_stratum = np.bincount(np.flatnonzero(positions >= 998_000) // mixture.STRATUM)
    assert per_stratum[:15].min() > 131 - 20  # 131 are its share
    assert per_stratum[:15].max() < 131 + 20
    assert dispersion(part_of(positions, sizes), 512) == pytest.approx(1, abs=0.1)  # error 0.03


@pytest.mark.parametrize("epoch", [0, 3])
def test_batches_mix_generations_and_sources_as_chance_would(epoch: int) -> None:
    """Sources are shuffled into places as ingest does it, generations follow each other."""
    sources = [[500_000, 120_000, 60_000, 20_000], [150_000, 90_000], [60_000]]
    sizes = [sum(generation) for generation in sources]
    labels = []
    for number, generation in enumerate(sources):
        first = sum(map(len, sources[:number]))
        label = np.repeat(np.arange(first, first + len(generation)), generation)
        placed = np.empty_like(label)
        index = np.arange(len(label))
        placed[permute(index, len(label), derive_key(0, "store", number))] = label
        labels.append(placed)
    positions = whole_epoch(generations(sizes, OrderConfig()), epoch)
    # 1,953 batches: standard error 0.022 over two degrees of freedom, 0.013 over six.
    assert dispersion(part_of(positions, sizes), 512) == pytest.approx(1, abs=0.05)
    assert dispersion(np.concatenate(labels)[positions], 512) == pytest.approx(1, abs=0.05)


# --- what a rank reads ---


@pytest.mark.parametrize("world_size", [1, 2, 4, 16])
def test_ranks_read_their_own_lanes_of_every_part(world_size: int) -> None:
    order = generations((600, 251, 149), OrderConfig(lanes=16, block=8, window=8))
    lane_at = np.empty(1000, np.int64)
    lane_at[whole_epoch(order)] = np.arange(1000) % 16
    for rank in range(world_size):
        sampler = CellSampler(order, 64, rank, world_size, 1)
        for step in range(15):  # the last, short batch is dealt evenly instead
            lanes = lane_at[sampler.micro_batches(0, step)[0]]
            assert set(lanes * world_size // 16) == {rank}


@pytest.mark.parametrize(("world_size", "most"), [(1, 3.0), (8, 1.3), (64, 1.1)])
def test_what_is_read_ahead_lies_together(world_size: int, most: float) -> None:
    """Chunks of 64 cells decoded, over those that the same number of cells fills."""
    sizes = (6_000_000, 2_500_000, 1_000_000, 500_000)
    sampler = CellSampler(generations(sizes, OrderConfig()), 512 * world_size, 0, world_size, 1)
    ahead = np.concatenate([step[0] for step in sampler.plan(0, range(100, 164))])
    assert len(ahead) == 32_768
    assert len(np.unique(ahead // 64)) < most * 512  # measured 2.6, 1.21, 1.04


# --- size ---


def test_a_billion_cells_in_many_generations_cost_little() -> None:
    rng = np.random.default_rng(0)
    sizes = np.diff([0, *np.sort(rng.integers(1, 10**9, 199)), 10**9]).tolist()
    tracemalloc.start()
    begin = time.process_time()
    sampler = CellSampler(generations(sizes, OrderConfig()), 512, 0, 1, 1)
    first = sampler.micro_batches(0, 1_000_000)[0]
    seconds = time.process_time() - begin
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert len(np.unique(first)) == 512
    assert seconds < 1  # measured 0.1, traced; 0.02 without
    assert peak < 20 * 2**20  # bytes; measured 4 MB
    assert len(np.unique(part_of(first, sizes))) > 50
