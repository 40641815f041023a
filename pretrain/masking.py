"""Hide genes: which, is a pure function of seed, epoch, cell and gene.

So the targets of a cell do not depend on its rank, its batch, or a restart.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
from numpy.typing import NDArray

from datastore.config import BinningConfig
from datastore.loader import PackedBatch, TokenBatch
from datastore.randomness import derive_key, mix
from pretrain.config import MaskingConfig, PretrainConfig
from pretrain.embedding import HIDDEN

UNKNOWN: Final = 255
"""Stands for the bin of a gene that was not measured."""
Measured = Callable[[NDArray[np.int64]], NDArray[np.bool_]]
"""Tells of cells at store positions, (B,), which genes were measured, (B, G)."""


@dataclass(frozen=True)
class MaskedBatch:
    """Whole cells: what the model sees and what it must say.

    Attributes:
        inputs: Tokens with the hidden genes replaced by the mask token, uint8, (B, G).
        cells: Row of each target, (T,).
        genes: Column of each target, (T,).
        targets: True bin of each target, uint8, (T,).
        values: What a continuous encoder sees in place of `inputs`, float32, (B, G).
        whole: With a cell objective the true bin of every gene, uint8, (B, G), `UNKNOWN` where the
            gene was not measured.
    """

    inputs: NDArray[np.uint8]
    cells: NDArray[np.int64]
    genes: NDArray[np.int64]
    targets: NDArray[np.uint8]
    values: NDArray[np.float32] | None = None
    whole: NDArray[np.uint8] | None = None


@dataclass(frozen=True)
class PackedMaskedBatch:
    """Cells without what they do not express, one behind the other: what the model sees and says.

    Of each cell there are its expressed genes in the order of the store, then zeros, first those
    that are targets, then the constant position.

    Attributes:
        inputs: Tokens with the hidden genes replaced by the mask token, uint8, (n,).
        genes: Panel position of each, or G for the constant position, (n,).
        offsets: First token of each cell, and n at the end, (B + 1,).
        cells: Cell of each target, (T,).
        read: Place of each target in `inputs`, rising, (T,).
        targets: True bin of each target, uint8, (T,).
        values: What a continuous encoder sees in place of `inputs`, float32, (n,).
        whole: As of `MaskedBatch`.
    """

    inputs: NDArray[np.uint8]
    genes: NDArray[np.int64]
    offsets: NDArray[np.int64]
    cells: NDArray[np.int64]
    read: NDArray[np.int64]
    targets: NDArray[np.uint8]
    values: NDArray[np.float32] | None = None
    whole: NDArray[np.uint8] | None = None


def mask_batch(
    batch: TokenBatch | PackedBatch,
    draw: int,
    config: PretrainConfig,
    num_genes: int,
    measured: Measured | None = None,
) -> MaskedBatch | PackedMaskedBatch:
    """Mask cells in the form that they come in, see `mask_tokens` and `mask_packed`."""
    masked: MaskedBatch | PackedMaskedBatch
    if isinstance(batch, PackedBatch):
        masked = mask_packed(batch, draw, config, num_genes, measured)
    else:
        masked = mask_tokens(
            *(batch.tokens, batch.positions, config.seed, draw, config.masking, config.binning),
            measured,
        )
        if batch.values is not None:
            hidden = masked.inputs == config.binning.mask_token
            masked = replace(masked, values=np.where(hidden, np.float32(HIDDEN), batch.values))
    if not config.cell_objective:
        return masked
    known = _known(measured, batch.positions, num_genes)
    return replace(masked, whole=np.where(known, _whole(batch, num_genes), np.uint8(UNKNOWN)))


def _whole(batch: TokenBatch | PackedBatch, num_genes: int) -> NDArray[np.uint8]:
    """The bin of every gene, (B, G)."""
    if isinstance(batch, TokenBatch):
        return batch.tokens
    whole = np.zeros((len(batch.positions), num_genes), np.uint8)
    cells = np.repeat(np.arange(len(whole)), np.diff(batch.offsets))
    whole[cells, batch.genes] = batch.bins
    return whole


def mask_tokens(
    tokens: NDArray[np.uint8],
    positions: NDArray[np.int64],
    seed: int,
    epoch: int,
    masking: MaskingConfig,
    binning: BinningConfig,
    measured: Measured | None = None,
) -> MaskedBatch:
    """Choose targets among each cell's expressed genes and hide most of them.

    Of a cell's e expressed genes, `ratio` × e (rounded to the nearest, at least one if e > 0)
    become targets; each of these stays visible with probability `keep_share`. Genes that are not
    expressed are never chosen (Yang et al. 2022, Methods), but for `zeros` of them to each of
    those targets. A cell without expressed genes has no targets.

    Args:
        tokens: Expression bins, (B, G).
        positions: Store position of each cell, (B,); the cell's identity.
        seed: Seed of the training.
        epoch: Targets change from epoch to epoch.
        masking: Shares.
        binning: Says which token is the mask.
        measured: Tells which zeros say something; none takes all.
    """
    if tokens.ndim != 2:
        raise ValueError(f"tokens have shape {tokens.shape}; give (cells, genes)")
    cells, genes = np.nonzero(tokens)
    keys = mix(derive_key(seed, "mask", epoch), positions)
    target, kept = _choose(cells, genes, keys, masking)
    zeros = _sample_zeros(
        (cells, genes),
        mix(derive_key(seed, "zeros", epoch), positions),
        num_hidden_zeros(np.bincount(cells, minlength=len(tokens)), masking),
        lambda: _known(measured, positions, tokens.shape[1]),
    )
    cells, genes = (
        np.concatenate([cells[target], zeros[0]]),
        np.concatenate([genes[target], zeros[1]]),
    )
    kept = np.concatenate([kept, _stays(zeros[2], masking)])
    order = np.lexsort((genes, cells))
    cells, genes, kept = cells[order], genes[order], kept[order]
    inputs = tokens.copy()
    inputs[cells[~kept], genes[~kept]] = binning.mask_token
    return MaskedBatch(inputs, cells, genes, tokens[cells, genes])


def mask_packed(
    batch: PackedBatch,
    draw: int,
    config: PretrainConfig,
    num_genes: int,
    measured: Measured | None = None,
) -> PackedMaskedBatch:
    """Hide the same genes of the same cells as `mask_tokens`, and leave out what is in bin 0.

    A continuous encoder also sees the genes below 1 count per 10,000, which are in bin 0.
    The zeros that are targets come back in, and `encoder.num_zeros` others, or all of a cell that
    has fewer: which, is a pure function of seed, draw, cell and gene, too.

    Args:
        batch: Cells with the bins of their expressed genes.
        draw: Number of the draw, the epoch.
        config: Seed, shares, tokens and zeros.
        num_genes: Length of the panel, G.
        measured: Tells which zeros say something; none takes all.
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
    hidden = num_hidden_zeros(np.bincount(cells[expressed], minlength=num_cells), config.masking)
    of_zero, zero_genes, draws, rank = _sample_zeros(
        (cells, genes),
        mix(derive_key(config.seed, "zeros", draw), batch.positions),
        hidden + config.encoder.num_zeros,
        lambda: _known(measured, batch.positions, num_genes),
    )
    is_target = rank < hidden[of_zero]
    is_hidden = is_target & ~_stays(draws, config.masking)
    zeros = np.where(is_hidden, config.binning.mask_token, 0).astype(np.uint8)
    every = np.arange(num_cells)
    of_cell = np.concatenate([cells, of_zero, every])
    order = np.argsort(of_cell, kind="stable")
    place = np.empty(len(order), np.int64)
    place[order] = np.arange(len(order))
    constant = np.zeros(num_cells, np.uint8)
    values = None
    if batch.values is not None:
        seen = np.concatenate([batch.values[shown], np.zeros(len(zeros) + num_cells)])
        seen[: len(inputs)][inputs == config.binning.mask_token] = HIDDEN
        seen[len(inputs) : len(inputs) + len(zeros)][is_hidden] = HIDDEN
        values = seen[order].astype(np.float32)
    read = np.concatenate([place[target], place[len(cells) + np.flatnonzero(is_target)]])
    rising = np.argsort(read, kind="stable")
    return PackedMaskedBatch(
        np.concatenate([inputs, zeros, constant])[order],
        np.concatenate([genes, zero_genes, np.full(num_cells, num_genes)])[order],
        np.concatenate([[0], np.cumsum(np.bincount(of_cell, minlength=num_cells))]),
        np.concatenate([cells[target], of_zero[is_target]])[rising],
        read[rising],
        np.concatenate([bins[target], np.zeros(is_target.sum(), np.uint8)])[rising],
        values,
    )


