"""What a store says of its cells: a column of obs, partition by partition."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from datastore.store import CellStore

MISSING: Final = "(missing)"
"""Stands for a cell that has no value."""


@dataclass(frozen=True)
class ObsColumn:
    """A column of obs as text: the value of cell i is `values[codes[i]]`."""

    codes: NDArray[np.int64]
    values: tuple[str, ...]

    def is_one_of(self, values: Collection[str]) -> NDArray[np.bool_]:
        """Tell of each cell whether it has one of these values."""
        return np.array([value in values for value in self.values], np.bool_)[self.codes]


def obs_columns(store: CellStore) -> list[str]:
    """Columns of obs that the store's partitions have, without the names of the cells."""
    parts = [name.split("/") for name in store.partition_files(0)]
    names = {name[1] for name in parts if name[0] == "obs" and len(name) > 2}
    return sorted(names - {"_index"})


def read_obs(store: CellStore, partition: int, column: str) -> ObsColumn:
    """Read a column for all cells of a partition, from a folder or a server.

    Raises:
        ValueError: If the store has no such column.
        StoreFormatError: If a file of it is damaged.
    """
    folder = f"obs/{column}/"
    names = [name for name in store.partition_files(partition) if name.startswith(folder)]
    if not names or column == "_index":
        raise ValueError(
            f"{store.url} has no obs[{column!r}]; it has {', '.join(obs_columns(store)) or 'none'}"
        )
    files: dict[str, Buffer] = {
        name.removeprefix(folder): cpu.Buffer.from_bytes(store.partition_file(partition, name))
        for name in names
    }
    stored = read_elem(zarr.open(MemoryStore(files), mode="r"))
    values = pd.Categorical(stored) if not isinstance(stored, pd.Categorical) else stored
    names = [str(value) for value in values.categories]
    codes = np.asarray(values.codes, np.int64)
    return ObsColumn(np.where(codes < 0, len(names), codes), (*names, MISSING))
