"""One small reader per format of raw counts; `FORMATS` has them by name.

Each opens a file and says what it holds. AnnData in CSR or dense form, 10x `.h5` and `.loom` are
read slice by slice. AnnData in CSC form, `.RData`, 10x mtx folders and tables of text can only be
decoded whole: `RawCells.whole` says so, and ingest opens them once for all their slices.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import anndata
import h5py
import numpy as np
import rdata
import zarr
from numpy.typing import NDArray
from scipy import io, sparse

from datastore.text_tables import Orientation, open_text, read_table

Names = NDArray[np.object_]
_VALUES_AT_ONCE: Final = 2**23
"""Dense values decoded at once, so that a slice of a dense file needs little more than its CSR."""
_R_GENE: Final = re.compile(r"^(.+?)[-_]ENS[A-Z]*G\d{6,}(\.\d+)?$")
_LOOM_GENES: Final = ("Gene", "gene_names", "var_names", "GeneName", "gene_name", "Symbol")
_LOOM_CELLS: Final = ("CellID", "obs_names", "cell_names", "cell_id", "Barcode", "barcode")


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """What a person may say about how to read a file."""

    layer: str | None = None
    """Layer that holds the counts, or `raw`; formats without layers ignore it."""
    orientation: Orientation = "auto"
    """What the rows of a text table are."""
    obs_columns: tuple[str, ...] = ()
    """Columns of obs that are carried along where a file has them."""
    known_genes: frozenset[str] = frozenset()
    """Names by which a table's genes are told from its cells."""
    recover_counts: bool = False
    """Whether counts may be computed back from normalised expression."""


@dataclass(frozen=True, kw_only=True)
class RawCells:
    """An open file: its genes, and its cells by row. Counts are as the file has them, unchecked."""

    num_cells: int
    genes: tuple[str, ...]
    counts: Callable[[int, int], sparse.csr_matrix]
    """Rows [start, stop) as CSR of shape (stop - start, genes)."""
    cell_names: Callable[[int, int], Names]
    num_counts: Callable[[], int]
    """Stored counts; of a dense file an estimate from its first cells."""
    obs: Mapping[str, Callable[[int, int], Names]] = field(default_factory=dict)
    """The columns of obs that were asked for and are there."""
    place: str = "X"
    """Where in the file the counts are, for messages."""
    whole: bool = False
    """Whether the file was decoded whole."""
    by_row: bool = False
    """Whether a few rows at a time are read as fast as many."""
    orientation: Orientation = "auto"
    """What a table's rows turned out to be."""


def _whole(
    matrix: sparse.spmatrix, genes: Sequence[str], cells: Sequence[str], **more: Any
) -> RawCells:
    """A file that was decoded whole."""
    rows = sparse.csr_matrix(matrix)
    names = np.array(cells, object)
    return RawCells(
        num_cells=rows.shape[0],
        genes=tuple(genes),
        counts=lambda start, stop: rows[start:stop],
        cell_names=lambda start, stop: names[start:stop],
        num_counts=lambda: int(rows.nnz),
        whole=True,
        by_row=True,
        **more,
    )


# --- AnnData: .h5ad and Zarr ---


