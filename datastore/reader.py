"""Cells by position, through TensorStore.

1. A plan says which stretches of which arrays hold the cells; for that their row starts are read.
2. TensorStore decodes the stretches in its own threads, checks the crc32c of every chunk, and
   writes into an arena, memory that is used for one read after another.
3. Rows are cut from the arena, in any order.

`CellReader.read` does all three; a loader does them one ahead of the other.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from datastore.buffers import BufferPool
from datastore.storage import is_on_local_disk
from datastore.store import CellStore

GENES: Final = "X/indices"
COUNTS: Final = "X/data"
_ROW_STARTS: Final = "X/indptr"
_BRIDGE: Final = 64
"""Unwanted cells that are read along to make one stretch of two: they share a chunk anyway."""
_CELLS_AT_ONCE: Final = 4096
_SPAN_LIMIT: Final = 8
"""Cells that may be read along for each wanted one, before stretches are kept apart …"""
_SPAN_FLOOR: Final = 16_384
"""… unless there are no more of them than this in all."""


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
    """Values [start, stop) of the count arrays of a partition, and where in an arena they go."""

    part: int
    start: int
    stop: int
    place: int


@dataclass(frozen=True)
class ReadPlan:
    """What to read for some cells, and where in the arena they will be.

    Attributes:
        positions: The cells, in the order asked for, (B,).
        starts: First value of each in the arena, (B,).
        stops: Behind the last value of each in the arena, (B,).
        stretches: What to read.
        num_values: Values in the arena, of each of the two arrays.
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


class PendingCells:
    """A read under way."""

    def __init__(
        self, store: CellStore, cells: ArenaCells, futures: list[tuple[Any, int, str]]
    ) -> None:
        self._store, self._cells, self._futures = store, cells, futures

    def result(self) -> ArenaCells:
        """Wait until the cells are there.

        Raises:
            StoreFormatError: If a chunk is damaged or missing.
            OSError: If a remote store cannot be reached.
        """
        for future, part, name in self._futures:
            _wait(self._store, future, part, name)
        return self._cells


