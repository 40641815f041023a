"""AnnData files: `.h5ad` and Zarr, in CSR, CSC or dense form; from `X`, a layer or `raw`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import zarr
from scipy import sparse

from datastore.raw_cells import RawCells, ReadOptions
from datastore.stored_arrays import (
    compressed_rows,
    dense_counts,
    dense_rows,
    index_of,
    is_array,
    num_values,
    read_index,
    read_values,
    refuse_incomplete,
    refuse_inconsistent,
    refuse_lost_chunks,
)


@contextmanager
def open_h5ad(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    """Open an AnnData in HDF5."""
    # Rows are read once and in order: HDF5's cache of chunks would be one more copy of all.
    with h5py.File(path, "r", rdcc_nbytes=0) as file:
        yield _anndata_cells(file, path, options)


@contextmanager
def open_zarr(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    """Open an AnnData in Zarr."""
    try:
        group = zarr.open_group(path, mode="r")
        keys = {name for name in ("obs", "var", "X", "layers", "raw") if name in group}
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} is damaged or half-copied ({error}); copy it again") from error
    if not {"obs", "var"} <= keys or not {"X", "layers", "raw"} & keys:
        raise ValueError(f"{path} is a Zarr folder but not an AnnData: obs, var or X missing")
    yield _anndata_cells(group, path, options)


def _anndata_cells(file: Any, path: Path, options: ReadOptions) -> RawCells:
    matrix, var, place = _anndata_matrix(file, path, options.layer)
    genes = tuple(map(str, read_index(var, 0, None)))
    shape = tuple(map(int, matrix.shape if is_array(matrix) else matrix.attrs["shape"]))
    if len(shape) != 2 or shape[1] != len(genes):
        raise ValueError(f"{path}: the matrix is {shape} but var has {len(genes)} genes")
    if is_array(matrix) and matrix.dtype.kind not in "biuf":
        raise ValueError(f"{path}, {place} holds {matrix.dtype} values; raw counts are needed")
    columns = file["obs"]
    present = [name for name in options.obs_columns if name in columns]
    index = {"obs": index_of(columns), "var": index_of(var)}
    refuse_incomplete({f"the names in {name}": array for name, array in index.items()}, path)
    for name, column in [("_index", index["obs"]), *((name, columns[name]) for name in present)]:
        if num_values(column) != shape[0]:
            raise ValueError(
                f"{path}: the matrix is {shape} but obs[{name!r}] has {num_values(column)} cells"
            )
    if not is_array(matrix):
        rows, others = shape[::-1] if _is_by_column(matrix) else shape
        refuse_inconsistent(matrix, rows, others, path)
    return RawCells(
        num_cells=shape[0],
        genes=genes,
        cell_names=partial(read_index, columns),
        obs={name: partial(read_values, columns[name]) for name in present},
        place=place,
        counts=_anndata_rows(matrix, shape),
        num_counts=(
            partial(_whole_dense_counts, matrix, path)
            if is_array(matrix)
            else lambda: int(matrix["data"].shape[0])
        ),
        by_row=not is_array(matrix),
        whole=not is_array(matrix) and _is_by_column(matrix),
    )


def _whole_dense_counts(matrix: Any, path: Path) -> int:
    refuse_lost_chunks(matrix, path)  # here, for this is asked once and not with every slice
    return dense_counts(matrix, False)


def _anndata_matrix(file: Any, path: Path, layer: str | None) -> tuple[Any, Any, str]:
    """The matrix, the table of its genes, and where it is."""
    layers = sorted(file["layers"]) if "layers" in file else []
    if layer is None:
        if "X" not in file:
            raise ValueError(f"{path} has no X; name the layer that holds the counts (--layer)")
        return file["X"], file["var"], "X"
    if layer in layers:
        return file["layers"][layer], file["var"], f"layers[{layer!r}]"
    if layer == "raw" and "raw" in file:
        return file["raw"]["X"], file["raw"]["var"], "raw"
    also = " (and raw)" if "raw" in file else ""
    raise ValueError(f"{path} has no layer {layer!r}; it has {layers or 'none'}{also}")


def _anndata_rows(matrix: Any, shape: tuple[int, ...]) -> Callable[[int, int], sparse.csr_matrix]:
    if is_array(matrix):
        return partial(dense_rows, matrix, False)
    if not _is_by_column(matrix):
        return partial(compressed_rows, matrix, shape[1])
    decoded: list[sparse.csr_matrix] = []

    def rows(start: int, stop: int) -> sparse.csr_matrix:
        if not decoded:
            arrays = [matrix[name][:] for name in ("data", "indices", "indptr")]
            columns = sparse.csc_matrix(tuple(arrays), shape=shape)
            columns.check_format(full_check=True)
            decoded.append(columns.tocsr())
        return decoded[0][start:stop]

    return rows


def _is_by_column(matrix: Any) -> bool:
    return "csc" in str(matrix.attrs.get("encoding-type"))
