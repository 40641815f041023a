"""The order of several parts together, such as the generations of a store that grew.

Each part is uniformly shuffled in itself and has an order of its own (`datastore.sampler`); here
their places are mixed, lane by lane:

1. Every part is cut into the same number of lanes; lane k of the whole is lane k of all parts.
2. A lane is cut into strata of about a thousand turns. A part's share of a stratum is its share of
   the lane, to a few cells at most, and exactly its cells over the epoch.
3. Within a stratum, a keyed shuffle says which turn belongs to which part.
4. The n-th turn of a part takes the n-th cell of the part's own lane.

So a batch has as many cells of each part as if it had been drawn from all of the stratum, ranks
read from their own lanes, and each part is read run by run. Still a pure function of (seed, epoch,
place); one part alone is ordered as `CellOrder` does it.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Final, Protocol

import numpy as np
from numpy.typing import NDArray

from datastore.config import OrderConfig
from datastore.randomness import derive_key, mix
from datastore.sampler import shuffle_keys, shuffled

STRATUM: Final = 65_536
"""Places over all lanes in which the shares of the parts are even."""
_SHORTEST_WINDOW: Final = 4
"""The shortest window is this part of the longest: a quarter of a chunk; less would hardly make
reads any shorter."""
_GOLDEN_RATIO: Final = (5**0.5 - 1) / 2
_SQUARE_ROOT: Final = 2**0.5


class CellSet(Protocol):
    """Some cells of the store, in the order of their positions."""

    @property
    def num_cells(self) -> int:
        """How many they are."""

    def at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of each index."""


@dataclass(frozen=True)
class CellSpan:
    """`num_cells` of the positions [start, start + size), from the `first` on and going round."""

    start: int
    size: int
    first: int
    num_cells: int

    def at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of each index."""
        return self.start + (self.first + index) % self.size

    def holds(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell of each position in [start, start + size) whether it is one of them."""
        return (positions - self.start - self.first) % self.size < self.num_cells


