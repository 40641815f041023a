"""The order of an epoch in which groups of cells have weights.

Every group has a quota, its places in an epoch, and goes through whole passes over its cells, each
in an order of its own: epoch e takes the turns from e × quota on. So a group that is larger than
its quota is seen whole before any of its cells comes again, and one that is smaller comes again
evenly. Which cells an epoch takes, and how often, is a function of (seed, epoch).

The cells that an epoch takes k times and more form a layer; layers are ordered together as the
generations of a store are (`datastore.mixture`). So the groups of a layer are read in one go, and
copies of a cell lie apart.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.config import OrderConfig
from datastore.mixture import CellList, MixedOrder
from datastore.randomness import derive_key, permute

MOST_REPEATS: Final = 100
"""A cell may come so often in an epoch."""


@dataclass(frozen=True, eq=False)
class Group:
    """Cells of one generation with one weight: their positions, rising."""

    name: str
    generation: int
    positions: NDArray[Any]
    quota: int


@dataclass(frozen=True, eq=False)
class WeightedOrder:
    """The order of one epoch after another over groups with quotas."""

    groups: tuple[Group, ...]
    seed: int
    config: OrderConfig

    def __post_init__(self) -> None:
        if not sum(group.quota for group in self.groups):
            raise ValueError("no group has a place in an epoch: nothing to order")
        for group in self.groups:
            if group.quota > MOST_REPEATS * len(group.positions):
                raise ValueError(
                    f"data.weights would show each of the {len(group.positions)} cells of "
                    f"{group.name!r} {group.quota // len(group.positions)} times an epoch, more "
                    f"than {MOST_REPEATS}; lower its weight or data.balance"
                )

    @property
    def num_cells(self) -> int:
        """Places of one epoch, n."""
        return sum(group.quota for group in self.groups)

    def positions(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of the cell at each place of an epoch."""
        return self._layers(epoch).positions(epoch, places)

    @cached_property
    def _layers(self) -> Callable[[int], MixedOrder]:
        return lru_cache(maxsize=2)(self._order_layers)

    def _order_layers(self, epoch: int) -> MixedOrder:
        repeats = [self._repeats(number, epoch) for number in range(len(self.groups))]
        parts = []
        for generation in sorted({group.generation for group in self.groups}):
            inside = [
                (group.positions, times)
                for group, times in zip(self.groups, repeats, strict=True)
                if group.generation == generation
            ]
            most = max(int(times.max(initial=0)) for _, times in inside)
            for layer in range(most):
                chosen = np.concatenate([cells[times > layer] for cells, times in inside])
                parts.append(CellList(np.sort(chosen)))
        return MixedOrder(tuple(parts), self.seed, self.config)

    def _repeats(self, number: int, epoch: int) -> NDArray[np.int64]:
        """How often an epoch takes each cell of a group."""
        size, quota = len(self.groups[number].positions), self.groups[number].quota
        first, stop = epoch * quota, (epoch + 1) * quota
        repeats = np.zeros(size, np.int64)
        if not quota:
            return repeats
        begun, ended = first // size, (stop - 1) // size
        repeats += max(0, ended - begun - 1)  # passes that lie whole in the epoch
        for one in sorted({begun, ended}):
            key = derive_key(self.seed, "pass", number, one)
            turn = one * size + permute(np.arange(size), size, key)
            repeats += (first <= turn) & (turn < stop)
        return repeats


def quotas(
    sizes: NDArray[np.int64], weights: NDArray[np.float64], num_places: int
) -> NDArray[np.int64]:
    """Share out the places of an epoch by weight; exactly, and one at least to each weight.

    Args:
        sizes: Cells of each group, 1 or more.
        weights: How many times as often a cell of the group is seen, 0 or more.
        num_places: What is shared out; not less than there are groups.
    """
    ideal = num_places * (sizes * weights) / (sizes * weights).sum()
    shares = np.where(weights > 0, np.maximum(np.floor(ideal), 1), 0).astype(np.int64)
    # Rounding down leaves a few places over; the ones at least may have taken too many.
    for _ in range(num_places - int(shares.sum())):
        shares[np.argmax(np.where(weights > 0, ideal - shares, -np.inf))] += 1
    for _ in range(int(shares.sum()) - num_places):
        shares[np.argmax(np.where(shares > 1, shares - ideal, -np.inf))] -= 1
    return shares
