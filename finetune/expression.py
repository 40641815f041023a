"""Expression as simple methods see it: counts per 10,000, variable genes, and four scales.

The scales are torch functions, so that fitting (once, on the CPU) and predicting (in batches, on
any device) share one implementation.
"""

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

NUM_MEAN_GROUPS: Final = 20
"""Groups of genes of similar mean, within which dispersions are compared."""

MIN_CELLS_PER_GENE: Final = 3
"""A gene expressed in fewer training cells is never called variable."""
DENSE_CELLS: Final = 4_096
"""Cells whose expression is made dense at a time."""


def counts_per_10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Scale each cell to 10,000 counts, float32; a cell without counts stays empty."""
    rates = counts.astype(np.float32)
    totals = np.asarray(rates.sum(axis=1), dtype=np.float64).ravel()
    factors = np.divide(10_000, totals, out=np.zeros_like(totals), where=totals > 0)
    rates.data *= np.repeat(factors, np.diff(counts.indptr)).astype(np.float32)
    return rates


def variable_genes(rates: sp.csr_matrix, num_genes: int) -> NDArray[np.int64]:
    """Return the most variable genes' columns, sorted.

    Variable is what has a high dispersion for its mean: log(variance / mean) is standardised within
    groups of genes of similar mean.

    Args:
        rates: Counts per 10,000 of the training cells, (N, G).
        num_genes: How many to return at most.
    """
    num_cells = rates.shape[0]
    num_expressing = np.bincount(rates.indices, minlength=rates.shape[1])
    mean = np.asarray(rates.sum(axis=0), dtype=np.float64).ravel() / num_cells
    mean_square = np.asarray(rates.power(2).sum(axis=0), dtype=np.float64).ravel() / num_cells
    variance = np.maximum(mean_square - mean**2, 0)
    candidates = np.flatnonzero((num_expressing >= MIN_CELLS_PER_GENE) & (variance > 0))
    if len(candidates) <= num_genes:
        return candidates if len(candidates) else np.arange(rates.shape[1])
    dispersion = np.log(variance[candidates] / mean[candidates])
    standardised = np.empty(len(candidates))
    by_mean = np.argsort(mean[candidates], kind="stable")
    for group in np.array_split(by_mean, NUM_MEAN_GROUPS):
        spread = dispersion[group].std() or 1.0
        standardised[group] = (dispersion[group] - dispersion[group].mean()) / spread
    return np.sort(candidates[np.argsort(-standardised, kind="stable")[:num_genes]])


def standardised_log(rates: Tensor) -> Tensor:
    """Scale log(1 + x) to mean 0 and variance 1 within each cell, (B, K).

    What multiplies all of a cell's expression, as its depth does, goes.
    """
    x = torch.log1p(rates)
    x = x - x.mean(dim=1, keepdim=True)
    unit: Tensor = nn.functional.normalize(x, dim=1, eps=1e-6)
    return unit * math.sqrt(x.shape[1])


def unit_log(rates: Tensor) -> Tensor:
    """Bring log(1 + x) to equal length in all cells, with a spread like the logarithm's, (B, K)."""
    unit: Tensor = nn.functional.normalize(torch.log1p(rates), dim=1, eps=1e-6)
    return unit * (0.7 * math.sqrt(rates.shape[1]))


SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "log": torch.log1p,
    "sqrt": lambda rates: rates.sqrt() / 4,  # a spread like that of the logarithm
    "standardised": standardised_log,
    "unit": unit_log,
}
"""Scales of counts per 10,000 by name: (B, K) → (B, K)."""
WITHIN_CELLS: Final = ("standardised", "unit")
"""Scales on which a gene's value depends on the cell's other genes."""


def on_scale(rates: Tensor, scale: str, compared: Tensor) -> Tensor:
    """Bring counts per 10,000, (B, K), to a scale, (B, K).

    Where a cell's genes are compared with each other, they are those of `compared`, (K,), bool; the
    others become 0.
    """
    if scale not in WITHIN_CELLS:
        return SCALES[scale](rates)
    values = torch.zeros_like(rates)
    values[:, compared] = SCALES[scale](rates[:, compared])
    return values


def scaled(rates: sp.csr_matrix, genes: NDArray[np.int64], scale: str) -> NDArray[np.float32]:
    """Return some genes' expression on a scale, float32 of shape (N, K)."""
    dense = torch.from_numpy(np.ascontiguousarray(rates[:, genes].toarray(), np.float32))
    return np.asarray(SCALES[scale](dense).numpy())


def sparsely_scaled(rates: sp.csr_matrix, genes: NDArray[np.int64], scale: str) -> sp.csr_matrix:
    """Return what `scaled` does as a CSR matrix; for scales on which no expression is 0."""
    seen, every = rates[:, genes], np.arange(len(genes))
    starts = range(0, max(seen.shape[0], 1), DENSE_CELLS)
    parts = [sp.csr_matrix(scaled(seen[at : at + DENSE_CELLS], every, scale)) for at in starts]
    return sp.vstack(parts, format="csr")
