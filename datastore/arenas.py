"""Memory that cells are read into, and the cells that are cut from it.

An arena holds two flat arrays, genes and counts, filled stretch by stretch and used for one read
after another. A cell is a range of both.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.buffers import BufferPool

GENES: Final = "X/indices"
COUNTS: Final = "X/data"


@dataclass(frozen=True)
class CellBlock:
    """Cells in CSR form.

    Attributes:
        positions: Position of each cell in the store, (B,).
        indptr: Row starts, int64, (B + 1,), beginning at 0.
        genes: Panel position of each stored count, (nnz,).
        counts: Stored counts, (nnz,).
    """

    positions: NDArray[np.int64]
    indptr: NDArray[np.int64]
    genes: NDArray[Any]
    counts: NDArray[Any]

    def take(self, rows: NDArray[np.int64], pool: BufferPool | None = None) -> "CellBlock":
        """Return some of the rows, in the order given."""
        return cut_rows(self.positions, self.indptr[:-1], self.indptr[1:], self, rows, pool)


@dataclass(frozen=True)
class Stretch:
    """Values [start, stop) of the count arrays of a partition, and where in an arena they go.

    Behind them stand `tail` more: the rest of the chunk that the last one shares with cells that
    the next read is likely to want.
    """

    part: int
    start: int
    stop: int
    place: int
    tail: int = 0


@dataclass(frozen=True)
class ReadPlan:
    """What to read for some cells, and where in the arena they will be.

    Attributes:
        positions: The cells, in the order asked for, (B,).
        starts: First value of each in the arena, (B,).
        stops: Behind the last value of each in the arena, (B,).
        stretches: What to read.
        num_values: Values in the arena, of each of the two arrays, with all tails.
    """

    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    stretches: Sequence[Stretch]
    num_values: int


@dataclass(frozen=True)
class ArenaCells:
    """Cells that stand in an arena until it is filled again."""

    plan: ReadPlan
    genes: NDArray[Any]
    counts: NDArray[Any]

    def take(self, rows: NDArray[np.int64], pool: BufferPool | None = None) -> CellBlock:
        """Copy some of the cells, numbered as in the plan, in the order given."""
        plan = self.plan
        return cut_rows(plan.positions, plan.starts, plan.stops, self, rows, pool)

    def array(self, name: str) -> NDArray[Any]:
        """One of the arena's arrays."""
        return self.genes if name == GENES else self.counts


class Arena:
    """Memory for one read after another; it grows to the largest."""

    def __init__(self) -> None:
        self._room = {GENES: np.empty(0, np.uint8), COUNTS: np.empty(0, np.uint8)}

    def array(self, name: str, length: int, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Give the room for one of the arrays; the former content is void."""
        num_bytes = length * dtype.itemsize
        if num_bytes > len(self._room[name]):
            self._room[name] = np.empty(0, np.uint8)  # let go before taking more
            self._room[name] = np.empty(num_bytes + num_bytes // 8, np.uint8)
        return self._room[name][:num_bytes].view(dtype)


def tails_that_go_on(
    former: ArenaCells | None, stretches: Sequence[Stretch]
) -> list[tuple[int, int]]:
    """Tell where in a former arena the first values of each stretch stand, and how many of them."""
    ended = [] if former is None else [one for one in former.plan.stretches if one.tail]
    tails = {(one.part, one.stop): one for one in ended}
    found = []
    for stretch in stretches:
        one = tails.get((stretch.part, stretch.start))
        if one is None:
            found.append((0, 0))
        else:
            length = min(one.tail, stretch.stop + stretch.tail - stretch.start)
            found.append((one.place + one.stop - one.start, length))
    return found


def cut_rows(
    positions: NDArray[np.int64],
    starts: NDArray[np.int64],
    stops: NDArray[np.int64],
    values: CellBlock | ArenaCells,
    rows: NDArray[np.int64],
    pool: BufferPool | None,
) -> CellBlock:
    """Copy rows of flat arrays, one behind the other, into a block.

    Args:
        positions: Position of each cell in the store, (N,).
        starts: First value of each row, (N,).
        stops: Behind the last value of each row, (N,).
        values: The arrays.
        rows: Which rows, in which order, (B,).
        pool: Where the memory comes from; none takes fresh memory.
    """
    begin, end = starts[rows], stops[rows]
    indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(end - begin, out=indptr[1:])
    if len(rows):  # rows that stand one behind the other are copied as one
        new = np.flatnonzero(begin[1:] != end[:-1]) + 1
        begin = begin[np.concatenate([[0], new])]
        end = end[np.concatenate([new - 1, [-1]])]
    pieces = list(zip(begin.tolist(), end.tolist(), strict=True))
    return CellBlock(
        positions[rows],
        indptr,
        _copied(values.genes, pieces, int(indptr[-1]), pool),
        _copied(values.counts, pieces, int(indptr[-1]), pool),
    )


def _copied(
    values: NDArray[Any], pieces: list[tuple[int, int]], length: int, pool: BufferPool | None
) -> NDArray[Any]:
    out = np.empty(length, values.dtype) if pool is None else pool.take(length, values.dtype)
    if pieces:
        # Slices and concatenate: several times faster than an array of indices.
        np.concatenate([values[start:stop] for start, stop in pieces], out=out)
    return out


def joined(blocks: list[CellBlock]) -> CellBlock:
    """Lay blocks end to end."""
    ends = np.cumsum([0, *(block.indptr[-1] for block in blocks)])
    shifted = [block.indptr[1:] + end for block, end in zip(blocks, ends, strict=False)]
    return CellBlock(
        np.concatenate([block.positions for block in blocks]),
        np.concatenate([np.zeros(1, np.int64), *shifted]),
        np.concatenate([block.genes for block in blocks]),
        np.concatenate([block.counts for block in blocks]),
    )
