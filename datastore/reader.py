"""Cells by position, through TensorStore.

Reads are grouped into runs of neighbouring cells and issued together; TensorStore decodes chunks in
its own threads and checks their crc32c.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts
from numpy.typing import NDArray

from datastore.store import CellStore, StoreFormatError


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

    def take(self, rows: NDArray[np.int64]) -> "CellBlock":
        """Return some of the rows, in the order given."""
        starts, lengths = self.indptr[rows], np.diff(self.indptr)[rows]
        indptr = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
        pick = np.repeat(starts - indptr[:-1], lengths) + np.arange(indptr[-1])
        return CellBlock(self.positions[rows], indptr, self.genes[pick], self.counts[pick])


class CellReader:
    """Reads cells of a store by position."""

    def __init__(self, store: CellStore) -> None:
        self._store = store
        # Chunks are decoded once per pass over the store, so a cache would only cost memory.
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": 0}})
        self._array = lru_cache(maxsize=None)(self._open_array)

    def read(self, positions: NDArray[np.int64]) -> CellBlock:
        """Read cells.

        Args:
            positions: Store positions, (B,), each in [0, N), in any order.

        Returns:
            The cells, in the order asked for.

        Raises:
            IndexError: If a position lies outside the store.
            StoreFormatError: If a chunk is damaged.
        """
        if len(positions) and not (
            positions.min() >= 0 and positions.max() < self._store.num_cells
        ):
            raise IndexError(f"positions must lie in [0, {self._store.num_cells})")
        wanted, inverse = np.unique(positions, return_inverse=True)
        return self._read_sorted(wanted).take(inverse.astype(np.int64))

    def _read_sorted(self, positions: NDArray[np.int64]) -> CellBlock:
        runs = self._runs(positions)
        rows = self._read_all([(part, "indptr", start, stop + 1) for part, start, stop in runs])
        spans = [
            (part, int(pointers[0]), int(pointers[-1]))
            for (part, _, _), pointers in zip(runs, rows, strict=True)
        ]
        values = self._read_all(
            [(part, name, a, b) for name in ("indices", "data") for part, a, b in spans]
        )
        lengths = [np.diff(pointers) for pointers in rows]
        return CellBlock(
            positions=positions,
            indptr=np.concatenate([[0], np.cumsum(np.concatenate([[], *lengths]))]).astype(
                np.int64
            ),
            genes=_joined(values[: len(runs)]),
            counts=_joined(values[len(runs) :]),
        )

    def _runs(self, positions: NDArray[np.int64]) -> list[tuple[int, int, int]]:
        """Cut sorted positions into (partition, first row, last row + 1) of neighbours."""
        starts = self._store.partition_starts
        part = np.searchsorted(starts, positions, side="right") - 1
        new = np.ones(len(positions), bool)
        new[1:] = (np.diff(positions) != 1) | (np.diff(part) != 0)
        first = np.flatnonzero(new)
        last = np.append(first, len(positions))[1:] - 1
        return [
            (int(p), int(a - starts[p]), int(b - starts[p] + 1))
            for p, a, b in zip(part[first], positions[first], positions[last], strict=True)
        ]

    def _read_all(self, requests: list[tuple[int, str, int, int]]) -> list[NDArray[Any]]:
        """Issue all reads at once, then wait for them."""
        with ts.Batch() as batch:
            futures = [
                self._array(part, name)[start:stop].read(batch=batch)
                for part, name, start, stop in requests
            ]
        try:
            return [future.result() for future in futures]
        except ValueError as error:
            raise StoreFormatError(
                f"{self._store.path} is damaged: {str(error).splitlines()[0]}; "
                "copy the store again or rebuild it"
            ) from error

    def _open_array(self, part: int, name: str) -> Any:
        folder = self._store.partition_path(part) / "X" / name
        try:
            return ts.open(_spec(folder), open=True, read=True, context=self._context).result()
        except ValueError as error:
            raise StoreFormatError(f"{folder} cannot be read: {error}") from error


def _spec(folder: Path) -> dict[str, Any]:
    return {
        "driver": "zarr3",
        "kvstore": {"driver": "file", "path": f"{folder.resolve()}/"},
        "fill_missing_data_reads": False,  # a file that went missing is an error, not zeros
    }


def _joined(pieces: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate(pieces) if pieces else np.empty(0, np.uint16)
