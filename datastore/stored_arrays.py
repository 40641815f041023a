"""Columns and matrices as HDF5 and Zarr store them, read some rows at a time."""

import logging
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import anndata
import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from datastore.raw_cells import Names

log = logging.getLogger(__name__)

_VALUES_AT_ONCE: Final = 2**23
"""Dense values decoded at once, so that a slice of a dense file needs little more than its CSR."""


_SURELY_STORED: Final = 1000
"""Counts expected in a chunk of a dense matrix before its absence means that it got lost."""


def is_array(element: Any) -> bool:
    """Tell an array from a group of arrays."""
    return isinstance(element, h5py.Dataset | zarr.Array)


def index_of(table: Any) -> Any:
    """The index of a stored data frame, not yet read."""
    return table[table.attrs.get("_index", "_index")]


def read_index(table: Any, start: int, stop: int | None) -> Names:
    """Read rows [start, stop) of the index of a stored data frame."""
    return read_values(index_of(table), start, stop)


def read_values(element: Any, start: int, stop: int | None) -> Names:
    """Read rows [start, stop) of a column as objects; None stands for a missing one."""
    if not is_array(element):
        if element.attrs.get("encoding-type") != "categorical":
            return _objects(anndata.io.read_elem(element)[start:stop])
        return _categories(
            element["codes"][start:stop], read_values(element["categories"], 0, None)
        )
    if "categories" in element.attrs and isinstance(element, h5py.Dataset):  # before anndata 0.8
        former = element.file[element.attrs["categories"]]
        return _categories(element[start:stop], read_values(former, 0, None))
    if isinstance(element, h5py.Dataset) and h5py.check_string_dtype(element.dtype):
        return _objects(element.asstr("utf-8")[start:stop])
    return _objects(element[start:stop])


def _categories(codes: NDArray[np.integer[Any]], categories: Names) -> Names:
    with_missing: Names = np.array([*categories, None], object)
    return np.take(with_missing, codes)  # code -1 is missing


def _objects(values: Any) -> Names:
    array = np.asarray(values, object)
    return np.array([None if value is None or value != value else value for value in array], object)


def num_values(element: Any) -> int:
    """Count the values of a column, without reading them."""
    if not is_array(element):
        element = element["codes" if "codes" in element else "values"]
    return int(element.shape[0])


def refuse_incomplete(arrays: Mapping[str, Any], path: Path) -> None:
    """Refuse arrays of a Zarr folder that lack chunks: these would be read as zeros, or no names.

    Only for arrays of which no whole chunk can be zeros; chunks of zeros are not stored.

    Raises:
        ValueError: If a chunk is missing.
    """
    for name, array in arrays.items():
        if isinstance(array, zarr.Array) and array.nchunks_initialized < array.nchunks:
            missing = array.nchunks - array.nchunks_initialized
            raise ValueError(
                f"{path} is half-copied: {missing} of {array.nchunks} chunks of {name} are "
                "missing; copy it again"
            )


def refuse_lost_chunks(matrix: Any, path: Path) -> None:
    """Refuse a dense Zarr matrix that has nothing of some cells where others have many counts.

    Chunks of zeros are not stored, so one that got lost cannot be told from them by name. Where all
    chunks of some cells are missing, though a thousand counts and more are expected there, the
    folder was not copied whole. Where only some of their genes are, these may not have been
    measured in those cells; it is said, and they go on as zeros. Reads the whole matrix if chunks
    are missing.

    Raises:
        ValueError: If some cells have no chunk.
    """
    if not isinstance(matrix, zarr.Array):
        return
    height, width = matrix.shards or matrix.chunks
    tops, lefts = range(0, matrix.shape[0], height), range(0, matrix.shape[1], width)
    of_shard = 1 if matrix.shards is None else np.prod(matrix.shards) // np.prod(matrix.chunks)
    if matrix.nchunks_initialized >= len(tops) * len(lefts) * of_shard:
        return
    stored = np.array(
        [
            [np.count_nonzero(matrix[top : top + height, left : left + width]) for left in lefts]
            for top in tops
        ]
    )
    cells = np.minimum(height, matrix.shape[0] - np.array(tops))[:, None]
    per_cell = stored.sum(axis=0) / np.maximum((cells * (stored > 0)).sum(axis=0), 1)
    expected = per_cell * cells
    without = (stored.sum(axis=1) == 0) & (expected.sum(axis=1) >= _SURELY_STORED)
    lost = (stored == 0) & (expected >= _SURELY_STORED) | without[:, None]
    if not lost.any():
        return
    row, column = np.argwhere(without[:, None] if without.any() else lost)[0]
    last = min((row + 1) * height, matrix.shape[0]) - 1
    which = f"{matrix.name} has nothing of cells {row * height} to {last}"
    if without.any():
        raise ValueError(f"{path} is half-copied: {which}, where others have many; copy it again")
    right = min((column + 1) * width, matrix.shape[1]) - 1
    log.warning(
        "%s: %s in genes %d to %d, where others have many (%d such chunks): if these genes were "
        "measured in those cells, copy the folder again",
        *(path, which, column * width, right, int(lost.sum())),
    )


