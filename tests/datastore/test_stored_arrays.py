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


def lose(folder: Path, row: int, columns: range) -> Any:
    for column in columns:
        (folder / "c" / str(row) / str(column)).unlink()
    return zarr.open_array(folder)


SHARDS = pytest.mark.parametrize("shards", [None, (100, 60)])


def counts_in_chunks(path: Path, shards: tuple[int, int] | None) -> Any:
    counts = np.random.default_rng(0).poisson(0.3, (450, 150)).astype(np.float32)
    return dense_zarr(path, counts, (50, 30) if shards else (100, 60), shards=shards)


@SHARDS
@pytest.mark.parametrize("row", [0, 1, 3, 4])
def test_cells_of_a_dense_matrix_that_got_lost_are_found(
    tmp_path: Path, row: int, shards: tuple[int, int] | None
) -> None:
    refuse_lost_chunks(counts_in_chunks(tmp_path / "X", shards), tmp_path)
    array = lose(tmp_path / "X", row, range(3))
    last = min(100 * row + 99, 449)
    with pytest.raises(ValueError, match=rf"half-copied: .*of cells {100 * row} to {last}, where"):
        refuse_lost_chunks(array, tmp_path)


@SHARDS
@pytest.mark.parametrize(("row", "column"), [(1, 0), (3, 1), (4, 1), (0, 2)])
def test_some_genes_of_some_cells_are_named(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    row: int,
    column: int,
    shards: tuple[int, int] | None,
) -> None:
    counts_in_chunks(tmp_path / "X", shards)
    refuse_lost_chunks(lose(tmp_path / "X", row, range(column, column + 1)), tmp_path)
    if row == 4 or column == 2:  # half a chunk, about 780 counts: too few to be sure
        assert not caplog.records
        return
    cells, genes = f"cells {100 * row} to {100 * row + 99}", f"genes {60 * column} to"
    assert f"has nothing of {cells} in {genes} {60 * column + 59}, where" in caplog.text
    assert "(1 such chunks)" in caplog.text


@SHARDS
def test_a_whole_matrix_is_not_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shards: tuple[int, int] | None
) -> None:
    array = counts_in_chunks(tmp_path / "X", shards)
    monkeypatch.setattr(np, "count_nonzero", None)
    refuse_lost_chunks(array, tmp_path)


def test_chunks_of_zeros_are_no_loss(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    counts = np.random.default_rng(0).poisson(0.3, (400, 200)).astype(np.float32)
    counts[:, 50:100] = 0  # genes that no cell expresses
    counts[::7, 50:60] = 1  # but for a few of them
    counts[100:200, 50:60] = 0
    array = dense_zarr(tmp_path / "X", counts, (100, 50))
    assert array.nchunks_initialized < array.nchunks
    refuse_lost_chunks(array, tmp_path)
    assert not caplog.records
