"""Micro-batches by tokens: a rank's cells of a step, cut so that each piece fits in memory.

Which cells a step has, and which of them are a rank's, does not change by it. All ranks run the
same number of pieces, as collectives under ZeRO need; who has fewer ends with empty ones.
"""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from datastore.loader import PackedBatch, TokenBatch
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.masking import num_hidden_zeros


def micro_batches(
    batches: Sequence[TokenBatch | PackedBatch], config: PretrainConfig, ranks: Ranks
) -> list[TokenBatch | PackedBatch]:
    """Give a rank's micro-batches of a step: as the loader cut them, or by `batch.tokens`."""
    if config.batch.tokens is None:
        return list(batches)
    (share,) = batches
    assert isinstance(share, PackedBatch)
    return [*cut_by_tokens(share, config, ranks)]


def cut_by_tokens(batch: PackedBatch, config: PretrainConfig, ranks: Ranks) -> list[PackedBatch]:
    """Cut cells into pieces of at most `batch.tokens` tokens; entered by all ranks together.

    Args:
        batch: This rank's cells.
        config: The budget, and what a cell shows besides its expressed genes.
        ranks: This process among all.

    Returns:
        Pieces, in order, as many on every rank. A cell that is longer than the budget goes alone.
    """
    assert config.batch.tokens is not None
    ends = [0, *piece_ends(token_counts(batch, config), config.batch.tokens)]
    most = int(max(ranks.gather(len(ends) - 1)))
    ends += [len(batch.positions)] * (max(1, most) + 1 - len(ends))
    return [_cells(batch, start, stop) for start, stop in pairwise(ends)]


def token_counts(batch: PackedBatch, config: PretrainConfig) -> NDArray[np.int64]:
    """Count what the model sees of each cell, (B,): expressed genes, zeros, constant."""
    expressed = np.diff(np.concatenate([[0], np.cumsum(batch.bins > 0)])[batch.offsets])
    shown = expressed if batch.values is None else np.diff(batch.offsets)
    return shown + num_hidden_zeros(expressed, config.masking) + config.encoder.num_zeros + 1


def piece_ends(lengths: NDArray[np.int64], budget: int) -> list[int]:
    """Fill pieces one after another; return the number of cells up to the end of each."""
    ends: list[int] = []
    room = 0
    for cell, length in enumerate(lengths.tolist()):
        if length > room or not ends:
            ends.append(cell)
            room = budget
        ends[-1] = cell + 1
        room -= length
    return ends


def _cells(batch: PackedBatch, start: int, stop: int) -> PackedBatch:
    first, last = batch.offsets[start], batch.offsets[stop]
    return PackedBatch(
        batch.positions[start:stop],
        batch.offsets[start : stop + 1] - first,
        batch.genes[first:last],
        batch.bins[first:last],
        None if batch.values is None else batch.values[first:last],
    )
