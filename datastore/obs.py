"""What a store says of its cells: a column of obs, partition by partition."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
import zarr
from anndata.io import read_elem
from numpy.typing import NDArray
from zarr.core.buffer import Buffer, cpu
from zarr.storage import MemoryStore

from datastore.store import CellStore

_INDEX: Final = "_index"
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
    return sorted(names - {_INDEX})


def read_obs(store: CellStore, partition: int, column: str) -> ObsColumn:
    """Read a column for all cells of a partition, from a folder or a server.

    Raises:
        ValueError: If the store has no such column.
        StoreFormatError: If a file of it is damaged.
    """
    if column == _INDEX or column not in obs_columns(store):
        raise ValueError(
            f"{store.url} has no obs[{column!r}]; it has {', '.join(obs_columns(store)) or 'none'}"
        )
    stored = _read_element(store, partition, column)
    values = pd.Categorical(stored) if not isinstance(stored, pd.Categorical) else stored
    names = [str(value) for value in values.categories]
    codes = np.asarray(values.codes, np.int64)
    return ObsColumn(np.where(codes < 0, len(names), codes), (*names, MISSING))


def read_cell_names(store: CellStore, partition: int) -> NDArray[np.object_]:
    """Read the names of all cells of a partition, from a folder or a server.

    Raises:
        StoreFormatError: If a file of them is damaged.
    """
    return np.asarray(_read_element(store, partition, _INDEX), object)


def _read_element(store: CellStore, partition: int, name: str) -> Any:
    folder = f"obs/{name}/"
    files: dict[str, Buffer] = {
        file.removeprefix(folder): cpu.Buffer.from_bytes(store.partition_file(partition, file))
        for file in store.partition_files(partition)
        if file.startswith(folder)
    }
    return read_elem(zarr.open(MemoryStore(files), mode="r"))
