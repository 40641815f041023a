"""Counts → expression bins → tokens (scBERT, Methods).

A cell's counts are scaled to 10,000 after alignment to the panel, then binned by
`min(top, floor(log2(1 + x)))`. Bins are whole numbers, so the edges are compared in exact integer
arithmetic instead of through a logarithm that may round across one.

`bin_counts` says what a bin is. Within a cell the bin depends on the count alone, so for cells it
is enough to know the smallest count of each bin, and to compare whole numbers with those.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.buffers import BufferPool
from datastore.cell_rows import spread as spread_rows
from datastore.config import BinningConfig


def bin_counts(
    counts: NDArray[np.generic], library_sizes: NDArray[np.generic], config: BinningConfig
) -> NDArray[np.uint8]:
    """Put each count into its expression bin.

    Args:
        counts: Raw counts, 0 or more, any shape.
        library_sizes: Sum of all panel counts of the cell each count belongs to; broadcasts.
        config: Scale and top bin.

    Returns:
        Bins 0 to `config.top_bin`, uint8, in the broadcast shape. An expressed gene below 1 count
        per 10,000 is in bin 0, as in the published code.
    """
    scaled = counts.astype(np.float64) * config.target_sum
    library = library_sizes.astype(np.float64)
    bins = np.zeros(np.broadcast_shapes(counts.shape, library.shape), np.uint8)
    for edge in range(1, config.top_bin + 1):  # x >= 2^edge - 1, without dividing
        bins += scaled >= (2.0**edge - 1.0) * library
    bins[np.broadcast_to(counts == 0, bins.shape)] = 0
    return bins


def bin_cells(
    indptr: NDArray[np.int64],
    counts: NDArray[np.generic],
    config: BinningConfig,
    pool: BufferPool | None = None,
) -> NDArray[np.uint8]:
    """Put each count of cells in CSR form into its expression bin.

    Args:
        indptr: Row starts, (B + 1,), beginning at 0.
        counts: Stored counts, (nnz,).
        config: Scale and top bin.
        pool: Where the memory comes from; none takes fresh memory.

    Returns:
        Bins, uint8, (nnz,); those of `bin_counts` with each cell's sum.
    """
    lengths = np.diff(indptr)
    library = library_sizes(indptr, counts)
    if not np.issubdtype(counts.dtype, np.integer):
        return bin_counts(counts, np.repeat(library, lengths), config)
    pool = pool or BufferPool()
    bins: NDArray[np.uint8] = pool.take(len(counts), np.uint8)
    reached: NDArray[np.bool_] = pool.take(len(counts), np.bool_)
    bins[:] = 0
    for edge in range(1, config.top_bin + 1):
        smallest = _smallest_count(library, edge, config)
        widest = np.min_scalar_type(int(smallest.max(initial=1)))
        smallest = smallest.astype(np.result_type(counts.dtype, widest))
        np.greater_equal(counts, np.repeat(smallest, lengths), out=reached)
        bins += reached
    return bins


def expression_values(
    indptr: NDArray[np.int64], counts: NDArray[np.generic], config: BinningConfig
) -> NDArray[np.float32]:
    """Give log2(1 + x) of each count of cells in CSR form, x being the count scaled as for bins.

    Args:
        indptr: Row starts, (B + 1,), beginning at 0.
        counts: Stored counts, (nnz,).
        config: Scale.

    Returns:
        Values, 0 or more, (nnz,); the bin is their whole part, but for the top bin.
    """
    library = library_sizes(indptr, counts)
    scale = config.target_sum / np.where(library > 0, library, 1)
    values = np.repeat(scale, np.diff(indptr)) * counts.astype(np.float64)
    return np.log2(1.0 + values).astype(np.float32)


def tokenize(
    indptr: NDArray[np.int64],
    genes: NDArray[np.generic],
    counts: NDArray[np.generic],
    num_genes: int,
    config: BinningConfig,
    pool: BufferPool | None = None,
) -> NDArray[np.uint8]:
    """Turn cells in CSR form into dense tokens.

    Args:
        indptr: Row starts, (B + 1,), beginning at 0.
        genes: Panel position of each stored count, (nnz,); no gene twice in a cell.
        counts: Stored counts, (nnz,).
        num_genes: Length of the panel, G.
        config: Scale and top bin.
        pool: Where the memory comes from; none takes fresh memory.

    Returns:
        Tokens, uint8 of shape (B, G); a cell without counts is all zeros.
    """
    return to_dense(indptr, genes, bin_cells(indptr, counts, config, pool), num_genes, pool)


def library_sizes(
    indptr: NDArray[np.int64], counts: NDArray[np.generic]
) -> NDArray[np.int64] | NDArray[np.float64]:
    """Sum of each cell's counts, (B,)."""
    lengths = np.diff(indptr)
    whole = np.issubdtype(counts.dtype, np.integer)
    sums: NDArray[Any] = np.zeros(len(lengths), np.int64 if whole else np.float64)
    expressed = lengths > 0
    if expressed.any():
        # So many 16-bit counts stay below 2^32, and are added twice as fast there.
        narrow = counts.dtype == np.uint16 and lengths.max() <= 2**16
        kind = np.uint32 if narrow else sums.dtype
        sums[expressed] = np.add.reduceat(counts, indptr[:-1][expressed], dtype=kind)
    return sums


def to_dense(
    indptr: NDArray[np.int64],
    genes: NDArray[np.generic],
    values: NDArray[Any],
    num_genes: int,
    pool: BufferPool | None = None,
) -> NDArray[Any]:
    """Spread cells in CSR form over the panel; (B, G), zero where nothing is stored.

    Raises:
        ValueError: If a gene lies outside the panel.
    """
    return spread(indptr[:-1], indptr[1:], genes, values, num_genes, values.dtype, pool)


def spread(
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    genes: NDArray[np.generic],
    values: NDArray[Any],
    num_genes: int,
    dtype: np.dtype[Any],
    pool: BufferPool | None = None,
) -> NDArray[Any]:
    """Spread ranges of flat arrays over the panel; (B, G), zero where nothing is stored.

    Args:
        starts: First value of each cell, (B,).
        stops: Behind the last value of each cell, (B,).
        genes: Panel position of each value; no gene twice in a cell.
        values: The values.
        num_genes: Length of the panel, G.
        dtype: Type of the result.
        pool: Where the memory comes from; none takes fresh memory.

    Raises:
        ValueError: If a gene lies outside the panel.
    """
    shape = (len(starts), num_genes)
    dense = np.empty(shape, dtype) if pool is None else pool.take(shape, dtype)
    spread_rows(genes, values, starts, stops, dense)
    return dense


def _smallest_count(library: NDArray[Any], edge: int, config: BinningConfig) -> NDArray[np.uint64]:
    """Smallest count, 1 or more, that reaches an edge in each cell; as `bin_counts` compares."""
    least = (2.0**edge - 1.0) * library.astype(np.float64)
    count = np.minimum(np.ceil(least / config.target_sum), 2.0**62)
    # The quotient was rounded; it may have passed a whole number in either direction.
    count -= (count - 1.0) * config.target_sum >= least
    count += count * config.target_sum < least
    return np.maximum(count, 1.0).astype(np.uint64)
