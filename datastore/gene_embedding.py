"""Gene vectors (gene2vec) brought into panel order."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datastore.genes import GenePanel, read_panel


def load_gene_vectors(
    vectors: Path, names: Path, panel: GenePanel
) -> tuple[NDArray[np.float32], float]:
    """Import gene vectors by gene name.

    Args:
        vectors: NumPy file (`.npy`) of shape (genes, D).
        names: Text file with the gene name of each row.
        panel: Order to bring them into.

    Returns:
        Vectors, float32 of shape (G, D), zeros for genes without one; and the share of the panel
        that has one.

    Raises:
        ValueError: If the files do not fit each other or the panel shares no gene with them.
    """
    try:
        matrix = np.load(vectors, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{vectors} is not a plain NumPy array file (.npy): {error}") from error
    if not isinstance(matrix, np.ndarray) or not np.issubdtype(matrix.dtype, np.number):
        raise ValueError(f"{vectors} is not an array of numbers; give one .npy file, not .npz")
    known = read_panel(names)
    if matrix.ndim != 2 or len(matrix) != len(known):
        raise ValueError(
            f"{vectors} has shape {matrix.shape} but {names} names {len(known)} genes; "
            "give one row per name"
        )
    rows = np.array([known.positions.get(name, -1) for name in panel.names])
    found = rows >= 0
    if not found.any():
        raise ValueError(
            f"{names} shares no gene with the panel; both must use the same kind of name"
        )
    aligned = np.zeros((len(panel), matrix.shape[1]), np.float32)
    aligned[found] = matrix[rows[found]]
    return aligned, float(found.mean())