@contextmanager
def _open_h5ad(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    with h5py.File(path, "r") as file:
        yield _anndata_cells(file, path, options)


@contextmanager
def _open_zarr(path: Path, options: ReadOptions) -> Iterator[RawCells]:
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
    genes = tuple(map(str, _index(var, 0, None)))
    shape = tuple(map(int, matrix.shape if _is_array(matrix) else matrix.attrs["shape"]))
    if len(shape) != 2 or shape[1] != len(genes):
        raise ValueError(f"{path}: the matrix is {shape} but var has {len(genes)} genes")
    columns = file["obs"]
    present = [name for name in options.obs_columns if name in columns]
    return RawCells(
        num_cells=shape[0],
        genes=genes,
        cell_names=partial(_index, columns),
        obs={name: partial(_values, columns[name]) for name in present},
        place=place,
        counts=_anndata_rows(matrix, shape),
        num_counts=(
            partial(_dense_counts, matrix, False)
            if _is_array(matrix)
            else lambda: int(matrix["data"].shape[0])
        ),
        by_row=not _is_array(matrix),
        whole=not _is_array(matrix) and "csc" in str(matrix.attrs.get("encoding-type")),
    )


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
    if _is_array(matrix):
        return partial(_dense_rows, matrix, False)
    if "csc" not in str(matrix.attrs.get("encoding-type")):
        return partial(_compressed_rows, matrix, shape[1])
    decoded: list[sparse.csr_matrix] = []

    def rows(start: int, stop: int) -> sparse.csr_matrix:
        if not decoded:
            arrays = [matrix[name][:] for name in ("data", "indices", "indptr")]
            columns = sparse.csc_matrix(tuple(arrays), shape=shape)
            columns.check_format(full_check=True)
            decoded.append(columns.tocsr())
        return decoded[0][start:stop]

    return rows


def _is_array(element: Any) -> bool:
    return isinstance(element, h5py.Dataset | zarr.Array)


def _index(table: Any, start: int, stop: int | None) -> Names:
    return _values(table[table.attrs.get("_index", "_index")], start, stop)


def _values(element: Any, start: int, stop: int | None) -> Names:
    """Rows [start, stop) of a column as objects; None stands for a missing one."""
    if not _is_array(element):
        if element.attrs.get("encoding-type") != "categorical":
            return _objects(anndata.io.read_elem(element)[start:stop])
        return _categories(element["codes"][start:stop], _values(element["categories"], 0, None))
    if "categories" in element.attrs and isinstance(element, h5py.Dataset):  # before anndata 0.8
        former = element.file[element.attrs["categories"]]
        return _categories(element[start:stop], _values(former, 0, None))
    if isinstance(element, h5py.Dataset) and h5py.check_string_dtype(element.dtype):
        return _objects(element.asstr()[start:stop])
    return _objects(element[start:stop])


def _categories(codes: NDArray[np.integer[Any]], categories: Names) -> Names:
    with_missing: Names = np.array([*categories, None], object)
    return np.take(with_missing, codes)  # code -1 is missing


def _objects(values: Any) -> Names:
    array = np.asarray(values, object)
    return np.array([None if value is None or value != value else value for value in array], object)


# --- rows of stored matrices ---


def _compressed_rows(group: Any, num_genes: int, start: int, stop: int) -> sparse.csr_matrix:
    """Rows [start, stop) of CSR arrays (or columns of CSC ones, which is the transpose)."""
    indptr = np.asarray(group["indptr"][start : stop + 1], np.int64)
    first, last = int(indptr[0]), int(indptr[-1])
    matrix = sparse.csr_matrix(
        (group["data"][first:last], group["indices"][first:last], indptr - first),
        shape=(stop - start, num_genes),
    )
    matrix.check_format(full_check=True)
    return matrix


def _dense_rows(array: Any, transposed: bool, start: int, stop: int) -> sparse.csr_matrix:
    """Rows [start, stop) of a dense array, or of its transpose, a few at a time."""
    axis = 1 if transposed else 0
    chunk = array.chunks[axis] if array.chunks else 1
    step = max(1, _VALUES_AT_ONCE // max(1, array.shape[1 - axis]) // chunk) * chunk
    # Steps begin where chunks do, so that none is decoded twice.
    edges = [start, *range((start // step + 1) * step, stop, step), stop]
    blocks = [
        array[:, low:high].T if transposed else array[low:high] for low, high in pairwise(edges)
    ]
    return sparse.vstack([sparse.csr_matrix(block) for block in blocks], format="csr")


def _dense_counts(array: Any, transposed: bool) -> int:
    """Estimate the counts of a dense array, or of its transpose, from its first cells."""
    num_cells = array.shape[1 if transposed else 0]
    seen = min(num_cells, 64)
    return int(_dense_rows(array, transposed, 0, seen).nnz / max(1, seen) * num_cells)


# --- 10x ---


@contextmanager
def _open_10x_h5(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    """Cell Ranger 3 and later keep one group `matrix`; before, there was a group per genome."""
    with h5py.File(path, "r") as file:
        genomes = [name for name, group in file.items() if "indptr" in group]
        if len(genomes) != 1:
            raise ValueError(
                f"{path} holds several genomes ({', '.join(genomes)}); split it into one file each"
            )
        group = file[genomes[0]]
        if "features" in group:
            names, types = group["features/name"], group["features"].get("feature_type")
        else:
            names, types = group["gene_names" if "gene_names" in group else "genes"], None
        genes = _values(names, 0, None)
        num_cells = int(group["shape"][1])
        if (len(genes), num_cells) != (int(group["shape"][0]), len(group["barcodes"])):
            raise ValueError(f"{path} does not name every gene and cell of its matrix")
        kept = _expression_only(None if types is None else _values(types, 0, None), len(genes))
        yield RawCells(
            num_cells=num_cells,
            genes=tuple(map(str, genes[kept])),
            counts=lambda start, stop: _select(
                _compressed_rows(group, len(genes), start, stop), kept
            ),
            cell_names=partial(_values, group["barcodes"]),
            num_counts=lambda: len(group["data"]),
            by_row=True,
            place=genomes[0],
        )


@contextmanager
def _open_10x_mtx(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    files = [
        _first_file(path, names)
        for names in (("matrix.mtx",), ("features.tsv", "genes.tsv"), ("barcodes.tsv",))
    ]
    try:
        matrix = sparse.coo_matrix(io.mmread(files[0])).T
        lines = [_text_lines(file) for file in files[1:]]
    except (OSError, ValueError, EOFError, IndexError, OverflowError) as error:
        raise ValueError(
            f"{path} is damaged or half-copied ({error}); copy the folder again"
        ) from error
    features = [line.split("\t") for line in lines[0]]
    if matrix.shape != (len(lines[1]), len(features)):
        raise ValueError(
            f"{path}: {files[0].name} is {matrix.shape[1]} genes × {matrix.shape[0]} cells, but "
            f"{files[1].name} names {len(features)} genes and {files[2].name} {len(lines[1])} "
            "cells; copy the folder again"
        )
    types = None
    if all(len(row) > 2 for row in features):
        types = np.array([row[2] for row in features], object)
    kept = _expression_only(types, len(features))
    names = np.array([row[1] if len(row) > 1 else row[0] for row in features], object)
    cells = [line.split("\t")[0] for line in lines[1]]
    yield _whole(_select(matrix.tocsr(), kept), list(names[kept]), cells, place=files[0].name)


def _text_lines(path: Path) -> list[str]:
    with open_text(path) as file:
        return file.read().splitlines()


def _first_file(folder: Path, names: Sequence[str]) -> Path:
    for name in names:
        for path in (folder / f"{name}.gz", folder / name):
            if path.is_file():
                return path
    raise ValueError(
        f"{folder} is a 10x folder without {' or '.join(names)} (plain or .gz): half-copied; "
        "copy it again"
    )


def _expression_only(types: Names | None, num_features: int) -> NDArray[np.int64]:
    """Places of the genes among features, which may be antibodies or guides as well."""
    genes: NDArray[np.int64] = np.arange(num_features)
    if types is None or not (types == "Gene Expression").any():
        return genes
    return np.flatnonzero(types == "Gene Expression")


def _select(matrix: sparse.csr_matrix, kept: NDArray[np.int64]) -> sparse.csr_matrix:
    return matrix if len(kept) == matrix.shape[1] else matrix[:, kept]


# --- loom ---


@contextmanager
def _open_loom(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    with h5py.File(path, "r") as file:
        matrix, place = file["matrix"], "matrix"
        if options.layer is not None:
            layers = sorted(file["layers"]) if "layers" in file else []
            if options.layer not in layers:
                raise ValueError(
                    f"{path} has no layer {options.layer!r}; it has {layers or 'none'}"
                )
            matrix, place = file["layers"][options.layer], f"layers[{options.layer!r}]"
        rows, columns = file["row_attrs"], file["col_attrs"]
        genes = next((rows[name] for name in _LOOM_GENES if name in rows), None)
        if genes is None:
            raise ValueError(
                f"{path} names no genes: row_attrs has {sorted(rows)}, one of "
                f"{', '.join(_LOOM_GENES)} is needed"
            )
        cells = next((columns[name] for name in _LOOM_CELLS if name in columns), None)
        if matrix.shape[0] != len(genes) or (cells is not None and matrix.shape[1] != len(cells)):
            raise ValueError(f"{path} does not name every gene and cell of its matrix")
        present = [name for name in options.obs_columns if name in columns]
        yield RawCells(
            num_cells=int(matrix.shape[1]),
            genes=tuple(map(str, _values(genes, 0, None))),
            counts=partial(_dense_rows, matrix, True),
            num_counts=partial(_dense_counts, matrix, True),
            cell_names=_row_numbers if cells is None else partial(_values, cells),
            obs={name: partial(_values, columns[name]) for name in present},
            place=place,
        )


def _row_numbers(start: int, stop: int) -> Names:
    return np.array([f"cell{row}" for row in range(start, stop)], object)


# --- R ---


@contextmanager
def _open_rdata(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    """PanglaoDB's `.sparse.RData`: a dgCMatrix `sm` of genes × cells, rows `SYMBOL_ENSG…`."""
    try:
        objects = _r_objects(rdata.parser.parse_data(path.read_bytes(), extension=".RData").object)
    except Exception as error:  # the parser fails in as many ways as a file can be damaged
        raise ValueError(f"{path} is cut short or damaged ({error}); fetch it again") from error
    if "sm" not in objects:
        raise ValueError(
            f"{path} holds no R object sm but {', '.join(objects)}; in R: save the sparse matrix "
            "of counts (genes × cells, a dgCMatrix) as sm"
        )
    slots: dict[str, Any] = {}
    constructors: dict[str | bytes, Any] = {"dgCMatrix": lambda _, found: slots.update(found)}
    rdata.conversion.convert(objects["sm"], constructors, default_encoding="utf-8")
    if not slots:
        raise ValueError(f"{path}: sm is not a dgCMatrix; in R: sm <- as(sm, 'CsparseMatrix')")
    names = [None if axis is None else list(axis) for axis in slots["Dimnames"]]
    num_genes, num_cells = map(int, slots["Dim"])
    if names[0] is None:
        raise ValueError(f"{path}: sm has no row names; name its genes")
    try:
        # The columns of a dgCMatrix are the rows of its transpose: nothing is copied.
        matrix = sparse.csr_matrix(
            (slots["x"], slots["i"], slots["p"]), shape=(num_cells, num_genes)
        )
        matrix.check_format(full_check=True)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}; fetch it again") from error
    cells = names[1] if names[1] is not None else list(_row_numbers(0, num_cells))
    yield _whole(matrix, [r_gene_symbol(str(name)) for name in names[0]], cells, place="sm")


def r_gene_symbol(name: str) -> str:
    """Take the symbol out of `SYMBOL_ENSG00000000003.14`; other names stay as they are."""
    match = _R_GENE.match(name)
    return match.group(1) if match else name


def _r_objects(pairs: Any) -> dict[str, Any]:
    """Objects of a saved workspace by name, not yet converted."""
    objects = {}
    while pairs.info.type is rdata.parser.RObjectType.LIST:
        tag = pairs.tag.referenced_object or pairs.tag
        objects[tag.value.value.decode()] = pairs.value[0]
        pairs = pairs.value[1]
    return objects


# --- text ---


@contextmanager
def _open_table(path: Path, options: ReadOptions) -> Iterator[RawCells]:
    table = read_table(path, options.orientation, options.known_genes)
    yield _whole(
        table.counts, table.genes, table.cells, place="the table", orientation=table.orientation
    )


Opener = Callable[[Path, ReadOptions], AbstractContextManager[RawCells]]

FORMATS: Final[dict[str, Opener]] = {
    "h5ad": _open_h5ad,
    "zarr": _open_zarr,
    "10x h5": _open_10x_h5,
    "10x mtx": _open_10x_mtx,
    "loom": _open_loom,
    "rdata": _open_rdata,
    "table": _open_table,
}
