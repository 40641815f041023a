"""Rows of flat arrays, cut one behind the other or spread over the panel.

A native kernel does either in half of the time NumPy takes, for it fetches the next rows ahead and
writes each byte of a wide batch to memory once (docs/performance_loader.md). Where it cannot be
compiled, and for types that it does not know, NumPy does the same.
"""

import ctypes
import functools
import logging
import subprocess
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.compiling import compile_library

log = logging.getLogger(__name__)

_SOURCE: Final = Path(__file__).parent / "cell_rows.cpp"
_FLAGS: Final = ("-std=c++17", "-O3", "-fPIC", "-shared")


@functools.cache
def missing() -> str | None:
    """What this machine lacks to run the kernel, or None; compiles it at the first call."""
    try:
        _library()
    except (OSError, subprocess.SubprocessError) as problem:
        log.debug("rows are cut by NumPy: %s", problem)
        return str(problem)
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_library("cell_rows", [_SOURCE], _FLAGS)))


def cut(
    values: NDArray[Any], starts: NDArray[np.int64], stops: NDArray[np.int64], out: NDArray[Any]
) -> None:
    """Copy ranges of a flat array, one behind the other.

    Args:
        values: The array, (N,).
        starts: First value of each range, (B,).
        stops: Behind the last value of each range, (B,).
        out: Where to, of the same type and of the ranges' length together.

    Raises:
        ValueError: If a range lies outside the array, or the ranges are longer than `out`.
    """
    length = int(np.sum(stops - starts))
    if length != len(out) or values.dtype != out.dtype:
        raise ValueError(f"{length} values of {values.dtype} do not fit {len(out)} of {out.dtype}")
    if missing() is None:
        width = ctypes.c_int64(values.dtype.itemsize)
        wrong = _call("cut_rows", values, width, *_ranges(starts, stops, values), out)
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
        out: Where to, (B, G); zero where nothing is stored.

    Raises:
        ValueError: If a range lies outside the arrays, or a gene outside the panel.
    """
    name = "_".join(("spread", *(each.dtype.str[1:] for each in (genes, values, out))))
    if len(genes) != len(values) or len(out) != len(starts):
        raise ValueError(f"{len(genes)} genes, {len(values)} values; {len(starts)} of {len(out)}")
    if missing() is None and hasattr(_library(), name) and out.flags.c_contiguous:
        panel = ctypes.c_int64(out.shape[1])
        genes, values = np.ascontiguousarray(genes), np.ascontiguousarray(values)
        wrong = _call(name, genes, values, *_ranges(starts, stops, values), out, panel)
        if wrong == len(starts):
            raise MemoryError(f"there is no memory for {out.shape[1]} genes")
    else:
        wrong = _outside(starts, stops, len(values))
        if wrong < 0:
            wrong = _spread_with_numpy(genes, values, starts, stops, out)
    _refuse_range(wrong, starts, stops, len(values))
    if wrong >= 0:
        highest = genes[starts[wrong] : stops[wrong]].max()
        raise ValueError(f"gene {highest} lies outside the panel of {out.shape[1]} genes")


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
) -> tuple[NDArray[np.int64], NDArray[np.int64], ctypes.c_int64, ctypes.c_int64]:
    edges = [np.ascontiguousarray(edge, np.int64) for edge in (starts, stops)]
    return edges[0], edges[1], ctypes.c_int64(len(starts)), ctypes.c_int64(len(values))


def _call(name: str, *arguments: Any) -> int:
    function = getattr(_library(), name)
    function.restype = ctypes.c_int64
    pointers = (
        ctypes.c_void_p(each.ctypes.data) if isinstance(each, np.ndarray) else each
        for each in arguments
    )
    return int(function(*pointers))


def _outside(starts: NDArray[np.int64], stops: NDArray[np.int64], length: int) -> int:
    wrong = np.flatnonzero((starts < 0) | (stops < starts) | (stops > length))
    return int(wrong[0]) if len(wrong) else -1


def _refuse_range(
    row: int, starts: NDArray[np.int64], stops: NDArray[np.int64], length: int
) -> None:
    if row >= 0 and not 0 <= starts[row] <= stops[row] <= length:
        raise ValueError(f"values {starts[row]} to {stops[row]} lie outside {length} of them")
