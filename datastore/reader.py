"""Cells by position, through TensorStore.

1. A plan says which stretches of which arrays hold the cells; for that their row starts are read.
2. TensorStore decodes the stretches in its own threads, checks the crc32c of every chunk, and
   writes into an arena, memory that is used for one read after another.
3. Rows are cut from the arena, in any order.

`CellReader.read` does all three; a loader does them one ahead of the other.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Final

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from datastore.arenas import (
    COUNTS,
    GENES,
    Arena,
    ArenaCells,
    CellBlock,
    ReadPlan,
    Stretch,
    joined,
    tails_that_go_on,
)
from datastore.storage import is_on_local_disk
from datastore.store import CellStore

_ROW_STARTS: Final = "X/indptr"
_BRIDGE: Final = 64
"""Unwanted cells that are read along to make one stretch of two: they share a chunk anyway."""
_CELLS_AT_ONCE: Final = 4096
_SPAN_LIMIT: Final = 8
"""Cells that may be read along for each wanted one, before stretches are kept apart …"""
_SPAN_FLOOR: Final = 16_384
"""… unless there are no more of them than this in all."""


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
        whole = blocks[0] if len(blocks) == 1 else joined(blocks)
        if np.array_equal(wanted, positions):
            return whole
        return whole.take(inverse.astype(np.int64))

    def plan(self, positions: NDArray[np.int64], with_tails: bool = False) -> ReadPlan:
        """Find out what to read; reads the row starts.

        Args:
            positions: Store positions, (B,), each in [0, N), in any order.
            with_tails: Whether long stretches are read to the end of their last chunk, for a next
                read that goes on there.

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
        tails = [
            self._tail(int(part), int(p[0]), int(p[-1])) if with_tails else 0
            for (part, _, _), p in zip(runs, pointers, strict=True)
        ]
        lengths = np.array(
            [p[-1] - p[0] + tail for p, tail in zip(pointers, tails, strict=True)], np.int64
        )
        places = np.cumsum(lengths) - lengths
        # Where each wanted cell's pointer stands when those of all runs are put one after another.
        first = np.cumsum([0, *(len(p) for p in pointers)])[:-1]
        row = wanted - self._store.partition_starts[runs[run_of, 0]] - runs[run_of, 1]
        flat = np.concatenate([*pointers, np.empty(0, np.int64)])
        shift = (places - flat[first] if len(runs) else places)[run_of]
        at = first[run_of] + row
        stretches = [
            Stretch(int(part), int(p[0]), int(p[-1]), int(place), tail)
            for (part, _, _), p, place, tail in zip(runs, pointers, places, tails, strict=True)
            if p[-1] > p[0]
        ]
        begin, end = np.empty_like(at), np.empty_like(at)
        begin[order], end[order] = flat[at] + shift, flat[at + 1] + shift
        num_values = int(lengths.sum())
        width = sum(
            _common_type([self._array(stretch.part, name) for stretch in stretches]).itemsize
            for name in (GENES, COUNTS)
        )
        return ReadPlan(positions, begin, end, stretches, num_values, num_values * width)

    def start(self, plan: ReadPlan, arena: Arena, former: ArenaCells | None = None) -> PendingCells:
        """Begin to fill an arena; what stood in it is lost.

        Args:
            plan: What to read.
            arena: Where to.
            former: Cells in another arena, whose tails are copied rather than decoded again.
        """
        futures: list[tuple[Any, int, str]] = []
        known = tails_that_go_on(former, plan.stretches)
        opened = [
            [self._array(stretch.part, name) for stretch in plan.stretches]
            for name in (GENES, COUNTS)
        ]
        cells = ArenaCells(plan, arena.arrays(plan.num_values, *map(_common_type, opened)))
        tails = []
        with ts.Batch() as batch:
            for name, arrays in zip((GENES, COUNTS), opened, strict=True):
                values = cells.genes if name == GENES else cells.counts
                room = ts.array(values, copy=False, context=self._context)
                for stretch, array, (at, length) in zip(plan.stretches, arrays, known, strict=True):
                    first = stretch.place + length
                    if former is not None and length:
                        tail = former.genes if name == GENES else former.counts
                        tails.append((values[stretch.place : first], tail[at : at + length]))
                    start, stop = stretch.start + length, stretch.stop + stretch.tail
                    if start < stop:
                        target = room[first : first + stop - start]
                        write = target.write(array[start:stop], batch=batch)
                        futures.append((write, stretch.part, name))
        for place, tail in tails:  # while the rest is being decoded
            place[:] = tail
        return PendingCells(self._store, cells, futures)

    def _tail(self, part: int, start: int, stop: int) -> int:
        """Values between a stretch's end and that of its last chunk, if it is as long as one."""
        array = self._array(part, COUNTS)
        chunk = int(array.chunk_layout.read_chunk.shape[0])
        return min(-stop % chunk, int(array.shape[0]) - stop) if stop - start >= chunk else 0

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


def _common_type(arrays: Sequence[Any]) -> np.dtype[Any]:
    """Type that holds the values of all arrays."""
    kinds = {array.dtype.numpy_dtype for array in arrays}
    return np.result_type(*kinds) if kinds else np.dtype(np.uint16)


def _wait(store: CellStore, future: Any, part: int, name: str) -> Any:
    try:
        return future.result()
    except ValueError as error:
        raise store.storage.failure(f"dataset_{part}/{name}", error) from error
