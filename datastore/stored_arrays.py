"""Columns and matrices as HDF5 and Zarr store them, read some rows at a time."""

from itertools import pairwise
from typing import Any, Final

import anndata
import h5py
import numpy as np
import zarr
from numpy.typing import NDArray
from scipy import sparse

from datastore.raw_cells import Names

_VALUES_AT_ONCE: Final = 2**23
"""Dense values decoded at once, so that a slice of a dense file needs little more than its CSR."""


def is_array(element: Any) -> bool:
    """Tell an array from a group of arrays."""
    return isinstance(element, h5py.Dataset | zarr.Array)


def read_index(table: Any, start: int, stop: int | None) -> Names:
    """Read rows [start, stop) of the index of a stored data frame."""
    return read_values(table[table.attrs.get("_index", "_index")], start, stop)


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
        return _objects(element.asstr()[start:stop])
    return _objects(element[start:stop])


def _categories(codes: NDArray[np.integer[Any]], categories: Names) -> Names:
    with_missing: Names = np.array([*categories, None], object)
    return np.take(with_missing, codes)  # code -1 is missing


def _objects(values: Any) -> Names:
    array = np.asarray(values, object)
    return np.array([None if value is None or value != value else value for value in array], object)


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
