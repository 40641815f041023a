"""Tables of counts as text: `.csv` or `.tsv`, plain or gzipped, genes × cells or cells × genes."""

import csv
import gzip
import io
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TextIO, cast

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Orientation = Literal["auto", "genes_x_cells", "cells_x_genes"]

# Genes that nearly every data set has, and ids; they tell genes from cells when no panel does.
_GENE: Final = re.compile(
    r"^(ENS[A-Z]*G\d{6,}(\.\d+)?|RP[LS]P?\d+[AXLY]?\d*|MT-[A-Z0-9]+|ACTB|B2M|GAPDH|MALAT1|EEF1A1"
    r"|FTL1?|FTH1|TPT1|TMSB4X|TMSB10|VIM)$",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table of counts, cells × genes whatever it was in the file."""

    counts: sparse.csr_matrix
    genes: list[str]
    cells: list[str]
    orientation: Orientation


def read_table(path: Path, orientation: Orientation, known_genes: frozenset[str]) -> Table:
    """Decode a table of counts.

    Args:
        path: File whose first line names the columns and whose first column names the rows.
        orientation: What the rows are; `auto` looks for gene names in both.
        known_genes: Names that are genes, such as the panel's; may be empty.

    Raises:
        ValueError: If it is not such a table, or both or neither of its sides look like genes.
    """
    lines = _lines(path)
    columns = next(lines, (0, []))[1]
    rows: list[str] = []
    indices: list[NDArray[np.intp]] = []
    data: list[NDArray[np.float64]] = []
    for number, fields in lines:
        if not rows and columns and (len(columns) == len(fields) or not columns[0]):
            columns = columns[1:]  # the corner has a name, or an empty one
        if len(fields) != len(columns) + 1:
            raise ValueError(
                f"{path}, line {number} has {len(fields)} fields instead of {len(columns) + 1}: it "
                "is cut short or no table; fetch it again"
            )
        values = _numbers(fields[1:], columns, f"{path}, line {number}")
        rows.append(fields[0])
        indices.append(np.flatnonzero(values))
        data.append(values[indices[-1]])
    if not rows or not columns:
        raise ValueError(f"{path} has no rows or columns of counts; leave it out of the sources")
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in indices])])
    matrix = sparse.csr_matrix(
        (np.concatenate(data), np.concatenate(indices), indptr), shape=(len(rows), len(columns))
    )
    if orientation == "auto":
        orientation = _orientation(rows, columns, known_genes, path)
    if orientation == "genes_x_cells":
        return Table(counts=matrix.T.tocsr(), genes=rows, cells=columns, orientation=orientation)
    return Table(counts=matrix, genes=columns, cells=rows, orientation=orientation)


def open_text(path: Path) -> TextIO:
    """Open a text file, gzipped or not."""
    with path.open("rb") as file:
        zipped = file.read(2) == b"\x1f\x8b"
    if zipped:
        return cast(TextIO, gzip.open(path, "rt", encoding="utf-8-sig", newline=""))
    return path.open(encoding="utf-8-sig", newline="")


def table_rows(file: TextIO) -> Iterator[list[str]]:
    """Split lines into fields at whichever of tab, comma and semicolon the first has most of."""
    first = file.readline()
    separator = max("\t,;", key=first.count)
    yield from csv.reader(io.StringIO(first), delimiter=separator)
    yield from csv.reader(file, delimiter=separator)


def _lines(path: Path) -> Iterator[tuple[int, list[str]]]:
    try:
        with open_text(path) as file:
            for number, fields in enumerate(table_rows(file), 1):
                if fields:
                    yield number, fields
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{path} is cut short, damaged or no text ({error}); fetch it again"
        ) from error


def _numbers(fields: Sequence[str], columns: Sequence[str], where: str) -> NDArray[np.float64]:
    try:
        return np.array(fields, np.float64)
    except ValueError:
        for name, value in zip(columns, fields, strict=True):
            try:
                float(value)
            except ValueError:
                raise ValueError(
                    f"{where}, column {name!r} holds {value!r} instead of a count; keep only names "
                    "and counts in the table"
                ) from None
        raise


def _orientation(
    rows: Sequence[str], columns: Sequence[str], known_genes: frozenset[str], path: Path
) -> Orientation:
    def genes(names: Sequence[str]) -> int:
        return sum(name in known_genes or _GENE.match(name) is not None for name in names)

    in_rows, in_columns = genes(rows), genes(columns)
    if in_rows and not in_columns:
        return "genes_x_cells"
    if in_columns and not in_rows:
        return "cells_x_genes"
    looks = "neither" if in_rows == in_columns == 0 else "both"
    raise ValueError(
        f"{path}: {looks} of rows ({rows[0]!r}, ...) and columns ({columns[0]!r}, ...) look like "
        "genes; say which it is with --orientation genes_x_cells or cells_x_genes"
    )
