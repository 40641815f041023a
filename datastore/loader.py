"""Sampler × reader × read-ahead: positions become tokens.

1. `CellSampler` says which cells the next steps need.
2. The loader fetches all of them at once, in store order: neighbours in a lane's window lie in few
   blocks, so reads are long.
3. Each micro-batch is cut from what was fetched, and tokenized.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datastore.binning import tokenize
from datastore.config import BinningConfig
from datastore.reader import CellBlock, CellReader
from datastore.sampler import CellSampler


@dataclass(frozen=True)
class TokenBatch:
    """Cells ready for the model.

    Attributes:
        positions: Store position of each cell, (B,).
        tokens: Expression bins, uint8, (B, G).
    """

    positions: NDArray[np.int64]
    tokens: NDArray[np.uint8]


class CellLoader:
    """Micro-batches of tokens, from any step of any epoch on."""

    def __init__(
        self,
        reader: CellReader,
        sampler: CellSampler,
        num_genes: int,
        binning: BinningConfig,
        cells_ahead: int = 32_768,
    ) -> None:
        self._reader = reader
        self._sampler = sampler
        self._num_genes = num_genes
        self._binning = binning
        per_rank = max(1, sampler.global_batch_size // sampler.world_size)
        self._steps_ahead = max(1, cells_ahead // per_rank)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[list[TokenBatch]]:
        """Yield each step's micro-batches of this rank, beginning with `first_step`."""
        steps = range(first_step, self._sampler.steps_per_epoch)
        for begin in range(0, len(steps), self._steps_ahead):
            plan = [
                self._sampler.micro_batches(epoch, step)
                for step in steps[begin : begin + self._steps_ahead]
            ]
            flat = [positions for step in plan for positions in step]
            cells = self._reader.read(np.concatenate(flat))
            row = 0
            for step in plan:
                batches = []
                for positions in step:
                    rows = np.arange(row, row + len(positions))
                    row += len(positions)
                    batches.append(to_tokens(cells.take(rows), self._num_genes, self._binning))
                yield batches


def to_tokens(cells: CellBlock, num_genes: int, binning: BinningConfig) -> TokenBatch:
    """Tokenize cells as read."""
    tokens = tokenize(cells.indptr, cells.genes, cells.counts, num_genes, binning)
    return TokenBatch(cells.positions, tokens)
