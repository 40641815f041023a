"""Sparse arrays of Zarr whose pointers are not all stored: empty rows, or a chunk that got lost."""

from pathlib import Path

import numpy as np
import pytest
import zarr
from scipy import sparse

from datastore.stored_arrays import compressed_rows, refuse_inconsistent

NUM_GENES, CHUNK = 5, 4


def written(path: Path, counts: np.ndarray) -> zarr.Group:
    matrix, group = sparse.csr_matrix(counts), zarr.open_group(path, mode="w")
    for name in ("indptr", "indices", "data"):
        group.create_array(name, data=getattr(matrix, name), chunks=(CHUNK,))
    return group


@pytest.mark.parametrize("num_empty", [3, 4, 7, 8])
def test_empty_rows_at_the_start_are_read(tmp_path: Path, num_empty: int) -> None:
    counts = np.zeros((12, NUM_GENES), int)
    counts[num_empty:] = np.arange(1, (12 - num_empty) * NUM_GENES + 1).reshape(-1, NUM_GENES)
    group = written(tmp_path / "a.zarr", counts)
    pointers = zarr.open_array(tmp_path / "a.zarr" / "indptr", mode="r")
    assert pointers.nchunks - pointers.nchunks_initialized == (num_empty + 1) // CHUNK
    refuse_inconsistent(group, 12, NUM_GENES, tmp_path)
    np.testing.assert_array_equal(compressed_rows(group, NUM_GENES, 0, 12).toarray(), counts)


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_lost_pointers_are_refused(tmp_path: Path, lost: int) -> None:
    counts = np.ones((12, NUM_GENES), int)
    written(tmp_path / "a.zarr", counts)
    (tmp_path / "a.zarr" / "indptr" / "c" / str(lost)).unlink()
    group = zarr.open_group(tmp_path / "a.zarr", mode="r")
    with pytest.raises(ValueError, match=r"half-copied: 1 of 4 chunks of .*indptr are missing"):
        refuse_inconsistent(group, 12, NUM_GENES, tmp_path)
