"""Arrays of Zarr that are not all stored: empty rows and zeros, or a chunk that got lost."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr
from scipy import sparse

from datastore.stored_arrays import compressed_rows, refuse_inconsistent, refuse_lost_chunks

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


def dense_zarr(path: Path, counts: Any, chunks: tuple[int, int], **more: Any) -> Any:
    array = zarr.create_array(path, shape=counts.shape, chunks=chunks, dtype="float32", **more)
    array[:] = counts
    return array


@pytest.mark.parametrize("shards", [None, (100, 60)])
@pytest.mark.parametrize(("row", "column"), [(1, 0), (3, 1), (4, 0), (0, 2)])
def test_a_chunk_of_a_dense_matrix_that_got_lost_is_found(
    tmp_path: Path, row: int, column: int, shards: tuple[int, int] | None
) -> None:
    counts = np.random.default_rng(0).poisson(0.3, (450, 150)).astype(np.float32)
    chunks = (100, 60) if shards is None else (50, 30)
    array = dense_zarr(tmp_path / "X", counts, chunks, shards=shards)
    refuse_lost_chunks(array, tmp_path)
    (tmp_path / "X" / "c" / str(row) / str(column)).unlink()
    array = zarr.open_array(tmp_path / "X")
    if row == 4 or column == 2:  # half a chunk, about 780 counts: too few to be sure
        refuse_lost_chunks(array, tmp_path)
        return
    which = f"cells {100 * row} to {100 * row + 99} of genes {60 * column} to {60 * column + 59}"
    with pytest.raises(ValueError, match=rf"half-copied: 1 chunks of .*, such as {which}"):
        refuse_lost_chunks(array, tmp_path)


def test_chunks_of_zeros_are_no_loss(tmp_path: Path) -> None:
    counts = np.random.default_rng(0).poisson(0.3, (400, 200)).astype(np.float32)
    counts[:, 50:100] = 0  # genes that no cell expresses
    counts[::7, 50:60] = 1  # but for a few of them
    counts[100:200, 50:60] = 0
    array = dense_zarr(tmp_path / "X", counts, (100, 50))
    assert array.nchunks_initialized < array.nchunks
    refuse_lost_chunks(array, tmp_path)
