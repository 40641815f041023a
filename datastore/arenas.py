"""Memory that cells are read into, and the cells that are cut from it.

An arena holds two flat arrays, genes and counts, filled stretch by stretch and used for one read
after another. A cell is a range of both; where they are of one type they are rows of one array, so
that a cell is cut from both at once.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from datastore.buffers import BufferPool
from datastore.cell_rows import cut

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
        arrays = [self.genes, self.counts]
        return cut_rows(self.positions, self.indptr[:-1], self.indptr[1:], arrays, rows, pool)


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
        num_bytes: Bytes of both.
    """

    positions: NDArray[np.int64]
    starts: NDArray[np.int64]
    stops: NDArray[np.int64]
    stretches: Sequence[Stretch]
    num_values: int
    num_bytes: int


@dataclass(frozen=True)
class ArenaCells:
    """Cells that stand in an arena until it is filled again.

    Attributes:
        plan: What was read.
        arrays: Genes and counts, each flat; or one array of both, (2, values).
    """

    plan: ReadPlan
    arrays: Sequence[NDArray[Any]]

    @property
    def genes(self) -> NDArray[Any]:
        """Panel position of each value."""
        return _rows_of(self.arrays)[0]

    @property
    def counts(self) -> NDArray[Any]:
        """The values."""
        return _rows_of(self.arrays)[1]

    def take(self, rows: NDArray[np.int64], pool: BufferPool | None = None) -> CellBlock:
        """Copy some of the cells, numbered as in the plan, in the order given."""
        plan = self.plan
        return cut_rows(plan.positions, plan.starts, plan.stops, self.arrays, rows, pool)


class Arena:
    """Memory for one read after another; it grows to the largest."""

    def __init__(self) -> None:
        self._room = np.empty(0, np.uint8)

    def arrays(
        self, length: int, genes: np.dtype[Any], counts: np.dtype[Any]
    ) -> list[NDArray[Any]]:
        """Give room for so many values, as `ArenaCells` has them; the former content is void."""
        num_bytes = length * (genes.itemsize + counts.itemsize)
        if num_bytes > len(self._room):
            self._room = np.empty(0, np.uint8)  # let go before taking more
            self._room = np.empty(num_bytes + num_bytes // 8, np.uint8)
        if genes == counts:
            return [self._room[:num_bytes].view(genes).reshape(2, length)]
        kinds = sorted((genes, counts), key=lambda kind: -kind.itemsize)  # the wider is aligned
        split = length * kinds[0].itemsize
        first, second = self._room[:split], self._room[split:num_bytes]
        of_kind = {kinds[0]: first.view(kinds[0]), kinds[1]: second.view(kinds[1])}
        return [of_kind[genes], of_kind[counts]]


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
    arrays: Sequence[NDArray[Any]],
    rows: NDArray[np.int64],
    pool: BufferPool | None,
) -> CellBlock:
    """Copy rows of flat arrays, one behind the other, into a block.

    Args:
        positions: Position of each cell in the store, (N,).
        starts: First value of each row, (N,).
        stops: Behind the last value of each row, (N,).
        arrays: Genes and counts, each flat; or one array of both, (2, values).
        rows: Which rows, in which order, (B,).
        pool: Where the memory comes from; none takes fresh memory.
    """
    begin, end = starts[rows], stops[rows]
    indptr = np.zeros(len(rows) + 1, np.int64)
    np.cumsum(end - begin, out=indptr[1:])
    copied = [_copied(array, begin, end, int(indptr[-1]), pool) for array in arrays]
    return CellBlock(positions[rows], indptr, *_rows_of(copied))


def _copied(
    values: NDArray[Any],
    begin: NDArray[np.int64],
    end: NDArray[np.int64],
    length: int,
    pool: BufferPool | None,
) -> NDArray[Any]:
    shape = (*values.shape[:-1], length)
    out = np.empty(shape, values.dtype) if pool is None else pool.take(shape, values.dtype)
    for flat, target in zip(np.atleast_2d(values), np.atleast_2d(out), strict=True):
        cut(flat, begin, end, target)
    return out


def _rows_of(arrays: Sequence[NDArray[Any]]) -> Sequence[NDArray[Any]]:
    """Genes and counts of arrays that hold them each or both."""
    return arrays if len(arrays) == 2 else [*arrays[0]]


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
