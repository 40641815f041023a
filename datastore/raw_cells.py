"""What a format gives of a file: its genes, and its cells by row."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.text_tables import Orientation

Names = NDArray[np.object_]


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


def decoded_whole(
    matrix: sparse.spmatrix, genes: Sequence[str], cells: Sequence[str], **more: Any
) -> RawCells:
    """Make cells of a file that was decoded whole."""
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
