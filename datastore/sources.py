"""Raw files with counts: what a source is, and its cells as checked counts.

A source is opened cheaply where its format allows it (size and gene names only); its cells are
read in slices of bounded size. Whatever is wrong with a file is said here, by name and with the
remedy, before anything is written.
"""

import hashlib
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.decoded import KEPT_FORMATS, is_kept, keep_decoded, open_decoded
from datastore.formats import FORMATS
from datastore.manifest import ListedSource
from datastore.raw_cells import Names, RawCells, ReadOptions
from datastore.recognition import recognise
from datastore.recovery import UnprovenCounts, recover_counts

LARGEST_COUNT: Final = 2**32 - 1
_DAMAGE: Final = (
    *(OSError, ValueError, LookupError, TypeError, AttributeError, RuntimeError),
    *(ArithmeticError, EOFError, MemoryError, zlib.error),
)
"""What the libraries that read files raise on damaged ones: decompressors a `RuntimeError`, what
takes a damaged size at its word a `MemoryError`."""


@dataclass(frozen=True, kw_only=True)
class Source:
    """One raw file or folder: what a plan of work needs to know of it."""

    path: str
    name: str
    """The first part of each cell's name in the store: file name without suffix, or as listed."""
    format: str
    """Key of `FORMATS`."""
    options: ReadOptions
    """With what was found out: orientation of a table, obs columns that are there."""
    sha256: str
    num_cells: int
    genes: tuple[str, ...]
    num_counts: int = 0
    """How many counts are stored, about; the space that an ingest needs is estimated from it."""
    whole: bool = False
    """Whether opening it decodes it whole, so that all its slices are best read at once."""
    labels: tuple[tuple[str, str], ...] = ()
    """Column of obs and its value in all cells of the source."""
    decoded: str | None = None
    """Folder where its cells are kept decoded for a while (`datastore.decoded`)."""


@dataclass(frozen=True)
class BrokenSource:
    """A source that cannot be used, and the sentence that says why."""

    path: str
    reason: str


class BrokenSources(ValueError):
    """Some sources cannot be used. It has them in a list, so that ingest can go on without them."""

    def __init__(self, sources: Sequence[BrokenSource]) -> None:
        self.sources = sources
        reasons = [source.reason for source in sources]
        if len(reasons) == 1:
            super().__init__(reasons[0])
        else:
            listed = "".join(f"\n({place}) {text}" for place, text in enumerate(reasons, 1))
            super().__init__(f"{len(reasons)} sources cannot be used: {listed}\n")


def scan_source(path: Path, layer: str | None) -> Source:
    """Read a file's size, gene names and digest, and refuse what is not a file of counts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is none of the formats we read, has no cells, or lacks the layer.
    """
    return scan_listed(ListedSource(path), ReadOptions(layer=layer))


def scan_listed(listed: ListedSource, options: ReadOptions, decoded: Path | None = None) -> Source:
    """Scan a source that was listed with a name or labels; as `scan_source`.

    What had to be decoded whole for that is kept below `decoded`, if given.
    """
    path = listed.path
    try:
        listed.source_name.encode()
    except UnicodeEncodeError as error:  # every cell of it would be named so
        raise ValueError(f"{path} has a name that is not UTF-8; rename it") from error
    kind = recognise(path)
    with damage_named(path), FORMATS[kind](path, options) as cells:
        if not cells.num_cells:
            raise ValueError(f"{path} holds no cells; leave it out of the sources")
        if not cells.genes:
            raise ValueError(f"{path} holds no genes; leave it out of the sources")
        options = replace(
            options,
            orientation=cells.orientation,
            obs_columns=tuple(cells.obs),
            known_genes=frozenset(),
        )
        digest = _digest(path)
        kept = None
        if decoded is not None and kind in KEPT_FORMATS:
            folder = decoded / hashlib.sha256(f"{digest} {path}".encode()).hexdigest()
            kept = str(folder) if keep_decoded(folder, cells) else None
        return Source(
            path=str(path),
            name=listed.source_name,
            format=kind,
            options=options,
            sha256=digest,
            num_cells=cells.num_cells,
            genes=cells.genes,
            num_counts=cells.num_counts(),
            whole=cells.whole,
            labels=listed.labels,
            decoded=kept,
        )


