"""Cells of simulated types that methods can tell apart."""

import numpy as np
import scipy.sparse as sp

NAMES = np.array(["a", "b", "c", "rare"])


def simulated_cells(
    num_cells: tuple[int, ...], seed: int = 0, depth: float = 1
) -> tuple[sp.csr_matrix, np.ndarray]:
    """Poisson counts of 60 genes; each type has five genes of its own, and depth varies by cell."""
    rng = np.random.default_rng(seed)
    labels = np.repeat(NAMES[: len(num_cells)], num_cells)
    rates = np.tile(rng.uniform(0.2, 3, size=60), (len(labels), 1))
    for i, name in enumerate(NAMES):
        rates[np.ix_(labels == name, np.arange(5 * i, 5 * i + 5))] *= 6
    rates *= depth * rng.uniform(0.5, 2, size=(len(labels), 1))
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32)), labels
