"""One run of our loader, or of what bounds it; started by benchmarks/loader.py.

Usage: ours.py CASE FOLDER CELLS
"""

import sys
import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from stopwatch import cpu_seconds, peak_mb, report, say

from datastore.arenas import Arena, ArenaCells
from datastore.buffers import BufferPool
from datastore.config import BinningConfig, OrderConfig
from datastore.loader import WINDOWS_AHEAD, CellLoader
from datastore.reader import CellReader
from datastore.sampler import CellOrder, CellSampler
from datastore.store import open_store

BATCH = 512


def sampler_of(num_cells: int, rank: int = 0, world_size: int = 1) -> CellSampler:
    order = CellOrder(0, num_cells, 0, OrderConfig())
    return CellSampler(order, BATCH * world_size, rank, world_size, 1)


def batches(
    folder: Path, form: str, share: float = 0.0, rank: int = 0, world_size: int = 1
) -> Iterator[Any]:
    """Batches of one epoch after another in one of the loader's forms, from a share of the first's
    steps on."""
    store = open_store(folder)
    sampler = sampler_of(store.num_cells, rank, world_size)
    loader = CellLoader(CellReader(store), sampler, len(store.panel), BinningConfig())
    first = int(sampler.steps_per_epoch * share)
    for epoch in count():
        for (batch,) in getattr(loader, form)(epoch, 0 if epoch else first):
            yield batch


def size(batch: Any) -> int:
    return len(batch) if isinstance(batch, np.ndarray) else len(batch.positions)


def starts(folder: Path, times: int = 5) -> None:
    """Open the store and take a batch, in turns from the beginning and from mid-epoch."""
    spent = np.empty((times, 2, 2))
    for number in range(-1, times):  # what the first pair costs more is the process's, not theirs
        for which, share in enumerate((0.0, 0.5)):
            before = np.array([time.perf_counter(), cpu_seconds()])
            next(batches(folder, "cells", share))
            spent[number, which] = np.array([time.perf_counter(), cpu_seconds()]) - before
    (cold, cold_cpu), (seek, seek_cpu) = np.median(spent, axis=0)
    say(
        cold_start_seconds=cold,
        seek_seconds=seek,
        cold_start_cpu_seconds=cold_cpu,
        seek_cpu_seconds=seek_cpu,
        seek_vs_cold_start=np.median(spent[:, 1, 0] / spent[:, 0, 0]),
        seek_cpu_vs_cold_start=np.median(spent[:, 1, 1] / spent[:, 0, 1]),
        peak_mb=peak_mb(),
    )


def limits(folder: Path, cells: int) -> None:
    """Decoding alone and cutting batches alone, in turns over the same windows."""
    store = open_store(folder)
    reader, sampler = CellReader(store), sampler_of(store.num_cells)
    order = sampler.order.config
    together = WINDOWS_AHEAD * order.window * order.lanes // BATCH
    arena, pool = Arena(), BufferPool()
    spent = {"decode": np.zeros(2), "gather": np.zeros(2)}
    done = 0

    def timed(what: str, function: Callable[..., Any], *arguments: Any) -> Any:
        before = np.array([time.perf_counter(), cpu_seconds()])
        result = function(*arguments)
        spent[what] += np.array([time.perf_counter(), cpu_seconds()]) - before
        return result

    def cut(read: Any, count: int) -> None:
        for start in range(0, count, BATCH):
            read.take(np.arange(start, min(start + BATCH, count)), pool)

    def fill(positions: NDArray[np.int64]) -> ArenaCells:
        return reader.start(reader.plan(positions), arena).result()

    for step in range(0, sampler.steps_per_epoch, together):
        steps = sampler.plan(0, range(step, min(step + together, sampler.steps_per_epoch)))
        positions = np.concatenate([share for micro in steps for share in micro])
        if not step:
            fill(positions)  # the page faults of an arena's first fill are no part of either
        read = timed("decode", fill, positions)
        timed("gather", cut, read, len(positions))
        done += len(positions)
        if done >= cells:
            break
    decode, gather = spent["decode"] / done, spent["gather"] / done
    say(
        decode_per_second=1 / decode[0],
        gather_per_second=1 / gather[0],
        per_second=1 / (decode[0] + gather[0]),
        second_half_per_second=1 / (decode[0] + gather[0]),
        per_cpu_second=1 / (decode[1] + gather[1]),
    )


def memory_map(folder: Path, cells: int) -> Iterator[Any]:
    """Random rows of uncompressed arrays on disk, mapped into memory."""
    genes, counts = (np.load(folder / f"{name}.npy", mmap_mode="r") for name in ("genes", "counts"))
    indptr = np.load(folder / "indptr.npy")
    rows = np.random.default_rng(0).permutation(len(indptr) - 1)[:cells]
    yield [], None  # what follows is timed
    for start in range(0, len(rows), BATCH):
        chosen = rows[start : start + BATCH]
        cuts = list(map(slice, indptr[chosen].tolist(), indptr[chosen + 1].tolist()))
        yield chosen, [np.concatenate([a[cut] for cut in cuts]) for a in (genes, counts)]


def copying(folder: Path, cells: int) -> Iterator[Any]:
    """Batches of as many bytes, copied from one place to another in memory."""
    length = BATCH * len(np.load(folder / "counts.npy", mmap_mode="r"))
    length //= len(np.load(folder / "indptr.npy", mmap_mode="r")) - 1
    source, target = np.ones((16, 2, length), np.uint16), np.ones((2, length), np.uint16)
    yield [], None  # what follows is timed
    for step in range(-(-cells // BATCH)):
        target[:] = source[step % 16]
        yield range(BATCH), target


def flatten(folder: Path) -> None:
    """Write the store's counts uncompressed beside it, for `memory_map`."""
    store, target = open_store(folder / "ours.zarr"), folder / "flat"
    target.mkdir(exist_ok=True)
    reader, nnz = CellReader(store), store.header.num_counts
    arrays = [
        np.lib.format.open_memmap(target / f"{name}.npy", "w+", np.uint16, (nnz,))
        for name in ("genes", "counts")
    ]
    indptr = [np.zeros(1, np.int64)]
    for start in range(0, store.num_cells, 8192):
        cells = reader.read(np.arange(start, min(start + 8192, store.num_cells)))
        at = int(indptr[-1][-1])
        for array, values in zip(arrays, (cells.genes, cells.counts), strict=True):
            array[at : at + len(values)] = values
        indptr.append(cells.indptr[1:] + at)
    np.save(target / "indptr.npy", np.concatenate(indptr))


def main(case: str, folder: Path, cells: int) -> None:
    store = folder / "ours.zarr"
    if case in ("cells", "packed", "dense", "epoch"):
        report(lambda: batches(store, case), size, cells)
    elif case == "tokens":
        report(lambda: batches(folder / "panel_16906.zarr", "epoch"), size, cells)
    elif case == "starts":
        starts(store)
    elif case in ("rank_0", "rank_1"):
        rank = int(case[-1])
        report(lambda: batches(store, "cells", 0.0, rank, 2), size, cells // 2)
    elif case == "limits":
        limits(store, cells)
    elif case in ("memory_map", "copying"):
        floor = (memory_map if case == "memory_map" else copying)(folder / "flat", cells)
        next(floor)
        report(lambda: floor, lambda batch: len(batch[0]), cells)
    elif case == "flatten":
        flatten(folder)
        say(peak_mb=peak_mb())
    else:
        raise ValueError(f"no case {case}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
