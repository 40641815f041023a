"""Counts → expression bins → tokens (scBERT, Methods).

A cell's counts are scaled to 10,000 after alignment to the panel, then binned by
`min(top, floor(log2(1 + x)))`. Bins are whole numbers, so the edges are compared in exact integer
arithmetic instead of through a logarithm that may round across one.
"""

import numpy as np
from numpy.typing import NDArray

from datastore.config import BinningConfig


def bin_counts(
    counts: NDArray[np.generic], library_sizes: NDArray[np.generic], config: BinningConfig
) -> NDArray[np.uint8]:
    """Put each count into its expression bin.

    Args:
        counts: Raw counts, 0 or more, any shape.
        library_sizes: Sum of all panel counts of the cell each count belongs to, same shape.
        config: Scale and top bin.

    Returns:
        Bins 0 to `config.top_bin`, uint8, same shape. An expressed gene below 1 count per 10,000
        is in bin 0, as in the published code.
    """
    scaled = counts.astype(np.float64) * config.target_sum
    library = library_sizes.astype(np.float64)
    bins = np.zeros(counts.shape, np.uint8)
    for edge in range(1, config.top_bin + 1):  # x >= 2^edge - 1, without dividing
        bins += scaled >= (2.0**edge - 1.0) * library
    bins[counts == 0] = 0
    return bins


def tokenize(
    indptr: NDArray[np.int64],
    genes: NDArray[np.generic],
    counts: NDArray[np.generic],
    num_genes: int,
    config: BinningConfig,
) -> NDArray[np.uint8]:
    """Turn cells in CSR form into dense tokens.

    Args:
        indptr: Row starts, (B + 1,), beginning at 0.
        genes: Panel position of each stored count, (nnz,).
        counts: Stored counts, (nnz,).
        num_genes: Length of the panel, G.
        config: Scale and top bin.

    Returns:
        Tokens, uint8 of shape (B, G); a cell without counts is all zeros.
    """
    num_cells = len(indptr) - 1
    rows = np.repeat(np.arange(num_cells), np.diff(indptr))
    library = np.bincount(rows, weights=counts, minlength=num_cells)
    tokens = np.zeros((num_cells, num_genes), np.uint8)
    tokens[rows, genes] = bin_counts(counts, library[rows], config)
    return tokens