def num_targets(expressed: NDArray[np.int64], masking: MaskingConfig) -> NDArray[np.int64]:
    """Targets among a cell's expressed genes, of whose number it is a function; (B,)."""
    chosen = np.maximum(np.rint(expressed * masking.ratio).astype(np.int64), 1)
    targets: NDArray[np.int64] = np.where(expressed > 0, chosen, 0)
    return targets


def num_hidden_zeros(expressed: NDArray[np.int64], masking: MaskingConfig) -> NDArray[np.int64]:
    """Targets among a cell's genes of bin 0, if it has as many; (B,)."""
    hidden: NDArray[np.int64] = np.rint(num_targets(expressed, masking) * masking.zeros).astype(
        np.int64
    )
    return hidden


def _known(
    measured: Measured | None, positions: NDArray[np.int64], num_genes: int
) -> NDArray[np.bool_]:
    return np.ones((len(positions), num_genes), bool) if measured is None else measured(positions)


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
    chosen = num_targets(expressed, masking)
    order = np.lexsort((draw, cells))  # cells in turn, their genes in random order
    first = np.cumsum(expressed) - expressed
    rank = np.arange(len(order)) - np.repeat(first, expressed)
    target = np.sort(order[rank < np.repeat(chosen, expressed)])
    return target, _stays(draw[target], masking)


