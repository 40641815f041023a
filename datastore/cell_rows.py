"""Rows of flat arrays, cut one behind the other or spread over the panel.

The kernels fetch the next rows ahead and write a wide batch to memory once. Where there
are none, and for types that they do not know, NumPy does the same.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore import kernels


def cut(
    values: NDArray[Any], starts: NDArray[np.int64], stops: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Copy ranges of a flat array, one behind the other.

    Args:
        values: The array, (N,).
        starts: First value of each range, (B,).
        stops: Behind the last value of each range, (B,).
        out: Where to, contiguous, of the same type and of the ranges' length together.

    Raises:
        ValueError: If a range lies outside the array, or `out` is of another length or type.
    """
    length = int(np.sum(stops - starts))
    if length != len(out) or values.dtype != out.dtype or not out.flags.writeable:
        raise ValueError(f"{length} values of {values.dtype} do not fit {len(out)} of {out.dtype}")
    if kernels.has("cut_rows") and out.dtype.isnative:
        width, (values,) = values.dtype.itemsize, kernels.fit(values)
        wrong = kernels.call("cut_rows", values, width, *_ranges(starts, stops, values), out)
    else:
        wrong = _outside(starts, stops, len(values))
        if wrong < 0 and len(starts):
            pieces = map(slice, starts.tolist(), stops.tolist())
            np.concatenate([values[piece] for piece in pieces], out=out)
    _refuse_range(wrong, starts, stops, len(values))


def spread(
    genes: NDArray[Any],
    values: NDArray[Any],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    out: NDArray[Any],
) -> None:
    """Spread ranges of flat arrays over the panel.

    Args:
        genes: Panel position of each value, (N,); no gene twice in a range.
        values: The values, (N,).
        starts: First value of each range, (B,).
        stops: Behind the last value of each range, (B,).
        out: Where to, contiguous, (B, G); zero where nothing is stored.

    Raises:
        ValueError: If a range lies outside the arrays, or a gene outside the panel.
    """
    genes, values = kernels.fit(genes, values)
    name = "_".join(("spread", *(each.dtype.str[1:] for each in (genes, values, out))))
    if len(genes) != len(values) or not len(out) == len(starts) == len(stops):
        raise ValueError(f"{len(genes)} genes, {len(values)} values; {len(starts)} of {len(out)}")
    if kernels.has(name) and out.flags.writeable:
        ranges = _ranges(starts, stops, values)
        wrong = kernels.call(name, genes, values, *ranges, out, out.shape[1])
        if wrong == len(starts):
            raise MemoryError(f"there is no memory for {out.shape[1]} genes")
    else:
        wrong = _outside(starts, stops, len(values))
        if wrong < 0:
            wrong = _spread_with_numpy(genes, values, starts, stops, out)
    _refuse_range(wrong, starts, stops, len(values))
    if wrong >= 0:
        of_row = genes[starts[wrong] : stops[wrong]]
        outside = of_row[(of_row < 0) | (of_row >= out.shape[1])][0]
        raise ValueError(f"gene {outside} lies outside the panel of {out.shape[1]} genes")


def _spread_with_numpy(
    genes: NDArray[Any],
    values: NDArray[Any],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    out: NDArray[Any],
) -> int:
    for row, start, stop in zip(range(len(out)), starts.tolist(), stops.tolist(), strict=True):
        out[row] = 0  # row by row, while it stands in a core's cache
        at = genes[start:stop]
        if len(at) and not (at.min() >= 0 and at.max() < out.shape[1]):
            return row
        out[row][at.astype(np.intp)] = values[start:stop]
    return -1


def _ranges(
    starts: NDArray[np.int64], stops: NDArray[np.int64], values: NDArray[Any]
) -> tuple[NDArray[np.int64], NDArray[np.int64], int, int]:
    edges = [np.ascontiguousarray(edge, np.int64) for edge in (starts, stops)]
    return edges[0], edges[1], len(starts), len(values)


def _outside(starts: NDArray[np.int64], stops: NDArray[np.int64], length: int) -> int:
    wrong = np.flatnonzero((starts < 0) | (stops < starts) | (stops > length))
    return int(wrong[0]) if len(wrong) else -1


def _refuse_range(
    row: int, starts: NDArray[np.int64], stops: NDArray[np.int64], length: int
) -> None:
    if row >= 0 and not 0 <= starts[row] <= stops[row] <= length:
        raise ValueError(f"values {starts[row]} to {stops[row]} lie outside {length} of them")
