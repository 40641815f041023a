"""The name of a split: the cells and their types, and neither order nor storage."""

import numpy as np
from scipy import sparse

from finetune.split_digest import split_digest


def test_the_same_cells_have_the_same_name() -> None:
    rng = np.random.default_rng(0)
    dense = rng.poisson(0.7, (20, 8))
    labels = np.array(["a", "b"])[rng.integers(0, 2, 20)]
    name = split_digest(sparse.csr_matrix(dense), labels)
    order = rng.permutation(20)
    assert split_digest(sparse.csr_matrix(dense[order].astype(np.float32)), labels[order]) == name
    stored_zeros = sparse.csr_matrix(dense + 1)
    stored_zeros.data -= 1
    assert split_digest(stored_zeros, labels) == name


def test_other_cells_have_another_name() -> None:
    dense = np.array([[1, 0, 2], [0, 3, 0]])
    labels = np.array(["a", "b"])
    names = {
        split_digest(sparse.csr_matrix(dense), labels),
        split_digest(sparse.csr_matrix(dense), labels[::-1]),
        split_digest(sparse.csr_matrix(dense[:1]), labels[:1]),
        split_digest(sparse.csr_matrix(dense[:, ::-1]), labels),
        split_digest(sparse.csr_matrix(np.hstack([dense, np.zeros((2, 1), int)])), labels),
    }
    assert len(names) == 5
