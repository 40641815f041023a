"""Name a set of held-out cells, so that two models are compared on the same ones."""

import hashlib

import numpy as np
from numpy.typing import NDArray
from scipy import sparse


def split_digest(counts: sparse.csr_matrix, labels: NDArray[np.str_]) -> str:
    """Return a sha256 of the cells and their types, whatever their order.

    Args:
        counts: Raw counts of the held-out cells in panel order, CSR of shape (N, G).
        labels: Their cell types, (N,).
    """
    counts = counts.tocsr(copy=True)
    counts.sum_duplicates()  # sorts the genes of each cell as well
    counts.eliminate_zeros()
    cells = []
    for row, label in enumerate(labels):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        cell = hashlib.sha256(str(label).encode() + b"\0")
        cell.update(counts.indices[part].astype("<i8").tobytes())
        cell.update(counts.data[part].astype("<f8").tobytes())
        cells.append(cell.digest())
    return hashlib.sha256(str(counts.shape[1]).encode() + b"".join(sorted(cells))).hexdigest()
