"""Which genes were measured in a cell: where they were not, a zero says nothing."""

import numpy as np
from numpy.typing import NDArray

from datastore.obs import read_obs
from datastore.store import CellStore, StoreFormatError

SOURCE = "source"


class MeasuredGenes:
    """Panel genes that a cell's source measured, by the cell's position in the store.

    Keeps the number of each cell's source, 2 bytes a cell for up to 65,536 sources, and of each
    source a bit per gene.

    Raises:
        StoreFormatError: If the store does not say what its sources measured.
    """

    def __init__(self, store: CellStore) -> None:
        names = [str(line["name"]) for line in store.header.sources]
        if not names:
            raise StoreFormatError(f"{store.url} does not say of which sources it is; rebuild it")
        numbers = {name: number for number, name in enumerate(names)}
        self._num_genes = len(store.panel)
        self._bits = np.stack([np.packbits(store.measured(name)) for name in names])
        self._sources = np.empty(store.num_cells, np.min_scalar_type(len(names)))
        for partition, start in enumerate(store.partition_starts[:-1]):
            column = read_obs(store, partition, SOURCE)
            number = np.array([numbers.get(value, 0) for value in column.values])
            self._sources[start : start + len(column.codes)] = number[column.codes]

    def __call__(self, positions: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Tell for cells at store positions, (B,), which genes were measured, (B, G)."""
        bits = self._bits[self._sources[positions]]
        return np.unpackbits(bits, axis=1, count=self._num_genes).view(np.bool_)
