"""Hide genes: which, is a pure function of seed, epoch, cell and gene.

So the targets of a cell do not depend on its rank, its batch, or a restart.
"""

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from datastore.config import BinningConfig
from datastore.loader import PackedBatch, TokenBatch
from datastore.randomness import derive_key, mix
from pretrain.config import MaskingConfig, PretrainConfig
from pretrain.embedding import HIDDEN


@dataclass(frozen=True)
class MaskedBatch:
    """Whole cells: what the model sees and what it must say.

    Attributes:
        inputs: Tokens with the hidden genes replaced by the mask token, uint8, (B, G).
        cells: Row of each target, (T,).
        genes: Column of each target, (T,).
        targets: True bin of each target, uint8, (T,).
        values: What a continuous encoder sees in place of `inputs`, float32, (B, G).
    """

    inputs: NDArray[np.uint8]
    cells: NDArray[np.int64]
    genes: NDArray[np.int64]
    targets: NDArray[np.uint8]
    values: NDArray[np.float32] | None = None


@dataclass(frozen=True)
class PackedMaskedBatch:
    """Cells without what they do not express, one behind the other: what the model sees and says.

    Of each cell there are its expressed genes in the order of the store, then sampled zeros, then
    the constant position.

    Attributes:
        inputs: Tokens with the hidden genes replaced by the mask token, uint8, (n,).
        genes: Panel position of each, or G for the constant position, (n,).
        offsets: First token of each cell, and n at the end, (B + 1,).
        cells: Cell of each target, (T,).
        read: Place of each target in `inputs`, rising, (T,).
        targets: True bin of each target, uint8, (T,).
        values: What a continuous encoder sees in place of `inputs`, float32, (n,).
    """

    inputs: NDArray[np.uint8]
    genes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    cells: NDArray[np.int64]
    read: NDArray[np.int64]
    targets: NDArray[np.uint8]
    values: NDArray[np.float32] | None = None


def mask_batch(
    batch: TokenBatch | PackedBatch, draw: int, config: PretrainConfig, num_genes: int
) -> MaskedBatch | PackedMaskedBatch:
    """Mask cells in the form that they come in, see `mask_tokens` and `mask_packed`."""
    if isinstance(batch, PackedBatch):
        return mask_packed(batch, draw, config, num_genes)
    masked = mask_tokens(
        batch.tokens, batch.positions, config.seed, draw, config.masking, config.binning
    )
    if batch.values is None:
        return masked
    hidden = masked.inputs == config.binning.mask_token
    return replace(masked, values=np.where(hidden, np.float32(HIDDEN), batch.values))


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
    keys = mix(derive_key(seed, "mask", epoch), positions)
    target, kept = _choose(cells, genes, keys, masking)
    cells, genes = cells[target], genes[target]
    inputs = tokens.copy()
    inputs[cells[~kept], genes[~kept]] = binning.mask_token
    return MaskedBatch(inputs, cells, genes, tokens[cells, genes])


