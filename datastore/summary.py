"""What a store holds, and how fast it reads: for people who have one before them."""

import resource
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any, Final

import numpy as np

from datastore.config import BinningConfig, OrderConfig, SelectionConfig
from datastore.loader import CellLoader
from datastore.obs import obs_columns, read_obs
from datastore.reader import CellReader
from datastore.sampler import CellSampler
from datastore.selection import select_cells
from datastore.store import CellStore

COUNTED: Final = ("species", "tissue")
"""Columns of obs whose values are counted, in stores that have them."""


def summarize(store: CellStore) -> dict[str, Any]:
    """Describe a store in plain numbers and texts; reads records and obs, no counts."""
    header = store.header
    numbers = range(len(header.partitions))
    sizes: Counter[str] = Counter()
    for number in numbers:
        for name, (size, _) in store.partition_files(number).items():
            sizes["counts" if name.startswith("X/") else "obs and others"] += size
    sizes["obs and others"] += sum(size for size, _ in store.files.values())
    data = store.array_spec(0, "X/data")["metadata"]
    (sharding,) = data["codecs"]
    codec = next(c for c in sharding["configuration"]["codecs"] if c["name"] == "blosc")
    per_cell = header.num_counts / max(1, store.num_cells)
    return {
        "place": store.url,
        "store_id": header.store_id,
        "cells": store.num_cells,
        "genes": len(store.panel),
        "counts": header.num_counts,
        "expressed_genes_per_cell": per_cell,
        "partitions": len(header.partitions),
        "generations": list(header.generations),
        "seed": header.seed,
        "bytes": {**sizes, "all": sizes.total()},
        "bytes_per_cell": sizes.total() / max(1, store.num_cells),
        "count_type": data["data_type"],
        "codec": f"{codec['configuration']['cname']} {codec['configuration']['clevel']}",
        "cells_per_chunk": _cells(sharding["configuration"]["chunk_shape"], per_cell),
        "cells_per_shard": _cells(data["chunk_grid"]["configuration"]["chunk_shape"], per_cell),
        "columns": obs_columns(store),
        **{name: _values(store, name) for name in COUNTED if name in obs_columns(store)},
        "sources": list(header.sources),
        "left_out": list(header.left_out),
    }


@dataclass(frozen=True)
class ReadingSpeed:
    """How fast shuffled batches came, on this machine and with its caches as they were."""

    form: str
    batch_size: int
    cells: int
    seconds: float
    cpu_seconds: float
    seconds_to_first_batch: float
    peak_memory_bytes: int
    """Of the whole process, Python and its libraries included."""

    def as_dict(self) -> dict[str, Any]:
        """All figures, with the rates that follow from them."""
        return {
            **asdict(self),
            "cells_per_second": self.cells / self.seconds,
            "cells_per_cpu_second": self.cells / max(self.cpu_seconds, 1e-9),
        }


def measure_reading(
    store: CellStore, form: str = "counts", batch_size: int = 512, seconds: float = 10.0
) -> ReadingSpeed:
    """Read batches in training order until the time is up or every cell was read once.

    Args:
        store: The store.
        form: `counts` for CSR batches, `tokens` for dense uint8 ones.
        batch_size: Cells of a batch.
        seconds: When to stop.

    Raises:
        ValueError: If a setting makes no sense.
    """
    if form not in ("counts", "tokens"):
        raise ValueError(f"form is {form!r}; give counts or tokens")
    if batch_size < 1 or seconds <= 0:
        raise ValueError("batch_size must be 1 or more and seconds positive")
    order = select_cells(store, SelectionConfig(), 0.0).order(0, OrderConfig())
    started, cpu_started = time.perf_counter(), time.process_time()
    loader = CellLoader(
        CellReader(store),
        CellSampler(order, batch_size, rank=0, world_size=1, accumulation_steps=1),
        len(store.panel),
        BinningConfig(),
    )
    cells, first = 0, None
    for batches in loader.cells(0) if form == "counts" else loader.epoch(0):
        first = time.perf_counter() - started if first is None else first
        cells += sum(len(batch.positions) for batch in batches)
        if time.perf_counter() - started > seconds:
            break
    return ReadingSpeed(
        form=form,
        batch_size=batch_size,
        cells=cells,
        seconds=time.perf_counter() - started,
        cpu_seconds=time.process_time() - cpu_started,
        seconds_to_first_batch=first or 0.0,
        peak_memory_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    )


def _cells(shape: list[int], per_cell: float) -> int:
    return round(shape[0] / max(per_cell, 1.0))


def _values(store: CellStore, column: str) -> dict[str, int]:
    """How many cells have each value of a column, most first."""
    found: Counter[str] = Counter()
    for number in range(len(store.header.partitions)):
        values = read_obs(store, number, column)
        counts = np.bincount(values.codes, minlength=len(values.values))
        found.update({v: int(n) for v, n in zip(values.values, counts, strict=True) if n})
    return dict(found.most_common())