class CellReader:
    """Reads cells of a store by position.

    Args:
        store: The store.
        memory_map: Let a file's pages be decoded where the kernel has them. It spares a copy, and
            ends the process where an ordinary read would report that a file has become shorter or
            out of reach; none does it on local disks only.
    """

    def __init__(self, store: CellStore, memory_map: bool | None = None) -> None:
        self._store = store
        if memory_map is None:
            memory_map = is_on_local_disk(store.storage)
        # Chunks are decoded once per pass over the store, so a cache would only cost memory.
        context: dict[str, Any] = {"cache_pool": {"total_bytes_limit": 0}}
        if memory_map:
            context["file_io_mode"] = {"mode": "memmap"}
        self._context = ts.Context(context)
        self._array = lru_cache(maxsize=4096)(self._open_array)

    def read(self, positions: NDArray[np.int64]) -> CellBlock:
        """Read cells.

        Args:
            positions: Store positions, (B,), each in [0, N), in any order.

        Returns:
            The cells, in the order asked for.

        Raises:
            IndexError: If a position lies outside the store.
            StoreFormatError: If a chunk is damaged or missing.
            OSError: If a remote store cannot be reached.
        """
        wanted, inverse = np.unique(positions, return_inverse=True)
        arena = Arena()
        blocks = []
        for start in range(0, max(1, len(wanted)), _CELLS_AT_ONCE):
            plan = self.plan(wanted[start : start + _CELLS_AT_ONCE])
            blocks.append(self.start(plan, arena).result().take(np.arange(len(plan.positions))))
        whole = blocks[0] if len(blocks) == 1 else _joined(blocks)
        if np.array_equal(wanted, positions):
            return whole
        return whole.take(inverse.astype(np.int64))

    def plan(self, positions: NDArray[np.int64]) -> ReadPlan:
        """Find out what to read; reads the row starts.

        Args:
            positions: Store positions, (B,), each in [0, N), in any order.

        Raises:
            IndexError: If a position lies outside the store.
            StoreFormatError: If a chunk of the row starts is damaged or missing.
            OSError: If a remote store cannot be reached.
        """
        num_cells = self._store.num_cells
        if len(positions) and not (positions.min() >= 0 and positions.max() < num_cells):
            raise IndexError(f"positions must lie in [0, {num_cells})")
        order = np.argsort(positions)
        wanted = positions[order]
        runs, run_of = self._runs(wanted)
        pointers = self._row_starts(runs)
        lengths = np.array([p[-1] - p[0] for p in pointers], np.int64)
        places = np.cumsum(lengths) - lengths
        # Where each wanted cell's pointer stands when those of all runs are put one after another.
        first = np.cumsum([0, *(len(p) for p in pointers)])[:-1]
        row = wanted - self._store.partition_starts[runs[run_of, 0]] - runs[run_of, 1]
        flat = np.concatenate([*pointers, np.empty(0, np.int64)])
        shift = (places - flat[first] if len(runs) else places)[run_of]
        at = first[run_of] + row
        stretches = [
            Stretch(int(part), int(p[0]), int(p[-1]), int(place))
            for (part, _, _), p, place in zip(runs, pointers, places, strict=True)
            if p[-1] > p[0]
        ]
        begin, end = np.empty_like(at), np.empty_like(at)
        begin[order], end[order] = flat[at] + shift, flat[at + 1] + shift
        return ReadPlan(positions, begin, end, stretches, int(lengths.sum()))

    def start(self, plan: ReadPlan, arena: Arena) -> PendingCells:
        """Begin to fill an arena; what stood in it is lost."""
        futures: list[tuple[Any, int, str]] = []
        rooms = {}
        with ts.Batch() as batch:
            for name in (GENES, COUNTS):
                arrays = [self._array(stretch.part, name) for stretch in plan.stretches]
                types = {array.dtype.numpy_dtype for array in arrays}
                dtype = np.result_type(*types) if types else np.dtype(np.uint16)
                rooms[name] = arena.array(name, plan.num_values, dtype)
                room = ts.array(rooms[name], copy=False, context=self._context)
                for stretch, array in zip(plan.stretches, arrays, strict=True):
                    part, start, stop = stretch.part, stretch.start, stretch.stop
                    target = room[stretch.place : stretch.place + stop - start]
                    futures.append((target.write(array[start:stop], batch=batch), part, name))
        return PendingCells(self._store, ArenaCells(plan, rooms[GENES], rooms[COUNTS]), futures)

    def _runs(self, wanted: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Cut sorted positions, which may repeat, into runs of near neighbours in a partition.

        Returns:
            Partition, first row and last row + 1 of each run, (R, 3); run of each position, (B,).
        """
        starts = self._store.partition_starts
        parts = np.searchsorted(starts, wanted, side="right") - 1
        gaps = np.diff(wanted)
        bridged = int(gaps[gaps <= _BRIDGE].sum())
        bridge = _BRIDGE if bridged <= max(_SPAN_FLOOR, _SPAN_LIMIT * len(wanted)) else 1
        new = np.ones(len(wanted), bool)
        new[1:] = (gaps > bridge) | (np.diff(parts) != 0)
        first = np.flatnonzero(new)
        last = np.append(first, len(wanted))[1:] - 1
        part = parts[first]
        rows = [part, wanted[first] - starts[part], wanted[last] - starts[part] + 1]
        return np.stack(rows, axis=1).astype(np.int64), np.cumsum(new) - 1

    def _row_starts(self, runs: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        """Read where the rows of each run begin, and where the last one ends."""
        with ts.Batch() as batch:
            futures = [
                (self._array(part, _ROW_STARTS)[start : stop + 1].read(batch=batch), part)
                for part, start, stop in runs.tolist()
            ]
        return [_wait(self._store, future, part, _ROW_STARTS) for future, part in futures]

    def _open_array(self, part: int, name: str) -> Any:
        spec = self._store.array_spec(part, name)
        future = ts.open(spec, open=True, assume_metadata=True, read=True, context=self._context)
        return _wait(self._store, future, part, name)


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


def _joined(blocks: list[CellBlock]) -> CellBlock:
    ends = np.cumsum([0, *(block.indptr[-1] for block in blocks)])
    shifted = [block.indptr[1:] + end for block, end in zip(blocks, ends, strict=False)]
    return CellBlock(
        np.concatenate([block.positions for block in blocks]),
        np.concatenate([np.zeros(1, np.int64), *shifted]),
        np.concatenate([block.genes for block in blocks]),
        np.concatenate([block.counts for block in blocks]),
    )


def _wait(store: CellStore, future: Any, part: int, name: str) -> Any:
    try:
        return future.result()
    except ValueError as error:
        raise store.storage.failure(f"dataset_{part}/{name}", error) from error