@dataclass(frozen=True)
class OpenSource:
    """An open source, read slice by slice.

    Attributes:
        source: What it is.
        cells: How its format reads it.
        recovered: First row of each read whose counts were computed back.
    """

    source: Source
    cells: RawCells
    recovered: set[int] = field(default_factory=set)

    def counts(self, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows [start, stop) as checked counts.

        Returns:
            CSR of shape (stop - start, genes of the source), in the file's own number type.

        Raises:
            ValueError: If the file is damaged, or a count is negative, not finite, or not whole
                (and may not, or cannot, be computed back from normalised expression).
        """
        path = self.source.path
        with damage_named(Path(path)):
            matrix = sparse.csr_matrix(self.cells.counts(start, stop))
            matrix.check_format(full_check=True)
        where = f"{path}, {self.cells.place}"
        if self.source.options.recover_counts and looks_normalised(matrix):
            matrix = self._recovered(matrix, where, start)
            self.recovered.add(start)
        check_counts(matrix, where, first_row=start)
        return matrix

    def _recovered(self, matrix: sparse.csr_matrix, where: str, start: int) -> sparse.csr_matrix:
        try:
            return recover_counts(matrix)
        except UnprovenCounts as refusal:
            row = start + refusal.row
            name = self.cell_names(row, row + 1)[0]
            raise ValueError(
                f"{where}: the counts of cell {name} (row {row}) cannot be recovered: no unit "
                "makes all its values whole counts, with log1p, log2, log10 or no logarithm; "
                "give the raw counts"
            ) from refusal

    def cell_names(self, start: int, stop: int) -> Names:
        """Read the names of rows [start, stop), as `source name/cell name`."""
        with damage_named(Path(self.source.path)):
            names = self.cells.cell_names(start, stop)
        return np.array([f"{self.source.name}/{name}" for name in names], object)

    def obs(self, start: int, stop: int) -> dict[str, Names]:
        """Read the obs columns of rows [start, stop) as text, None where a value is missing."""
        with damage_named(Path(self.source.path)):
            columns = {name: read(start, stop) for name, read in self.cells.obs.items()}
        return {
            name: np.array([None if value is None else str(value) for value in values], object)
            for name, values in columns.items()
        }


@contextmanager
def open_source(source: Source) -> Iterator[OpenSource]:
    """Open a scanned source for reading.

    Raises:
        ValueError: If it has become unreadable since.
    """
    opened: AbstractContextManager[RawCells]
    if source.decoded is not None and is_kept(source.decoded):
        opened = open_decoded(Path(source.decoded))
    else:
        opened = FORMATS[source.format](Path(source.path), source.options)
    with ExitStack() as stack:
        with damage_named(Path(source.path)):  # what is done with the cells is no part of it
            cells = stack.enter_context(opened)
        yield OpenSource(source, cells)


@contextmanager
def damage_named(path: Path) -> Iterator[None]:
    """Turn what libraries raise on damaged files into a sentence with the file's name."""
    try:
        yield
    except PermissionError as error:
        raise ValueError(f"{error.filename or path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} has a name that is not UTF-8 ({error.object[:40]!r}); write it anew in UTF-8"
        ) from error
    except _DAMAGE as error:
        if isinstance(error, ValueError) and str(path) in str(error):
            raise  # it is said already
        raise ValueError(f"{path} is damaged or cut short ({error}); fetch it again") from error


def check_counts(matrix: sparse.csr_matrix, where: str, first_row: int = 0) -> None:
    """Refuse a matrix that does not hold raw counts, with the remedy.

    Args:
        matrix: Cells by genes, CSR.
        where: File and place, for the message.
        first_row: Row of the file that the matrix begins with, for the message.
    """
    data = matrix.data
    if data.dtype.kind not in "iuf":
        raise ValueError(f"{where} holds {data.dtype} values; raw counts are needed")
    if _are_counts(data):
        return
    problem = ""
    for kind, bad in (
        ("a value that is not finite", ~np.isfinite(data)),
        ("a negative value", data < 0),
        ("a value that is not whole", data != np.rint(data)),
        (f"a value above {LARGEST_COUNT}", data > LARGEST_COUNT),
    ):
        if bad.any():
            at = int(np.argmax(bad))
            row = first_row + int(np.searchsorted(matrix.indptr, at, side="right")) - 1
            problem = f"{kind} ({data[at]:.6g}, row {row}, column {int(matrix.indices[at])})"
            break
    advice = "give the raw counts"
    if "whole" in problem and looks_normalised(matrix) and data.max() < 20:
        advice = (
            "this looks like log-normalised expression: give the raw counts, often found in "
            "layers['counts'] (--layer counts) or in raw (--layer raw), or try to compute them "
            "back (--recover_counts true)"
        )
    elif "negative" in problem:
        advice = "this looks like scaled expression: give the raw counts"
    raise ValueError(f"{where} holds {problem}; {advice}")


def _are_counts(data: NDArray[Any]) -> bool:
    """Tell whether all values are whole and in range, a cache's worth of them at a time."""
    whole = np.issubdtype(data.dtype, np.integer)
    with np.errstate(invalid="ignore"):  # what is not a number fails each comparison
        return all(
            float(part.min()) >= 0
            and float(part.max()) <= LARGEST_COUNT
            and (whole or bool((np.rint(part) == part).all()))
            for part in (data[start : start + 2**16] for start in range(0, len(data), 2**16))
        )


def looks_normalised(matrix: sparse.csr_matrix) -> bool:
    """Tell whether values are not whole, but else may be expression that was counted."""
    data = matrix.data
    if not np.issubdtype(data.dtype, np.floating) or not np.isfinite(data).all():
        return False
    return bool((data >= 0).all() and (data != np.rint(data)).any())


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and digests of all files in a folder."""
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        lines = [f"{file.relative_to(path).as_posix()} {_digest(file)}\n" for file in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