def _stays(draw: NDArray[np.uint64], masking: MaskingConfig) -> NDArray[np.bool_]:
    """Tell of each target by its draw whether it stays visible."""
    return mix(draw, 1) < np.uint64(int(masking.keep_share * 2.0**64))


def _sample_zeros(
    given: tuple[NDArray[np.int64], NDArray[np.int64]],
    keys: NDArray[np.uint64],
    numbers: NDArray[np.int64],
    known: Callable[[], NDArray[np.bool_]],
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64], NDArray[np.int64]]:
    """Choose known genes that are not among the given ones.

    Args:
        given: Cell and gene of each gene that is there.
        keys: What each cell draws from, (B,).
        numbers: How many to choose in each cell; a cell that has fewer gives all, (B,).
        known: Gives the genes to choose from, (B, G), if there is something to choose.

    Returns:
        Cell, gene, draw and rank within the cell of each; cells rising, in each its draws.
    """
    most = int(numbers.max(initial=0))
    if not most:
        empty = np.empty(0, np.int64)
        return empty, empty, np.empty(0, np.uint64), empty
    absent = known().copy()
    absent[given] = False
    most = min(most, absent.shape[1])
    draw = mix(keys[:, None], np.arange(absent.shape[1]))
    draw[~absent] = np.iinfo(np.uint64).max  # last of all
    chosen = np.argpartition(draw, most - 1, axis=1)[:, :most]
    draw = np.take_along_axis(draw, chosen, 1)
    order = np.argsort(draw, axis=1)
    chosen, draw = np.take_along_axis(chosen, order, 1), np.take_along_axis(draw, order, 1)
    taken = np.arange(most) < np.minimum(numbers, absent.sum(1))[:, None]
    cells, rank = np.nonzero(taken)
    return cells, chosen[taken], draw[taken], rank


def commonest_bins(
    batch: MaskedBatch | PackedMaskedBatch, binning: BinningConfig, zeros: float = 0.0
) -> NDArray[np.uint8]:
    """Guess every target by its cell's commonest visible bin, the rule that training must beat.

    A model without gene identity cannot do better: published masked accuracy without gene2vec
    equals this rule. Ties go to the lower bin; a cell without visible expressed genes gets 1.
    With `zeros` of `MaskingConfig`, 0 is as common as they are among the targets.

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
    commonest[counts.max(axis=0) < zeros * counts.sum(axis=0)] = 0
    guessed: NDArray[np.uint8] = commonest[batch.cells]
    return guessed
