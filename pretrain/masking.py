"""Hide genes: which, is a pure function of seed, epoch, cell and gene.

So the targets of a cell do not depend on its rank, its batch, or a restart.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from datastore.config import BinningConfig
from datastore.randomness import derive_key, mix
from pretrain.config import MaskingConfig


@dataclass(frozen=True)
class MaskedBatch:
    """What the model sees and what it must say.

    Attributes:
        inputs: Tokens with the hidden genes replaced by the mask token, uint8, (B, G).
        cells: Row of each target, (T,).
        genes: Column of each target, (T,).
        targets: True bin of each target, uint8, (T,).
    """

    inputs: NDArray[np.uint8]
    cells: NDArray[np.int64]
    genes: NDArray[np.int64]
    targets: NDArray[np.uint8]


def mask_tokens(
    tokens: NDArray[np.uint8],
    positions: NDArray[np.int64],
    seed: int,
    epoch: int,
    masking: MaskingConfig,
    binning: BinningConfig,
) -> MaskedBatch:
    """Choose targets among each cell's expressed genes and hide most of them.

    Of a cell's e expressed genes, `ratio` × e (rounded to the nearest, at least one if e > 0)
    become targets; each of these stays visible with probability `keep_share`. Genes that are not
    expressed are never chosen (Yang et al. 2022, Methods). A cell without expressed genes has no
    targets.

    Args:
        tokens: Expression bins, (B, G).
        positions: Store position of each cell, (B,); the cell's identity.
        seed: Seed of the training.
        epoch: Targets change from epoch to epoch.
        masking: Shares.
        binning: Says which token is the mask.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tokens.shape}; give (cells, genes)")
    cells, genes = np.nonzero(tokens)
    cell_key = mix(derive_key(seed, "mask", epoch), positions)
    draw = mix(cell_key[cells], genes)
    expressed = np.bincount(cells, minlength=len(tokens))
    chosen = np.maximum(np.rint(expressed * masking.ratio).astype(np.int64), 1)
    order = np.lexsort((draw, cells))  # cells in turn, their genes in random order
    first = np.cumsum(expressed) - expressed
    rank = np.arange(len(order)) - np.repeat(first, expressed)
    target = np.sort(order[rank < np.repeat(chosen, expressed)])
    cells, genes, draw = cells[target], genes[target], draw[target]
    kept = mix(draw, 1) < np.uint64(int(masking.keep_share * 2.0**64))
    inputs = tokens.copy()
    inputs[cells[~kept], genes[~kept]] = binning.mask_token
    return MaskedBatch(inputs, cells, genes, tokens[cells, genes])


def commonest_bins(batch: MaskedBatch, binning: BinningConfig) -> NDArray[np.uint8]:
    """Guess every target by its cell's commonest visible bin, the rule that training must beat.

    A model without gene identity cannot do better: published masked accuracy without gene2vec
    equals this rule. Ties go to the lower bin; a cell without visible expressed genes gets 1.

    Returns:
        Guessed bin of each target, (T,).
    """
    counts = np.stack(
        [(batch.inputs == token).sum(axis=1) for token in range(1, binning.top_bin + 1)]
    )
    commonest: NDArray[np.uint8] = (counts.argmax(axis=0) + 1).astype(np.uint8)
    return commonest[batch.cells]