def mask_packed(
    batch: PackedBatch, draw: int, config: PretrainConfig, num_genes: int
) -> PackedMaskedBatch:
    """Hide the same genes of the same cells as `mask_tokens`, and leave out what is in bin 0.

    A continuous encoder also sees the genes below 1 count per 10,000, which are in bin 0.
    `encoder.num_zeros` genes of bin 0 come back in, or all of a cell that has fewer: which, is a
    pure function of seed, draw, cell and gene, too.

    Args:
        batch: Cells with the bins of their expressed genes.
        draw: Number of the draw, the epoch.
        config: Seed, shares, tokens and zeros.
        num_genes: Length of the panel, G.
    """
    num_cells = len(batch.positions)
    shown = batch.bins > 0 if batch.values is None else np.ones(len(batch.bins), bool)
    cells = np.repeat(np.arange(num_cells), np.diff(batch.offsets))[shown]
    genes, bins = batch.genes[shown].astype(np.int64), batch.bins[shown]
    keys = mix(derive_key(config.seed, "mask", draw), batch.positions)
    expressed = np.flatnonzero(bins)
    target, kept = _choose(cells[expressed], genes[expressed], keys, config.masking)
    target = expressed[target]
    inputs = bins.copy()
    inputs[target[~kept]] = config.binning.mask_token
    keys = mix(derive_key(config.seed, "zeros", draw), batch.positions)
    zeros = _sample_zeros(cells, genes, keys, config.encoder.num_zeros, num_genes)
    every = np.arange(num_cells)
    of_cell = np.concatenate([cells, zeros[0], every])
    order = np.argsort(of_cell, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    rest = np.zeros(len(order) - len(inputs), np.uint8)  # zeros and constant positions
    values = None
    if batch.values is not None:
        seen = np.where(inputs == config.binning.mask_token, HIDDEN, batch.values[shown])
        values = np.concatenate([seen, rest])[order].astype(np.float32)
    return PackedMaskedBatch(
        np.concatenate([inputs, rest])[order],
        np.concatenate([genes, zeros[1], np.full(num_cells, num_genes)])[order],
        np.concatenate([[0], np.cumsum(np.bincount(of_cell, minlength=num_cells))]),
        cells[target],
        place[target],
        bins[target],
        values,
    )


def _choose(
    cells: NDArray[np.int64],
    genes: NDArray[np.int64],
    keys: NDArray[np.uint64],
    masking: MaskingConfig,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Choose targets among expressed genes.

    Args:
        cells: Cell of each expressed gene, rising.
        genes: Panel position of each.
        keys: What each cell draws from, (B,).
        masking: Shares.

    Returns:
        Number of each target among the expressed genes, rising, and whether it stays visible.
    """
    draw = mix(keys[cells], genes)
    expressed = np.bincount(cells, minlength=len(keys))
    chosen = np.maximum(np.rint(expressed * masking.ratio).astype(np.int64), 1)
    order = np.lexsort((draw, cells))  # cells in turn, their genes in random order
    first = np.cumsum(expressed) - expressed
    rank = np.arange(len(order)) - np.repeat(first, expressed)
    target = np.sort(order[rank < np.repeat(chosen, expressed)])
    kept = mix(draw[target], 1) < np.uint64(int(masking.keep_share * 2.0**64))
    return target, kept


def _sample_zeros(
    cells: NDArray[np.int64],
    genes: NDArray[np.int64],
    keys: NDArray[np.uint64],
    number: int,
    num_genes: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Choose genes that are not among the given ones: cell and gene of each, cells rising."""
    if not number or not len(keys):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    draw = mix(keys[:, None], np.arange(num_genes))
    draw[cells, genes] = np.iinfo(np.uint64).max  # no zeros: last of all
    absent = num_genes - np.bincount(cells, minlength=len(keys))
    chosen = np.argsort(draw, axis=1)[:, :number]
    taken = np.arange(chosen.shape[1]) < absent[:, None]
    return np.nonzero(taken)[0], chosen[taken]


def commonest_bins(
    batch: MaskedBatch | PackedMaskedBatch, binning: BinningConfig
) -> NDArray[np.uint8]:
    """Guess every target by its cell's commonest visible bin, the rule that training must beat.

    A model without gene identity cannot do better: published masked accuracy without gene2vec
    equals this rule. Ties go to the lower bin; a cell without visible expressed genes gets 1.

    Returns:
        Guessed bin of each target, (T,).
    """
    bins = range(1, binning.top_bin + 1)
    if isinstance(batch, PackedMaskedBatch):
        lengths = np.diff(batch.offsets)
        cells = np.repeat(np.arange(len(lengths)), lengths)
        counts = np.stack(
            [np.bincount(cells[batch.inputs == token], minlength=len(lengths)) for token in bins]
        )
    else:
        counts = np.stack([(batch.inputs == token).sum(axis=1) for token in bins])
    commonest: NDArray[np.uint8] = (counts.argmax(axis=0) + 1).astype(np.uint8)
    return commonest[batch.cells]