def refuse_inconsistent(group: Any, num_rows: int, num_columns: int, path: Path) -> None:
    """Look at the ends of CSR arrays (or CSC ones, of columns) before any are read by part.

    Raises:
        ValueError: If they do not belong together, or a chunk of them is missing.
    """
    indptr, indices, data = (group[name] for name in ("indptr", "indices", "data"))
    sizes = [int(array.shape[0]) for array in (indptr, indices, data)]
    if sizes[0] != num_rows + 1 or sizes[1] != sizes[2]:
        raise ValueError(
            f"{path} is damaged: of {num_rows} rows or columns there are {sizes[0]} pointers, "
            f"{sizes[1]} indices and {sizes[2]} values; fetch it again"
        )
    if indices.dtype.kind not in "iu" or indptr.dtype.kind not in "iu":
        raise ValueError(f"{path} is damaged: its indices are {indices.dtype}; fetch it again")
    if sizes[2] and num_columns > 1:
        of_group = {name: f"{group.name}/{name}" for name in ("indptr", "indices", "data")}
        if not _begins_with_empty_rows(indptr, num_columns):
            refuse_incomplete({of_group["indptr"]: indptr}, path)
        refuse_incomplete({of_group["indices"]: indices, of_group["data"]: data}, path)
    ends = int(indptr[0]), int(indptr[-1])
    if ends != (0, sizes[2]):
        raise ValueError(
            f"{path} is damaged: its pointers go from {ends[0]} to {ends[1]}, its values from 0 to "
            f"{sizes[2]}; fetch it again"
        )


def _begins_with_empty_rows(indptr: Any, num_columns: int) -> bool:
    """Whether the chunks of pointers that are not stored can be those of empty rows at the start.

    Where such chunks got lost instead, the first row behind them has all their values, which are
    more than there are columns.
    """
    if not isinstance(indptr, zarr.Array) or indptr.nchunks_initialized == indptr.nchunks:
        return False
    pointers = np.asarray(indptr[:], np.int64)
    num_zeros = int(np.count_nonzero(pointers == 0))
    absent = indptr.nchunks - indptr.nchunks_initialized
    sizes = np.diff(pointers)
    rising = bool((sizes >= 0).all() and sizes.max() <= num_columns and pointers[-1] > 0)
    return rising and absent <= num_zeros // indptr.chunks[0]


def compressed_rows(group: Any, num_genes: int, start: int, stop: int) -> sparse.csr_matrix:
    """Read rows [start, stop) of CSR arrays (or columns of CSC ones, which is the transpose)."""
    indptr = np.asarray(group["indptr"][start : stop + 1], np.int64)
    first, last = int(indptr[0]), int(indptr[-1])
    matrix = sparse.csr_matrix(
        (group["data"][first:last], group["indices"][first:last], indptr - first),
        shape=(stop - start, num_genes),
    )
    matrix.check_format(full_check=True)
    return matrix


def dense_rows(array: Any, transposed: bool, start: int, stop: int) -> sparse.csr_matrix:
    """Read rows [start, stop) of a dense array, or of its transpose, a few at a time."""
    axis = 1 if transposed else 0
    chunk = array.chunks[axis] if array.chunks else 1
    step = max(1, _VALUES_AT_ONCE // max(1, array.shape[1 - axis]) // chunk) * chunk
    # Steps begin where chunks do, so that none is decoded twice.
    edges = [start, *range((start // step + 1) * step, stop, step), stop]
    blocks = [
        array[:, low:high].T if transposed else array[low:high] for low, high in pairwise(edges)
    ]
    return sparse.vstack([sparse.csr_matrix(block) for block in blocks], format="csr")


def dense_counts(array: Any, transposed: bool) -> int:
    """Estimate the counts of a dense array, or of its transpose, from its first cells."""
    num_cells = array.shape[1 if transposed else 0]
    seen = min(num_cells, 64)
    return int(dense_rows(array, transposed, 0, seen).nnz / max(1, seen) * num_cells)
