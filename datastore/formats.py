"""One small reader per format of raw counts; `FORMATS` has them by name.

Each opens a file and says what it holds. AnnData in CSR or dense form, 10x `.h5` and `.loom` are
read slice by slice. AnnData in CSC form, `.RData`, 10x mtx folders and tables of text can only be
decoded whole: `RawCells.whole` says so, and ingest opens them once for all their slices.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import h5py
import numpy as np
import rdata
from numpy.typing import NDArray
from scipy import io, sparse

from datastore.anndata_files import open_h5ad, open_zarr
from datastore.raw_cells import Names, RawCells, ReadOptions, decoded_whole
from datastore.stored_arrays import (
    compressed_rows,
    dense_counts,
    dense_rows,
    read_values,
    refuse_inconsistent,
)
from datastore.text_tables import open_text, read_table

_R_GENE: Final = re.compile(r"^(.+?)[-_]ENS[A-Z]*G\d{6,}(\.\d+)?$")
_LOOM_GENES: Final = ("Gene", "gene_names", "var_names", "GeneName", "gene_name", "Symbol")
_LOOM_CELLS: Final = ("CellID", "obs_names", "cell_names", "cell_id", "Barcode", "barcode")

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
        genes = read_values(names, 0, None)
        num_cells = int(group["shape"][1])
        if (len(genes), num_cells) != (int(group["shape"][0]), len(group["barcodes"])):
            raise ValueError(f"{path} does not name every gene and cell of its matrix")
        refuse_inconsistent(group, num_cells, len(genes), path)
        kept = _expression_only(None if types is None else read_values(types, 0, None), len(genes))
        yield RawCells(
            num_cells=num_cells,
            genes=tuple(map(str, genes[kept])),
            counts=lambda start, stop: _select(
                compressed_rows(group, len(genes), start, stop), kept
            ),
            cell_names=partial(read_values, group["barcodes"]),
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
    except (OSError, ValueError, EOFError, IndexError, OverflowError, MemoryError) as error:
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
    yield decoded_whole(
        _select(matrix.tocsr(), kept), list(names[kept]), cells, place=files[0].name
    )


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
            genes=tuple(map(str, read_values(genes, 0, None))),
            counts=partial(dense_rows, matrix, True),
            num_counts=partial(dense_counts, matrix, True),
            cell_names=_row_numbers if cells is None else partial(read_values, cells),
            obs={name: partial(read_values, columns[name]) for name in present},
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
    if (len(names[0]), len(cells)) != (num_genes, num_cells):
        raise ValueError(f"{path} does not name every gene and cell of its matrix")
    yield decoded_whole(matrix, [r_gene_symbol(str(name)) for name in names[0]], cells, place="sm")


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
    yield decoded_whole(
        table.counts, table.genes, table.cells, place="the table", orientation=table.orientation
    )


Opener = Callable[[Path, ReadOptions], AbstractContextManager[RawCells]]

FORMATS: Final[dict[str, Opener]] = {
    "h5ad": open_h5ad,
    "zarr": open_zarr,
    "10x h5": _open_10x_h5,
    "10x mtx": _open_10x_mtx,
    "loom": _open_loom,
    "rdata": _open_rdata,
    "table": _open_table,
}
