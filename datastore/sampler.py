"""Which cells, in which order: a pure function of seed, epoch and place.

The order of an epoch over n cells is made in four steps, each of constant cost per cell and memory:

1. The cells are cut into blocks of neighbours, and the blocks are permuted anew each epoch.
2. The resulting sequence is cut into `lanes` runs of equal length (to one cell).
3. Within a lane, every window of cells is permuted.
4. The lanes are dealt from in turn: place g is cell g // lanes of lane g % lanes.

A global batch is a range of places, so it holds the same cells for any number of ranks. Each rank
takes a contiguous share of the batch sorted by lane, and so reads from its own lanes only; exactly
so when the number of ranks divides the lanes, and the lanes the batch (or the batch the lanes).

This is the order of cells that lie in uniformly shuffled places. `datastore.mixture` makes one of
several such parts, the generations of a store that grew.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from datastore.config import OrderConfig
from datastore.randomness import derive_key, mix, permute


class Order(Protocol):
    """The order of one epoch after another, place by place."""

    @property
    def config(self) -> OrderConfig:
        """Lanes, blocks and windows; place g is dealt from lane g % lanes."""

    @property
    def num_cells(self) -> int:
        """Places of one epoch."""

    def positions(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of the cell at each place of an epoch."""


@dataclass(frozen=True)
class CellOrder:
    """The order of one epoch after another over the store positions [start, stop)."""

    start: int
    stop: int
    seed: int
    config: OrderConfig

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.stop:
            raise ValueError(f"no cells in [{self.start}, {self.stop}): nothing to order")

    @property
    def num_cells(self) -> int:
        """Cells of one epoch, n."""
        return self.stop - self.start

    def positions(self, epoch: int, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Give the store position of the cell at each place of an epoch.

        Args:
            epoch: Number of the epoch, from 0.
            places: Places in the epoch, each in [0, n).

        Returns:
            Store positions, int64, same shape. Over all places they are each cell once.
        """
        keys = shuffle_keys(self.seed, epoch)
        size, window = np.int64(self.num_cells), np.int64(self.config.window)
        return self.start + shuffled(places, size, window, *keys, self.config)


def shuffle_keys(seed: int, epoch: int) -> tuple[np.uint64, np.uint64]:
    """Name the permutations of windows and of blocks that belong to an epoch."""
    return (
        np.uint64(derive_key(seed, "window", epoch)),
        np.uint64(derive_key(seed, "blocks", epoch)),
    )


def shuffled(
    places: NDArray[np.int64],
    size: NDArray[np.int64] | np.int64,
    window: NDArray[np.int64] | np.int64,
    window_key: NDArray[np.uint64] | np.uint64,
    block_key: NDArray[np.uint64] | np.uint64,
    config: OrderConfig,
) -> NDArray[np.int64]:
    """Give the index of the cell at each place of an epoch; steps 1 to 4 backwards.

    Args:
        places: Places, each below its `size`.
        size: Cells that are ordered together, n; as the next three, for all places or for each.
        window: Length of the windows.
        window_key: Names the permutations within windows.
        block_key: Names the permutation of the blocks.
        config: Lanes and blocks.

    Returns:
        Indices in [0, n), int64. Over all places of a size and its keys they are each index once.
    """
    lane, turn = places % config.lanes, places // config.lanes
    length, longer = size // config.lanes, size % config.lanes
    lane_start = lane * length + np.minimum(lane, longer)
    lane_length = length + (lane < longer)
    number = turn // window
    window_start = number * window
    window_length = np.minimum(window, lane_length - window_start)
    key = mix(mix(window_key, lane), number)
    within = window_start + permute(turn - window_start, window_length, key)
    # A block longer than a lane would leave a small store's lanes the same in every epoch.
    block = np.minimum(config.block, np.maximum(length, 1))
    return _block_sequence(lane_start + within, size, block_key, block)


def _block_sequence(
    index: NDArray[np.int64],
    size: NDArray[np.int64] | np.int64,
    key: NDArray[np.uint64] | np.uint64,
    block: NDArray[np.int64] | np.int64,
) -> NDArray[np.int64]:
    """Cell at each index of the sequence of permuted blocks; the short block goes anywhere."""
    full, short = size // block, size % block
    gaps = np.asarray(full, np.uint64) + np.uint64(1)
    short_start = (mix(key, full) % gaps).astype(np.int64) * block
    in_short = (index >= short_start) & (index < short_start + short)
    slot_index = index - np.where(index >= short_start + short, short, 0)
    slot = np.where(in_short, 0, slot_index // block)
    if np.ndim(full) == 0:  # one permutation for all, and few of its slots: each is sent once
        slots, which = np.unique(slot, return_inverse=True)
        sent = permute(slots, max(int(full), 1), key)[which]
    else:
        sent = permute(slot, np.maximum(full, 1), key)
    place = sent * block + slot_index % block
    return np.where(in_short, full * block + index - short_start, place)


@dataclass(frozen=True)
class CellSampler:
    """Deals each global batch of an order to ranks and micro-batches."""

    order: Order
    global_batch_size: int
    rank: int
    world_size: int
    accumulation_steps: int

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps that see every cell once; the last may be smaller."""
        return -(-self.order.num_cells // self.global_batch_size)

    def micro_batches(self, epoch: int, step: int) -> list[NDArray[np.int64]]:
        """Store positions of this rank's micro-batches in one step of an epoch.

        Over all ranks and micro-batches each place of the global batch appears once; shares differ
        by at most one cell, and may be empty in a short last batch.
        """
        return self.plan(epoch, range(step, step + 1))[0]

    def plan(self, epoch: int, steps: range) -> list[list[NDArray[np.int64]]]:
        """Give the micro-batches of several steps; quicker than one by one, and the same."""
        shares = [self._share(step) for step in steps]
        flat = np.concatenate([*shares, np.empty(0, np.int64)])
        ends = np.cumsum([len(share) for share in shares])
        positions = np.split(self.order.positions(epoch, flat), ends)[: len(shares)]
        return [np.array_split(share, self.accumulation_steps) for share in positions]

    def _share(self, step: int) -> NDArray[np.int64]:
        """This rank's places of a step's global batch, by lane."""
        first = step * self.global_batch_size
        places = np.arange(first, min(first + self.global_batch_size, self.order.num_cells))
        by_lane = places[np.argsort(places % self.order.config.lanes, kind="stable")]
        return np.array_split(by_lane, self.world_size)[self.rank]
