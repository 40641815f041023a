"""Raw files of every format, written by hand from dense counts; none by our own code."""

import gzip
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import anndata
import h5py
import numpy as np
import pandas as pd
import zarr
from numpy.typing import NDArray
from scipy import io, sparse

from tests.support.cells import RawCells

UTF8 = h5py.string_dtype()


def cell_names(raw: RawCells) -> list[str]:
    return [f"c{row}" for row in range(len(raw.counts))]


def adata_of(raw: RawCells, matrix: Any = None) -> anndata.AnnData:
    return anndata.AnnData(
        sparse.csr_matrix(raw.counts.astype(np.float32)) if matrix is None else matrix,
        obs=pd.DataFrame(index=cell_names(raw)),
        var=pd.DataFrame(index=list(raw.genes)),
    )


def write_zarr(path: Path, adata: anndata.AnnData, version: Literal[2, 3] = 3) -> Path:
    group = zarr.open_group(path, mode="w", zarr_format=version)
    unsharded: dict[str, Any] = {} if version == 2 else {"shards": None}
    anndata.io.write_elem(group, "/", adata, dataset_kwargs=unsharded)
    return path


def write_10x_h5(path: Path, raw: RawCells, version: int, antibodies: int = 0) -> Path:
    """Cell Ranger's file: genes × cells by column. Antibodies come before the genes."""
    extra = np.full((len(raw.counts), antibodies), 7, raw.counts.dtype)
    matrix = sparse.csc_matrix(np.concatenate([extra, raw.counts], axis=1).T)
    names = [f"CD{place}_TotalSeq" for place in range(antibodies)] + list(raw.genes)
    kinds = ["Antibody Capture"] * antibodies + ["Gene Expression"] * len(raw.genes)
    ids = [f"ID{place}" for place in range(len(names))]
    with h5py.File(path, "w") as file:
        group = file.create_group("matrix" if version == 3 else "GRCh38")
        group["data"], group["indices"] = matrix.data.astype(np.int32), matrix.indices
        group["indptr"], group["shape"] = matrix.indptr.astype(np.int64), matrix.shape
        group["barcodes"] = np.array(cell_names(raw), "S18")
        if version == 3:
            features = group.create_group("features")
            features["id"], features["name"] = np.array(ids, "S"), np.array(names, "S")
            features["feature_type"] = np.array(kinds, "S")
        else:
            group["genes"], group["gene_names"] = np.array(ids, "S"), np.array(names, "S")
    return path


def write_10x_mtx(path: Path, raw: RawCells, version: int, antibodies: int = 0) -> Path:
    """Cell Ranger's folder; from version 3 on it is gzipped and says what each feature is."""
    path.mkdir(parents=True)
    extra = np.full((len(raw.counts), antibodies), 7, raw.counts.dtype)
    matrix = sparse.coo_matrix(np.concatenate([extra, raw.counts], axis=1).T)
    names = [f"CD{place}" for place in range(antibodies)] + list(raw.genes)
    kinds = ["Antibody Capture"] * antibodies + ["Gene Expression"] * len(raw.genes)
    more = [f"\t{kind}" if version == 3 else "" for kind in kinds]
    lines = [f"ID{n}\t{names[n]}{more[n]}" for n in range(len(names))]
    io.mmwrite(path / "matrix.mtx", matrix, field="integer")
    genes = path / ("features.tsv" if version == 3 else "genes.tsv")
    genes.write_text("".join(f"{line}\n" for line in lines))
    (path / "barcodes.tsv").write_text("".join(f"{name}\n" for name in cell_names(raw)))
    if version == 3:
        for file in list(path.iterdir()):
            Path(f"{file}.gz").write_bytes(gzip.compress(file.read_bytes()))
            file.unlink()
    return path


