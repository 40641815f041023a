"""Quotas are exact, passes whole, and an epoch the same wherever it is begun."""

from collections import Counter

import numpy as np
import pytest

from datastore.config import OrderConfig
from datastore.sampler import CellSampler
from datastore.weights import Group, WeightedOrder, quotas

SMALL = OrderConfig(lanes=4, block=8, window=8)


def order_of(seed: int = 0) -> WeightedOrder:
    """Cells 0 to 1,199 in two generations: one group of both, one seen often, one seldom."""
    cells = np.arange(1_200)
    return WeightedOrder(
        (
            Group("both", 0, cells[:600][cells[:600] % 3 == 0], 200),
            Group("often", 0, cells[:600][cells[:600] % 3 == 1][:40], 130),
            Group("seldom", 0, cells[:600][cells[:600] % 3 == 2], 45),
            Group("both", 1, cells[600:], 600),
        ),
        seed,
        SMALL,
    )


def epoch_of(order: WeightedOrder, epoch: int) -> list[int]:
    return [int(cell) for cell in order.positions(epoch, np.arange(order.num_cells))]


def test_every_epoch_has_the_quotas_and_passes_are_whole() -> None:
    order = order_of()
    epochs = [Counter(epoch_of(order, epoch)) for epoch in range(20)]
    for group in order.groups:
        size, cells = len(group.positions), group.positions.tolist()
        seen = np.zeros(size, np.int64)
        for number, epoch in enumerate(epochs, 1):
            taken = np.array([epoch[cell] for cell in cells])
            assert taken.sum() == group.quota
            seen += taken
            # However far the group has come, no cell is a whole pass ahead of another.
            assert seen.max() - seen.min() <= 1
            assert seen.sum() == number * group.quota
            assert seen.min() == number * group.quota // size


def test_a_group_as_large_as_its_quota_is_seen_once_an_epoch() -> None:
    order = order_of()
    for epoch in range(3):
        seen = Counter(epoch_of(order, epoch))
        assert all(seen[cell] == 1 for cell in range(0, 600, 3))
        assert all(seen[cell] == 1 for cell in range(600, 1_200))


def test_epochs_and_seeds_take_other_cells() -> None:
    cells = [set(epoch_of(order_of(seed), epoch)) for seed in (0, 1) for epoch in (0, 1)]
    seldom = [{cell for cell in some if cell < 600 and cell % 3 == 2} for some in cells]
    assert seldom[0].isdisjoint(seldom[1])  # of 200 cells, 45 each
    assert len(seldom[0] & seldom[2]) < 25  # 10 by chance


@pytest.mark.parametrize("world_size", [1, 2, 3, 7, 64])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_batches_are_the_same_for_any_world(world_size: int, accumulation: int) -> None:
    alone, order = CellSampler(order_of(), 96, 0, 1, 1), order_of()
    seen: list[int] = []
    for step in range(alone.steps_per_epoch):
        batch = np.concatenate(
            [
                cells
                for rank in range(world_size)
                for cells in CellSampler(order, 96, rank, world_size, accumulation).micro_batches(
                    5, step
                )
            ]
        )
        expected = alone.micro_batches(5, step)[0]
        np.testing.assert_array_equal(np.sort(batch), np.sort(expected))
        seen += batch.tolist()
    assert sorted(seen) == sorted(epoch_of(order_of(), 5))


def test_batches_mix_groups_as_chance_would() -> None:
    """Of a group seen ten times an epoch, one seen a third, and one in between."""
    rng = np.random.default_rng(0)
    label = rng.choice(3, 300_000, p=[0.02, 0.68, 0.3])
    shares = [10.0, 1 / 3, 1.0]
    cells = [np.flatnonzero(label == number) for number in range(3)]
    groups = [
        Group(str(number), 0, inside, int(len(inside) * share))
        for number, (inside, share) in enumerate(zip(cells, shares, strict=True))
    ]
    order = WeightedOrder(tuple(groups), 0, OrderConfig())
    total, ratios = order.num_cells, []
    for epoch in range(8):
        seen = label[order.positions(epoch, np.arange(total))][: total // 512 * 512]
        for number, group in enumerate(groups):
            counts = (seen.reshape(-1, 512) == number).sum(axis=1)
            share = group.quota / total
            ratios.append(counts.var() / (512 * share * (1 - share)))
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)  # standard error 0.02


@pytest.mark.parametrize(
    ("sizes", "weights", "places", "expected"),
    [
        pytest.param([10, 20, 30], [1, 1, 1], 60, [10, 20, 30], id="equal weights"),
        pytest.param([10, 20, 30], [2, 1, 1], 60, [17, 17, 26], id="one doubled"),
        pytest.param([10, 20, 30], [0, 1, 1], 50, [0, 20, 30], id="one left out"),
        pytest.param([1, 1_000], [1e-6, 1], 1_001, [1, 1_000], id="never rounded to nothing"),
        pytest.param([5, 5, 5, 85], [1, 1, 1, 1e9], 100, [1, 1, 1, 97], id="taken from the large"),
    ],
)
def test_quotas(sizes: list[int], weights: list[float], places: int, expected: list[int]) -> None:
    assert quotas(np.array(sizes), np.array(weights, float), places).tolist() == expected


def test_quotas_are_exact_and_near_their_ideal() -> None:
    rng = np.random.default_rng(1)
    for _ in range(200):
        sizes = rng.integers(1, 10_000, rng.integers(1, 30))
        weights = rng.uniform(0, 3, len(sizes))
        shares = quotas(sizes, weights, int(sizes.sum()))
        ideal = sizes.sum() * sizes * weights / (sizes * weights).sum()
        assert shares.sum() == sizes.sum()
        assert np.abs(shares - ideal).max() < 1.5
        assert shares.min() >= 1


def test_endless_repeats_are_refused_by_name() -> None:
    groups = (Group("rare", 0, np.arange(3), 400), Group("else", 0, np.arange(3, 900), 497))
    with pytest.raises(ValueError, match=r"each of the 3 cells of 'rare' 133 times an epoch, more"):
        WeightedOrder(groups, 0, SMALL)