@dataclass(frozen=True, eq=False)
class CellList:
    """Cells anywhere: their positions, rising."""

    positions: NDArray[Any]

    @property
    def num_cells(self) -> int:
        """How many they are."""
        return len(self.positions)

    def at(self, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of each index."""
        return self.positions[index].astype(np.int64)


@dataclass(frozen=True)
class MixedOrder:
    """The order of one epoch after another over all cells of several parts, none of them empty."""

    parts: tuple[CellSet, ...]
    seed: int
    config: OrderConfig

    def __post_init__(self) -> None:
        if not self.parts or any(part.num_cells < 1 for part in self.parts):
            raise ValueError("no cells, or a part without any: nothing to order")

    @property
    def num_cells(self) -> int:
        """Cells of one epoch, n."""
        return int(self._sizes.sum())

    def positions(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of the cell at each place of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            places: Places in the epoch, each in [0, n).

        Returns:
            Store positions, int64, same shape. Over all places they are each cell once.
        """
        part, place = self._deal(epoch, places)
        keys = self._keys(epoch)[part]
        index = shuffled(
            place, self._sizes[part], self._windows[part], keys[..., 0], keys[..., 1], self.config
        )
        positions = np.empty_like(index)
        for chosen in np.unique(part):
            here = part == chosen
            positions[here] = self.parts[chosen].at(index[here])
        return positions

    @cached_property
    def _sizes(self) -> NDArray[np.int64]:
        return np.array([part.num_cells for part in self.parts], np.int64)

    @cached_property
    def _windows(self) -> NDArray[np.int64]:
        """A part with a tenth of the cells has windows of a tenth.

        So the cells that are fetched ahead are whole windows of every part, not a tenth of each.
        """
        lengths = np.ceil(self._sizes / self.num_cells * self.config.window).astype(np.int64)
        shortest = max(1, self.config.window // _SHORTEST_WINDOW)
        return np.clip(lengths, shortest, self.config.window)

    @cached_property
    def _own_lanes(self) -> NDArray[np.int64]:
        """Which of its own lanes each part has in each lane of the whole, (parts, lanes).

        A part's first lanes may be one cell longer than its others; each part begins where the one
        before it had its last longer lane, so that the whole's lanes are even, too.
        """
        longer = np.cumsum(self._sizes % self.config.lanes) - self._sizes % self.config.lanes
        return (np.arange(self.config.lanes) - longer[:, None]) % self.config.lanes

    @cached_property
    def _lengths(self) -> NDArray[np.int64]:
        """Cells of each part in each lane of the whole, (parts, lanes)."""
        lanes = self.config.lanes
        return self._sizes[:, None] // lanes + (self._own_lanes < self._sizes[:, None] % lanes)

    @cached_property
    def _keys(self) -> Callable[[int], NDArray[np.uint64]]:
        """Keys of each part's windows and blocks in an epoch, (parts, 2)."""
        seeds = [derive_key(self.seed, "part", number) for number in range(len(self.parts))]
        seeds[0] = self.seed  # so that one part alone is ordered as CellOrder does it
        return lru_cache(maxsize=2)(
            lambda epoch: np.array([shuffle_keys(seed, epoch) for seed in seeds], np.uint64)
        )

    def _deal(
        self, epoch: int, places: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The part of each place, and the place in that part's own order."""
        if len(self.parts) == 1:
            return np.zeros_like(places), places
        lanes = self.config.lanes
        lane, turn = places.ravel() % lanes, places.ravel() // lanes
        part, own_turn = np.empty_like(lane), np.empty_like(lane)
        stratum = turn // self._turns * lanes + lane
        order = np.argsort(stratum, kind="stable")
        for here in np.split(order, np.flatnonzero(np.diff(stratum[order])) + 1):
            if len(here):
                number, which = divmod(int(stratum[here[0]]), lanes)
                parts, own_turns = self._strata(epoch, which, number)
                part[here] = parts[turn[here] % self._turns]
                own_turn[here] = own_turns[turn[here] % self._turns]
        own_place = own_turn * lanes + self._own_lanes[part, lane]
        return part.reshape(places.shape), own_place.reshape(places.shape)

    @property
    def _turns(self) -> int:
        """Turns of a lane in a stratum."""
        return max(1, STRATUM // self.config.lanes)

    @cached_property
    def _strata(self) -> Callable[[int, int, int], tuple[NDArray[np.int64], NDArray[np.int64]]]:
        return lru_cache(maxsize=4 * self.config.lanes)(self._stratum)

    def _stratum(
        self, epoch: int, lane: int, number: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Part of each turn of a lane's stratum, and how many turns that part had before."""
        before = self._dealt(number)[:, lane]
        counts = self._dealt(number + 1)[:, lane] - before
        parts = np.repeat(np.arange(len(counts)), counts)
        key = mix(mix(derive_key(self.seed, "strata", epoch), lane), number)
        parts = parts[np.argsort(mix(key, np.arange(len(parts))), kind="stable")]
        own_turns = np.empty_like(parts)
        own_turns[np.argsort(parts, kind="stable")] = np.arange(len(parts)) - np.repeat(
            np.cumsum(counts) - counts - before, counts
        )
        return parts, own_turns

    @cached_property
    def _dealt(self) -> Callable[[int], NDArray[np.int64]]:
        return lru_cache(maxsize=8)(lambda number: self._dealt_before(number * self._turns))

    def _dealt_before(self, turn: int) -> NDArray[np.int64]:
        """How many of the first turns of each lane each part gets, (parts, lanes).

        Each part takes its share of what those before it have left, rounded up in some lanes and
        down in others. So no number ever falls from turn to turn, and each ends with its length.
        """
        dealt = np.empty_like(self._lengths)
        lengths = self._lengths.sum(axis=0)
        turns = np.minimum(turn, lengths)
        for number, length in enumerate(self._lengths):
            rounding = (number * _SQUARE_ROOT + np.arange(len(length)) * _GOLDEN_RATIO) % 1
            offset = (rounding * lengths).astype(np.int64)
            dealt[number] = (turns * length + offset) // np.maximum(lengths, 1)
            turns, lengths = turns - dealt[number], lengths - length
        return dealt