def write_loom(path: Path, raw: RawCells) -> Path:
    with h5py.File(path, "w") as file:
        file.create_dataset(
            "matrix", data=raw.counts.T.astype(np.float32), chunks=(4, 4), compression="gzip"
        )
        file.create_group("layers")["spliced"] = raw.counts.T + 1
        file.create_group("row_attrs").create_dataset("Gene", data=list(raw.genes), dtype=UTF8)
        columns = file.create_group("col_attrs")
        columns.create_dataset("CellID", data=cell_names(raw), dtype=UTF8)
        columns["Cluster"] = np.arange(len(raw.counts)) % 2
    return path


def write_table(path: Path, raw: RawCells, genes_in_rows: bool, corner: str | None = "") -> Path:
    """Comma or tab by the suffix; without a corner the header is a field short, as in R."""
    rows: Sequence[str] = cell_names(raw)
    columns: Sequence[str] = raw.genes
    counts = raw.counts
    if genes_in_rows:
        rows, columns, counts = columns, rows, counts.T
    between = "\t" if ".tsv" in path.name else ","
    header = between.join([*([] if corner is None else [corner]), *columns])
    lines = [header] + [
        between.join([f'"{name}"', *map(str, values)])
        for name, values in zip(rows, counts, strict=True)
    ]
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


# --- R's serialisation, version 2, XDR: https://cran.r-project.org/doc/manuals/r-release/R-ints.html

NIL = struct.pack(">i", 254)


def r_string(text: str) -> bytes:
    return struct.pack(">ii", 9 | 64 << 12, len(text)) + text.encode()


def r_strings(texts: Sequence[str]) -> bytes:
    return struct.pack(">ii", 16, len(texts)) + b"".join(map(r_string, texts))


def r_integers(values: NDArray[Any]) -> bytes:
    return struct.pack(">ii", 13, len(values)) + values.astype(">i4").tobytes()


def r_doubles(values: NDArray[Any]) -> bytes:
    return struct.pack(">ii", 14, len(values)) + values.astype(">f8").tobytes()


def r_pairs(values: dict[str, bytes]) -> bytes:
    """A pairlist; each symbol is new, so no symbol may occur twice in a file."""
    pair = struct.pack(">i", 2 | 1 << 10)  # with a tag
    symbol = struct.pack(">i", 1)
    return b"".join(pair + symbol + r_string(n) + value for n, value in values.items()) + NIL


def r_matrix(matrix: sparse.csc_matrix, rows: Sequence[str], columns: Sequence[str]) -> bytes:
    """A dgCMatrix: an S4 object, whose slots are attributes."""
    package = r_pairs({"package": r_strings(["Matrix"])})
    kind = struct.pack(">ii", 16 | 1 << 9, 1) + r_string("dgCMatrix") + package
    return struct.pack(">i", 25 | 1 << 8 | 1 << 9 | 16 << 12) + r_pairs(
        {
            "i": r_integers(matrix.indices),
            "p": r_integers(matrix.indptr),
            "Dim": r_integers(np.array(matrix.shape)),
            "Dimnames": struct.pack(">ii", 19, 2) + r_strings(rows) + r_strings(columns),
            "x": r_doubles(matrix.data),
            "factors": struct.pack(">ii", 19, 0),
            "class": kind,
        }
    )


def write_r_objects(
    path: Path, objects: dict[str, bytes], compress: Callable[[bytes], bytes] = gzip.compress
) -> Path:
    head = b"RDX2\nX\n" + struct.pack(">iii", 2, 0x030602, 0x020300)
    path.write_bytes(compress(head + r_pairs(objects)))
    return path


def write_rdata(
    path: Path, raw: RawCells, compress: Callable[[bytes], bytes] = gzip.compress
) -> Path:
    """As PanglaoDB has it: genes × cells, rows SYMBOL_ENSG….version, another object beside."""
    rows = [f"{gene}_ENSG{place:011d}.{place}" for place, gene in enumerate(raw.genes)]
    matrix = r_matrix(sparse.csc_matrix(raw.counts.T), rows, cell_names(raw))
    return write_r_objects(path, {"note": r_strings(["hi"]), "sm": matrix}, compress)
