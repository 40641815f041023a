"""Which cells, in which order: a pure function of seed, epoch and place.

The order of an epoch over n cells is made in four steps, each of constant cost per cell and memory:

1. The cells are cut into blocks of neighbours, and the blocks are permuted anew each epoch.
2. The resulting sequence is cut into `lanes` runs of equal length (to one cell).
3. Within a lane, every window of cells is permuted.
4. The lanes are dealt from in turn: place g is cell g // lanes of lane g % lanes.

A global batch is a range of places, so it holds the same cells for any number of ranks. Each rank
takes a contiguous share of the batch sorted by lane, and so reads from its own lanes only; exactly
so when the number of ranks divides the lanes, and the lanes the batch (or the batch the lanes).
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datastore.config import OrderConfig
from datastore.randomness import derive_key, mix, permute


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
        lane, turn = places % self.config.lanes, places // self.config.lanes
        length, longer = divmod(self.num_cells, self.config.lanes)
        lane_start = lane * length + np.minimum(lane, longer)
        lane_length = length + (lane < longer)
        window = turn // self.config.window
        window_start = window * self.config.window
        window_length = np.minimum(self.config.window, lane_length - window_start)
        window_key = mix(mix(derive_key(self.seed, "window", epoch), lane), window)
        shuffled = window_start + permute(turn - window_start, window_length, window_key)
        return self.start + self._block_sequence(epoch, lane_start + shuffled)

    def _block_sequence(self, epoch: int, index: NDArray[np.int64]) -> NDArray[np.int64]:
        """Cell at each index of the sequence of permuted blocks; the short block goes anywhere."""
        block = self.config.block
        full, short = divmod(self.num_cells, block)
        key = derive_key(self.seed, "blocks", epoch)
        short_start = int(mix(key, full) % np.uint64(full + 1)) * block
        in_short = (index >= short_start) & (index < short_start + short)
        slot_index = index - np.where(index >= short_start + short, short, 0)
        slot = np.where(in_short, 0, slot_index // block)
        place = permute(slot, max(full, 1), key) * block + slot_index % block
        return np.where(in_short, full * block + index - short_start, place)


@dataclass(frozen=True)
class CellSampler:
    """Deals each global batch of an order to ranks and micro-batches."""

    order: CellOrder
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

        Over all ranks and micro-batches each cell of the global batch appears once; shares differ
        by at most one cell, and may be empty in a short last batch.
        """
        first = step * self.global_batch_size
        places = np.arange(first, min(first + self.global_batch_size, self.order.num_cells))
        by_lane = places[np.argsort(places % self.order.config.lanes, kind="stable")]
        share = np.array_split(by_lane, self.world_size)[self.rank]
        positions = self.order.positions(epoch, share)
        return np.array_split(positions, self.accumulation_steps)
