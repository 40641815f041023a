"""Cells that occur more than once, found by a hash of their counts.

An append first hashes the cells of the store, a task per partition. Then a task per range of hashes
joins the sorted lists of all slices and partitions, so memory does not grow with the number of
cells. The hash has 64 bits: among 100 million cells one false pair is expected in 3,000 ingests.

It is over the genes of the panel with counts above zero. A cell is therefore known again in a
source that measured other genes, so long as it expresses none that either source lacks; one count
more or less, as another reference genome or pipeline gives, makes it another cell.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from datastore.obs import read_obs
from datastore.packing import content_digests
from datastore.plan import Plan, Shuffle
from datastore.reader import CellReader
from datastore.spool import read_digests
from datastore.store import CellStore, open_store
from datastore.work_folder import unfinished
from datastore.workers import Compute

_CELLS_AT_ONCE: Final = 2**22
_CELLS_READ_AT_ONCE: Final = 8192
_HASHES: Final = 2**64


@dataclass(frozen=True)
class SharedCells:
    """Cells of a source whose counts equal those of an earlier cell.

    Attributes:
        source: Name of the source.
        first: Source of the first such cell: in the store before, or else in the order of sources;
            may be the same.
        cells: How many.
    """

    source: str
    first: str
    cells: int


def find_duplicates(
    work: Path, plan: Plan, compute: Compute, store: CellStore | None = None
) -> list[SharedCells]:
    """Count the cells that sources share and, if the plan drops them, note their places.

    Args:
        work: Folder of the ingest, with the spools of all slices.
        plan: What goes where.
        compute: Where tasks run.
        store: Store that is appended to, whose cells count as the first.
    """
    known: list[str] = []
    num_cells = plan.num_cells
    if store is not None:
        known = [line["name"] for line in store.header.sources]
        num_cells += store.num_cells
        parts = range(len(store.header.partitions))
        compute("hash", [(_hash_partition, work, str(store.path), part) for part in parts])
    num_ranges = -(-num_cells // _CELLS_AT_ONCE)
    edges = [number * _HASHES // num_ranges for number in range(num_ranges + 1)]
    shuffle = plan.shuffle if plan.config.duplicates == "drop" else None
    tasks = [
        (_find_in_range, work, number, lowest, highest - 1, plan.first_index, shuffle)
        for number, (lowest, highest) in enumerate(pairwise(edges))
    ]
    total: Counter[tuple[int, int]] = Counter()
    for found in compute("compare", tasks):
        total.update(found)
    # Sources of the store have negative numbers, counted from the end.
    names = [*(source.name for source in plan.sources), *known]
    return [SharedCells(names[b], names[a], cells) for (a, b), cells in sorted(total.items())]


def dropped_places(work: Path, start: int, stop: int) -> NDArray[np.int64]:
    """Places in [start, stop) of cells that are dropped as duplicates, ascending."""
    pieces = [np.empty(0, np.int64)]
    for file in sorted((work / "duplicates").glob("range_*.npy")):
        places = np.load(file, mmap_mode="r")
        pieces.append(np.asarray(places[slice(*np.searchsorted(places, [start, stop]))]))
    return np.sort(np.concatenate(pieces))


def _hash_partition(work: Path, place: str, number: int) -> None:
    """Note the hash of each cell of a partition, ascending, and the number of its source, below 0.

    All cells of a source in the store have that one number as their index: only which came first
    matters of them.
    """
    target = work / "duplicates" / f"known_{number:05d}.npy"
    if target.exists():
        return
    store = open_store(place)
    sources = [line["name"] for line in store.header.sources]
    column = read_obs(store, number, "source")
    below_zero = {name: place - len(sources) for place, name in enumerate(sources)}
    of_code = np.array([below_zero.get(name, -1) for name in column.values], np.int64)
    reader, first = CellReader(store), int(store.partition_starts[number])
    num_cells = len(column.codes)
    digests = np.empty(num_cells, np.uint64)
    for start in range(0, num_cells, _CELLS_READ_AT_ONCE):
        stop = min(start + _CELLS_READ_AT_ONCE, num_cells)
        cells = reader.read(np.arange(first + start, first + stop))
        digests[start:stop] = content_digests(
            cells.indptr, cells.genes, cells.counts, len(store.panel)
        )
    order = np.argsort(digests)
    numbers = of_code[column.codes[order]]
    beside = unfinished(target)
    with beside.open("wb") as file:
        np.save(file, np.stack([digests[order], numbers.view(np.uint64)]), allow_pickle=False)
    beside.replace(target)


def _find_in_range(
    work: Path,
    number: int,
    lowest: int,
    highest: int,
    first_index: Sequence[int],
    shuffle: Shuffle | None,
) -> Counter[tuple[int, int]]:
    digests, index = _cells_in_range(work, lowest, highest)
    order = np.lexsort([index, digests])
    digests, index = digests[order], index[order]
    again = np.zeros(len(index), np.bool_)
    again[1:] = digests[1:] == digests[:-1]
    first = np.maximum.accumulate(np.where(again, 0, np.arange(len(index))))
    again &= index >= 0  # cells that the store repeats are no news
    later, earlier = index[again], index[first[again]]
    if shuffle is not None:
        target = work / "duplicates" / f"range_{number:05d}.npy"
        beside = unfinished(target)
        with beside.open("wb") as file:
            np.save(file, np.sort(shuffle.places(later)), allow_pickle=False)
        beside.replace(target)
    both = np.stack([earlier, later])
    sources = np.where(both < 0, both, np.searchsorted(first_index, both, side="right") - 1)
    pairs, cells = np.unique(sources, axis=1, return_counts=True)
    return Counter({(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, cells, strict=True)})


def _cells_in_range(
    work: Path, lowest: int, highest: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    digests, index = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    paths = [
        *sorted((work / "duplicates").glob("known_*.npy")),
        *sorted((work / "spool").glob("slice_*[0-9]")),
    ]
    for path in paths:
        of_slice, cells = _read_known(path) if path.suffix == ".npy" else read_digests(path)
        start = np.searchsorted(of_slice, np.uint64(lowest), side="left")
        stop = np.searchsorted(of_slice, np.uint64(highest), side="right")
        digests.append(of_slice[start:stop])
        index.append(cells[start:stop])
    return np.concatenate(digests), np.concatenate(index)


def _read_known(path: Path) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    digests, numbers = np.load(path, mmap_mode="r")
    return digests, numbers.view(np.int64)
