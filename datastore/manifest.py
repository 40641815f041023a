"""From what a person names to a list of sources: globs, folders, and tables that list files.

A table is a `.csv` or `.tsv` with a column `path` (relative to the table's folder), an optional
column `name`, and any others, which become columns of obs. PanglaoDB's own sample table works as
one, too: its rows label the files `SRA…_SRS….sparse.RData` that stand beside it in `sources`.
Files are only read; a path from a table is taken as it is and never becomes part of an output's.
"""

import csv
import glob
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from datastore.config import may_be_column
from datastore.recognition import (
    CELL_FILE_SUFFIX,
    TABLE_SUFFIX,
    is_own_folder,
    is_source_folder,
)
from datastore.text_tables import open_text, table_rows

_MISSING: Final = ("", "NA", "nan", r"\N")
_SUFFIXES: Final = re.compile(
    r"(\.sparse)?\.(h5ad|h5|zarr|loom|rdata|rda|csv|tsv|txt)(\.gz)?$", re.IGNORECASE
)
_PANGLAO_ROW: Final = re.compile(r'^"?SRA\d+"?,"?(SRS\d+|notused)"?,')
_PANGLAO_COLUMNS: Final = {
    "SRA": 0,
    "SRS": 1,
    "tissue": 2,
    "protocol": 3,
    "species": 4,
    "instrument": 5,
    "tumor": 9,
    "primary_adult": 10,
    "cell_line": 11,
}


@dataclass(frozen=True)
class ListedSource:
    """A source as it was named: where it is, and what is known of all its cells."""

    path: Path
    name: str | None = None
    """Name in the store; none takes the file's."""
    labels: tuple[tuple[str, str], ...] = ()
    """Column of obs and value."""

    @property
    def source_name(self) -> str:
        """Name in the store."""
        return self.name or _SUFFIXES.sub("", self.path.name)


def list_sources(patterns: Sequence[str]) -> list[ListedSource]:
    """Expand globs, folders and tables of files, in a fixed order, each file once.

    Raises:
        FileNotFoundError: If a glob gives nothing.
        ValueError: If a table of files cannot be used.
    """
    listed: dict[Path, ListedSource] = {}
    panglao_tables = []
    for path in dict.fromkeys(path for pattern in patterns for path in _expand(pattern)):
        first_row = _first_row(path)
        if first_row is not None and _PANGLAO_ROW.match(first_row):
            panglao_tables.append(path)
        elif first_row is not None and re.search(r'(^|[\t,;])"?path"?([\t,;]|$)', first_row):
            listed.update({source.path: source for source in _read_manifest(path)})
        else:
            listed.setdefault(path, ListedSource(path))
    for table in panglao_tables:
        _label_panglao(table, listed)
    return list(listed.values())


def _expand(pattern: str) -> list[Path]:
    path = Path(pattern).absolute()
    if any(letter in pattern for letter in "*?[") and not path.exists():
        found = [Path(match) for match in sorted(glob.glob(pattern, recursive=True))]  # noqa: PTH207
        if not found:
            raise FileNotFoundError(f"sources: nothing matches {pattern!r}")
    else:
        found = [path]
    return [file for match in found for file in _inside(match)]


def _inside(path: Path) -> list[Path]:
    """The sources in a folder and below; a file or a folder that is a source stands for itself."""
    # A suffix such as .h5ad or .zarr promises a source: what is wrong with it is said on reading.
    if not path.is_dir() or _SUFFIXES.search(path.name) or is_source_folder(path):
        return [path]
    return list(_walk(path, set())) or [path]  # the scan says that there is nothing in it


def _walk(folder: Path, seen: set[Path]) -> Iterator[Path]:
    seen.add(folder.resolve())  # links may lead in circles
    for child in sorted(folder.iterdir()):
        if child.name.startswith("."):
            continue
        if not child.is_dir():
            if CELL_FILE_SUFFIX.search(child.name):
                yield child
        elif is_own_folder(child) or child.resolve() in seen:
            continue
        elif is_source_folder(child):
            yield child
        else:
            found = list(_walk(child, seen))
            # A folder x.h5ad with nothing in it promised a source, too.
            yield from found or ([child] if _SUFFIXES.search(child.name) else [])


def _first_row(path: Path) -> str | None:
    """First line of a table of text; none for other files."""
    if not TABLE_SUFFIX.search(path.name) or not path.is_file():
        return None
    try:
        with open_text(path) as file:
            return file.readline(2**20).rstrip("\r\n")
    except (OSError, EOFError, UnicodeDecodeError):
        return None  # the scan says what is wrong with it


def _read_manifest(table: Path) -> list[ListedSource]:
    header, *rows = [row for row in _rows_of(table) if row]
    names = [name.strip() for name in header]
    for name in names:
        if not may_be_column(name) or names.count(name) > 1:
            raise ValueError(
                f"{table} has a column {name!r}: empty, twice, a name that the store uses, or no "
                "name for a folder; rename it"
            )
    sources: dict[Path, ListedSource] = {}
    for number, row in enumerate(rows, 2):
        if len(row) != len(names):
            raise ValueError(f"{table}, row {number} has {len(row)} fields instead of {len(names)}")
        values = {
            name: value.strip()
            for name, value in zip(names, row, strict=True)
            if value.strip() not in _MISSING
        }
        if "path" not in values:
            raise ValueError(f"{table}, row {number} has no path; name a file, or remove the row")
        path = table.parent / values.pop("path")
        if path in sources:
            raise ValueError(f"{table} lists {path} twice; remove one of the rows")
        sources[path] = ListedSource(path, values.pop("name", None), tuple(values.items()))
    if not sources:
        raise ValueError(f"{table} lists no file; add rows, or leave it out of the sources")
    return list(sources.values())


def _rows_of(table: Path) -> list[list[str]]:
    try:
        with open_text(table) as file:
            return list(table_rows(file))
    except (OSError, EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ValueError(
            f"{table} is cut short, damaged or not text in UTF-8 ({error}); write it anew"
        ) from error


def _label_panglao(table: Path, listed: dict[Path, ListedSource]) -> None:
    """Give the files that PanglaoDB's sample table knows by name their labels."""
    labels: dict[str, tuple[tuple[str, str], ...]] = {}
    for row in _rows_of(table):
        if len(row) <= max(_PANGLAO_COLUMNS.values()):
            raise ValueError(f"{table} has a row of {len(row)} fields instead of 12: {row[:2]}")
        sample = row[0] if row[1] == "notused" else f"{row[0]}_{row[1]}"
        labels[sample] = tuple(
            (name, row[place])
            for name, place in _PANGLAO_COLUMNS.items()
            if row[place] not in _MISSING
        )
    found = [source for source in listed.values() if source.source_name in labels]
    if not found:
        raise ValueError(
            f"{table} is PanglaoDB's sample table, but no file in sources is named like its rows "
            "(SRA553822_SRS2119548.sparse.RData); name the folder of these files, too"
        )
    for source in found:
        listed[source.path] = replace(source, labels=labels[source.source_name])
