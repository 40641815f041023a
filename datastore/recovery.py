"""Counts back from normalised expression, where it can be proved that they are the counts.

A cell that was scaled to a common library size, and perhaps made log(1 + x) of, has values
`f(unit × count)` with one unit for all its genes. For each cell the unit is looked for with which
every value is a whole count, to within the rounding of float32:

1. A value, give or take its rounding, is an interval of scaled expression. If all values have a few
   decimals only, as in many tables, that is their rounding.
2. The smallest value is taken for one count; if that fails for two, three, and so on, as long as
   the genes are enough to tell that from chance.
3. Divided by its count, every gene's interval is one of possible units. The counts are proved if
   all these intervals share a unit, and with it no other count fits a value.

A factor that all counts of a cell have in common leaves no trace and is not recovered. It would not
change a token, since expression is scaled to the cell's library size.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

Floats = NDArray[np.float64]

SCALES: Final[dict[str, tuple[Callable[[Floats], Floats], float]]] = {
    "log(1 + x)": (np.expm1, 1.0),
    "log2(1 + x)": (lambda value: np.expm1(value * np.log(2)), 1.0),
    "log10(1 + x)": (lambda value: np.expm1(value * np.log(10)), 1.0),
    "scaled, without a logarithm": (lambda value: value, 0.0),
}
"""How counts may have been normalised: the way back to x, and what had been added to it."""
MOST: Final = 100
"""The smallest count of a cell may be this at most."""
_ROUNDING: Final = 2.0**-23
"""Of scaling and adding in float32, relative: twice the bound of one operation."""
_ULPS: Final = 3
"""Of the logarithm; NumPy's float32 functions err by less."""
_MOST_DECIMALS: Final = 6
_CHANCE: Final = 1e-4
"""Highest probability that other numbers would have passed for counts."""
_VALUES_AT_ONCE: Final = 2**19
_FIRST_ROWS: Final = 16
"""Tried before the others, so that what is no normalised counts at all is refused quickly."""


class UnprovenCounts(ValueError):
    """The counts of a cell cannot be told from its values."""

    def __init__(self, row: int) -> None:
        super().__init__(f"the counts of row {row} cannot be proved")
        self.row = row


def recover_counts(matrix: sparse.csr_matrix) -> sparse.csr_matrix:
    """Invert scaling and logarithm exactly, or refuse.

    Args:
        matrix: Normalised expression, cells × genes; finite and not negative. All cells went
            through the same logarithm, or none; the library size may be any for each.

    Returns:
        Counts, uint32, of the same shape. Zeros are not stored.

    Raises:
        UnprovenCounts: If the counts of a cell cannot be proved; its row is named.
    """
    matrix = sparse.csr_matrix(matrix, copy=True)
    matrix.eliminate_zeros()
    furthest, rounding = 0, _rounding(matrix.data)
    for inverse, added in SCALES.values():
        counts, unproven = _invert(matrix, rounding, inverse, added)
        if unproven is None:
            return sparse.csr_matrix((counts, matrix.indices, matrix.indptr), shape=matrix.shape)
        furthest = max(furthest, unproven)
    raise UnprovenCounts(furthest)


def _rounding(values: NDArray[Any]) -> float:
    """How far values are from what was computed, if they were rounded to a few decimals; else 0."""
    for decimals in range(1, _MOST_DECIMALS + 1):
        if (np.round(values.astype(np.float64), decimals).astype(values.dtype) == values).all():
            return float(0.5 * 10.0**-decimals)
    return 0.0


def _invert(
    matrix: sparse.csr_matrix,
    rounding: float,
    inverse: Callable[[Floats], Floats],
    added: float,
) -> tuple[NDArray[np.uint32], int | None]:
    """Counts of all stored values, or the first row whose counts are not proved."""
    counts = np.empty(matrix.nnz, np.uint32)
    step = max(1, _VALUES_AT_ONCE * matrix.shape[0] // max(1, matrix.nnz))
    edges = [0, *range(min(_FIRST_ROWS, matrix.shape[0]), matrix.shape[0], step), matrix.shape[0]]
    for first, last in pairwise(edges):
        filled = first + np.flatnonzero(np.diff(matrix.indptr[first : last + 1]))
        if not len(filled):
            continue
        start, stop = matrix.indptr[first], matrix.indptr[last]
        lengths = np.diff(matrix.indptr)[filled]
        found, proven = _counts_of_cells(matrix.data[start:stop], lengths, rounding, inverse, added)
        if not proven.all():
            return counts, int(filled[np.argmin(proven)])
        counts[start:stop] = found
    return counts, None


def _counts_of_cells(
    values: NDArray[Any],
    lengths: NDArray[np.integer[Any]],
    rounding: float,
    inverse: Callable[[Floats], Floats],
    added: float,
) -> tuple[Floats, NDArray[np.bool_]]:
    """Counts of cells with so many values each; and which cells are proved."""
    value = values.astype(np.float64)
    slack = rounding + _ULPS * np.spacing(values.astype(np.float32)).astype(np.float64)
    with np.errstate(over="ignore", invalid="ignore"):
        low, high = inverse(value - slack), inverse(value + slack)
        low = low - _ROUNDING * (low + added)
        high = high + _ROUNDING * (high + added)
    counts, proven = np.zeros(len(value)), np.zeros(len(lengths), np.bool_)
    if not np.isfinite(high).all():
        return counts, proven
    for ones in range(1, MOST + 1):
        open_values = np.repeat(~proven, lengths)
        found, shared = _fit(low[open_values], high[open_values], lengths[~proven], ones)
        counts[open_values] = found
        proven[~proven] = shared
        if proven.all():
            break
    return counts, proven


def _fit(
    low: Floats, high: Floats, lengths: NDArray[np.integer[Any]], ones: int
) -> tuple[Floats, NDArray[np.bool_]]:
    """Counts of cells if each one's smallest value is `ones` counts; and where that is proved."""
    starts = np.cumsum(lengths) - lengths
    middle = (low + high) / 2
    rough = np.rint(middle / np.repeat(np.minimum.reduceat(middle, starts) / ones, lengths))
    # Small counts tell the unit better than the smallest does, and well enough for the large ones.
    small = rough <= 1000
    least, most = _units(np.where(small, low, 0.0), np.where(small, high, np.inf), rough, starts)
    counts = np.maximum(np.rint(middle / np.repeat((least + most) / 2, lengths)), 1.0)
    least, most = _units(low, high, counts, starts)
    no_other = (high < np.repeat(least, lengths) * (counts + 1)) & (
        low > np.repeat(most, lengths) * (counts - 1)
    )
    shared = (least <= most) & np.logical_and.reduceat(no_other, starts)
    # Other numbers may fit by chance: as likely as each value but one is near a count.
    width = np.log(np.minimum((high - low) / np.repeat(least, lengths), 1.0))
    chance = np.add.reduceat(width, starts) - np.minimum.reduceat(width, starts)
    told = chance + np.log(ones) < np.log(_CHANCE)
    if ones == 1:  # nothing can tell in a cell whose values are all the same
        told |= np.maximum.reduceat(low, starts) == np.minimum.reduceat(low, starts)
    return counts, shared & told


def _units(
    low: Floats, high: Floats, counts: Floats, starts: NDArray[np.integer[Any]]
) -> tuple[Floats, Floats]:
    """Least and most unit of each cell that all its values allow; none if least is the larger."""
    return np.maximum.reduceat(low / counts, starts), np.minimum.reduceat(high / counts, starts)
