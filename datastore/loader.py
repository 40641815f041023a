"""Sampler × reader × read-ahead: positions become batches.

1. `CellSampler` says which cells the next steps need.
2. They are read together, in store order: neighbours in a lane's window lie in few blocks, so
   reads are long. Two arenas take turns: one is filled by TensorStore's threads while batches are
   cut from the other. A chunk that two windows share is decoded for the first of them.
3. Each micro-batch is cut from its arena and given the form that was asked for: counts in CSR
   form, dense tokens, or the bins of expressed genes only.

A batch belongs to whoever holds it. When nobody does any more, its memory serves the next one.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, TypeVar

import numpy as np
from numpy.typing import NDArray

from datastore.arenas import Arena, ArenaCells, CellBlock, ReadPlan
from datastore.binning import bin_cells, expression_values, spread, to_dense, tokenize
from datastore.buffers import BufferPool
from datastore.config import BinningConfig
from datastore.reader import CellReader, PendingCells
from datastore.sampler import CellSampler

Batch = TypeVar("Batch")

WINDOWS_AHEAD: Final = 4
"""Windows of each lane that are read at once, unless another number is given."""


@dataclass(frozen=True)
class TokenBatch:
    """Cells ready for the model.

    Attributes:
        positions: Store position of each cell, (B,).
        tokens: Expression bins, uint8, (B, G).
        values: log2(1 + CP10k), float32, (B, G), if they were asked for.
    """

    positions: NDArray[np.int64]
    tokens: NDArray[np.uint8]
    values: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PackedBatch:
    """Expressed genes of some cells, one cell behind the other.

    Attributes:
        positions: Store position of each cell, (B,).
        offsets: First gene of each cell, and their number at the end; int64, (B + 1,).
        genes: Panel position of each expressed gene, (nnz,).
        bins: Expression bin of each, uint8, (nnz,).
        values: log2(1 + CP10k) of each, float32, (nnz,), if they were asked for.
    """

    positions: NDArray[np.int64]
    offsets: NDArray[np.int64]
    genes: NDArray[np.generic]
    bins: NDArray[np.uint8]
    values: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class _Fill:
    """Steps whose cells share an arena."""

    steps: list[list[NDArray[np.int64]]]
    plan: ReadPlan


class CellLoader:
    """Micro-batches of this rank, from any step of any epoch on.

    Args:
        reader: Reads the store.
        sampler: Says which cells belong to a step.
        num_genes: Length of the panel, G.
        binning: How counts become tokens.
        windows_ahead: Windows of each lane that are read at once; whole ones, where they are whole
            batches, so that no cell is decoded twice. At first a single one, so that the first
            batch is there soon, and then to the next multiple. An arena holds `windows_ahead` ×
            `window` × `lanes` cells over all ranks, at 4 bytes per expressed gene (more where
            counts or the panel need it); there are two.
        bytes_ahead: Most bytes of an arena, as long as the cells of one step fit.
        with_values: Give expression values beside the bins.
    """

    def __init__(
        self,
        reader: CellReader,
        sampler: CellSampler,
        num_genes: int,
        binning: BinningConfig,
        windows_ahead: int = WINDOWS_AHEAD,
        bytes_ahead: int = 2**29,
        with_values: bool = False,
    ) -> None:
        self._reader = reader
        self._sampler = sampler
        self._num_genes = num_genes
        self._binning = binning
        order = sampler.order.config
        self._steps_ahead = [
            max(1, windows * order.window * order.lanes // sampler.global_batch_size)
            for windows in (1, windows_ahead)
        ]
        self._bytes_ahead = bytes_ahead
        self._with_values = with_values
        self._pool = BufferPool(16)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[TokenBatch]]:
        """Yield each step's micro-batches as dense tokens, beginning with `first_step`."""
        return self._batches(epoch, first_step, self._tokens)

    def packed(self, epoch: int, first_step: int = 0) -> Iterator[list[PackedBatch]]:
        """Yield each step's micro-batches as bins of expressed genes."""
        return self._batches(epoch, first_step, self._bins)

    def cells(self, epoch: int, first_step: int = 0) -> Iterator[list[CellBlock]]:
        """Yield each step's micro-batches as stored: counts in CSR form."""
        return self._batches(epoch, first_step, self._cut)

    def dense(self, epoch: int, first_step: int = 0) -> Iterator[list[NDArray[np.float32]]]:
        """Yield each step's micro-batches as dense counts, float32 (B, G)."""
        return self._batches(epoch, first_step, self._dense)

    def _cut(self, cells: ArenaCells, rows: NDArray[np.int64]) -> CellBlock:
        return cells.take(rows, self._pool)

    def _tokens(self, cells: ArenaCells, rows: NDArray[np.int64]) -> TokenBatch:
        cut = self._cut(cells, rows)
        return to_tokens(cut, self._num_genes, self._binning, self._pool, self._with_values)

    def _bins(self, cells: ArenaCells, rows: NDArray[np.int64]) -> PackedBatch:
        return to_bins(self._cut(cells, rows), self._binning, self._pool, self._with_values)

    def _dense(self, cells: ArenaCells, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        of = cells.plan  # straight from the arena: cutting the rows first would be one more pass
        starts, stops, kind = of.starts[rows], of.stops[rows], np.dtype(np.float32)
        return spread(starts, stops, cells.genes, cells.counts, self._num_genes, kind, self._pool)

    def _batches(
        self,
        epoch: int,
        first_step: int,
        form: Callable[[ArenaCells, NDArray[np.int64]], Batch],
    ) -> Iterator[list[Batch]]:
        arenas = (Arena(), Arena())
        fills = self._fills(epoch, first_step)
        present = next(fills, None)
        pending = self._start(present, arenas[0])
        following = next(fills, None)
        while present is not None and pending is not None:
            cells = pending.result()
            arenas = arenas[::-1]
            pending = self._start(following, arenas[0], cells)
            row = 0
            for step in present.steps:
                batches = []
                for positions in step:
                    rows = np.arange(row, row + len(positions))
                    row += len(positions)
                    batches.append(form(cells, rows))
                yield batches
                del batches  # or its memory could not serve the next step
            # The next plan reads row starts, while what `following` needs is still being decoded.
            present, following = following, next(fills, None)

    def _start(
        self, fill: _Fill | None, arena: Arena, former: ArenaCells | None = None
    ) -> PendingCells | None:
        return None if fill is None else self._reader.start(fill.plan, arena, former)

    def _fills(self, epoch: int, first_step: int) -> Iterator[_Fill]:
        """Cut the steps into groups that are read together, at whole multiples of their length."""
        step = first_step
        while step < self._sampler.steps_per_epoch:
            ahead = self._steps_ahead[step > first_step]
            stop = min(step - step % ahead + ahead, self._sampler.steps_per_epoch)
            while True:
                steps = self._sampler.plan(epoch, range(step, stop))
                positions = np.concatenate([cells for of in steps for cells in of])
                plan = self._reader.plan(positions, with_tails=True)
                if plan.num_bytes <= self._bytes_ahead or stop == step + 1:
                    break
                stop = step + (stop - step) // 2
            yield _Fill(steps, plan)
            step = stop


def to_tokens(
    cells: CellBlock,
    num_genes: int,
    binning: BinningConfig,
    pool: BufferPool | None = None,
    with_values: bool = False,
) -> TokenBatch:
    """Tokenize cells as read."""
    tokens = tokenize(cells.indptr, cells.genes, cells.counts, num_genes, binning, pool)
    values = None
    if with_values:
        each = expression_values(cells.indptr, cells.counts, binning)
        values = to_dense(cells.indptr, cells.genes, each, num_genes, pool)
    return TokenBatch(cells.positions, tokens, values)


def to_bins(
    cells: CellBlock,
    binning: BinningConfig,
    pool: BufferPool | None = None,
    with_values: bool = False,
) -> PackedBatch:
    """Bin the expressed genes of cells as read."""
    bins = bin_cells(cells.indptr, cells.counts, binning, pool)
    values = None
    if with_values:
        values = expression_values(cells.indptr, cells.counts, binning)
    return PackedBatch(cells.positions, cells.indptr, cells.genes, bins, values)
