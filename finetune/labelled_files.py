"""The copy of the input that gets the labels, and the table of them; whole or not at all.

An `.h5ad` is copied byte by byte and then added to, an AnnData Zarr array by array, so whatever was
in it is still there. Of another raw file the copy holds the counts and the names, of a cell store
the names only: its counts stay in the store.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import h5py
import numpy as np
import pandas as pd
import zarr
from anndata.io import write_elem
from numpy.typing import NDArray
from scipy import sparse

from datastore.stored_arrays import is_array
from finetune.classifier import Predictions
from finetune.labelled import CellLabels
from finetune.query import STORE, Query

_VALUES_AT_ONCE: Final = 2**22
_ROWS_AT_ONCE: Final = 65_536


def refuse_output(output: Path, source: str) -> None:
    """Refuse a target that is the input, or no `.h5ad`.

    Raises:
        ValueError: With the remedy.
    """
    if "://" not in source and output.resolve() == Path(source).resolve():
        raise ValueError(f"output is the input file {source}; choose another name")
    if output.suffix != ".h5ad":
        raise ValueError(f"output is {output.name}; its name must end in .h5ad")


class LabelledFile:
    """An `.h5ad` that grows beside its target and is renamed when everything went well."""

    def __init__(self, target: Path, query: Query, key: str) -> None:
        self._target, self._query, self._key = target, query, key
        self._beside = target.with_name(target.name + ".part")
        self._file: Any = None
        self._row_ends: list[NDArray[np.int64]] = []
        self._arrays: dict[str, Any] = {}

    def __enter__(self) -> "LabelledFile":
        self._target.parent.mkdir(parents=True, exist_ok=True)
        try:
            self._open()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file:
            self._file.close()
        if kind is not None:
            self._remove()
            return
        publish(self._beside, self._target)

    def write(self, start: int, predictions: Predictions, counts: sparse.csr_matrix | None) -> None:
        """Enter embedding and probabilities of the rows from `start` on, and counts if need be."""
        rows = slice(start, start + len(predictions.embedding))
        self._matrix(f"X_{self._key}", predictions.embedding)[rows] = predictions.embedding
        self._matrix(f"{self._key}_prob", predictions.probabilities)[rows] = (
            predictions.probabilities
        )
        if self._writes_counts and counts is not None:
            self._append(counts)

    def finish(
        self,
        labels: CellLabels,
        provenance: dict[str, Any],
        varm: Mapping[str, NDArray[np.float32]] | None = None,
    ) -> None:
        """Enter the columns of obs, where they come from, and matrices of genes if there are."""
        if self._writes_counts:
            ends = np.concatenate([np.zeros(1, np.int64), *self._row_ends])
            self._file["X"].create_dataset("indptr", data=ends)
        obs = self._file["obs"]
        columns = labels.columns(self._key)
        for name, values in columns.items():
            _replace(obs, name, values)
        former = [str(name) for name in obs.attrs["column-order"] if name not in columns]
        order = np.array([*former, *columns], object)
        obs.attrs.create("column-order", order, dtype=h5py.string_dtype())
        _replace(_group(self._file, "uns"), self._key, provenance)
        for name, matrix in (varm or {}).items():
            _replace(_group(self._file, "varm"), f"{self._key}_{name}", matrix)

    @property
    def _writes_counts(self) -> bool:
        return self._query.kind not in (STORE, "h5ad", "zarr")

    def _open(self) -> None:
        query = self._query
        if query.kind == "h5ad":
            _refuse_small_disk(self._target, Path(query.where).stat().st_size)
            shutil.copyfile(query.where, self._beside)
            self._beside.chmod(0o644)  # the input may be read-only
            self._file = h5py.File(self._beside, "r+")
            return
        self._file = h5py.File(self._beside, "w")
        if query.kind == "zarr":
            _copy_zarr(zarr.open_group(query.where, mode="r"), self._file)
            return
        self._file.attrs.update({"encoding-type": "anndata", "encoding-version": "0.1.0"})
        names = pd.Index(query.names(0, query.num_cells), dtype=object)
        write_elem(self._file, "obs", pd.DataFrame(index=names))
        write_elem(self._file, "var", pd.DataFrame(index=list(query.genes)))
        if self._writes_counts:
            matrix = self._file.create_group("X")
            matrix.attrs.update({"encoding-type": "csr_matrix", "encoding-version": "0.1.0"})
            matrix.attrs["shape"] = (query.num_cells, len(query.genes))

    def _append(self, counts: sparse.csr_matrix) -> None:
        matrix = self._file["X"]
        for name, values in (("data", counts.data), ("indices", counts.indices)):
            if name not in matrix:
                matrix.create_dataset(
                    name, (0,), values.dtype, maxshape=(None,), chunks=(2**16,), compression="lzf"
                )
            length = matrix[name].shape[0]
            matrix[name].resize(length + len(values), axis=0)
            matrix[name][length:] = values
        before = self._row_ends[-1][-1] if self._row_ends else 0
        self._row_ends.append(counts.indptr[1:].astype(np.int64) + before)

    def _matrix(self, name: str, like: NDArray[np.float32]) -> Any:
        """Array of obsm with a row for each cell; what was there under the name is replaced."""
        if name not in self._arrays:
            obsm = _group(self._file, "obsm")
            if name in obsm:
                del obsm[name]
            shape = (self._query.num_cells, like.shape[1])
            self._arrays[name] = obsm.create_dataset(name, shape, np.float32)
            kind = {"encoding-type": "array", "encoding-version": "0.2.0"}
            self._arrays[name].attrs.update(kind)
        return self._arrays[name]

    def _remove(self) -> None:
        with suppress(OSError):
            self._beside.unlink()


def write_table(target: Path, query: Query, labels: CellLabels, key: str) -> Path:
    """Write the columns of obs as CSV, a line per cell."""

    def write(beside: Path) -> None:
        with beside.open("w", encoding="utf-8") as file:
            for start in range(0, len(labels), _ROWS_AT_ONCE):
                stop = min(start + _ROWS_AT_ONCE, len(labels))
                index = pd.Index(query.names(start, stop), name="cell")
                part = pd.DataFrame(labels.columns(key, slice(start, stop)), index=index)
                part.to_csv(file, header=start == 0)

    write_beside(target, write)
    return target


def write_beside(target: Path, write: Callable[[Path], object]) -> None:
    """Let a file be written beside its target, and publish it when it is whole."""
    beside = target.with_name(target.name + ".part")
    try:
        write(beside)
        publish(beside, target)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def publish(beside: Path, target: Path) -> None:
    """Flush a whole file to disk and give it its name."""
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(target)


def _group(file: Any, name: str) -> Any:
    if name not in file:
        write_elem(file, name, {})
    return file[name]


def _replace(group: Any, name: str, value: Any) -> None:
    if name in group:
        del group[name]
    write_elem(group, name, value)


def _refuse_small_disk(target: Path, size: int) -> None:
    free = shutil.disk_usage(target.parent).free
    if free < size:
        raise ValueError(
            f"{target.parent} has {free / 1e9:.1f} GB free, the copy needs {size / 1e9:.1f} GB; "
            "give an --output on a larger disk"
        )


def _copy_zarr(source: Any, target: Any) -> None:
    """Copy a Zarr group into an HDF5 group, array by array, some values at a time."""
    target.attrs.update({name: _attribute(value) for name, value in source.attrs.items()})
    for name, element in source.members():
        if not is_array(element):
            _copy_zarr(element, target.create_group(name))
            continue
        is_text = element.dtype.kind in "OTU"
        kind = h5py.string_dtype() if is_text else element.dtype
        array = target.create_dataset(name, element.shape, kind)
        array.attrs.update({key: _attribute(value) for key, value in element.attrs.items()})
        if not element.shape:
            array[()] = str(element[()]) if is_text else element[()]
            continue
        per_row = max(1, int(np.prod(element.shape[1:])))
        step = max(1, _VALUES_AT_ONCE // per_row)
        for start in range(0, element.shape[0], step):
            part = np.asarray(element[start : start + step])
            array[start : start + step] = part.astype(object) if is_text else part


def _attribute(value: Any) -> Any:
    """A list of texts as HDF5 keeps it."""
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return np.array(value, h5py.string_dtype())
    return value
