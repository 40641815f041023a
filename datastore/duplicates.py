"""Cells that occur more than once, found by a hash of their counts.

A task per range of hashes joins the sorted lists of all slices, so memory does not grow with the
number of cells. The hash has 64 bits: among 100 million cells one false pair is expected in 3,000
ingests.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from datastore.plan import Plan, Shuffle
from datastore.spool import read_digests
from datastore.work_folder import unfinished
from datastore.workers import Compute

_CELLS_AT_ONCE: Final = 2**22
_HASHES: Final = 2**64


@dataclass(frozen=True)
class SharedCells:
    """Cells of a source whose counts equal those of an earlier cell.

    Attributes:
        source: Name of the source.
        first: Source of the first such cell, in the store's order of sources; may be the same.
        cells: How many.
    """

    source: str
    first: str
    cells: int


def find_duplicates(work: Path, plan: Plan, compute: Compute) -> list[SharedCells]:
    """Count the cells that sources share and, if the plan drops them, note their places."""
    num_ranges = -(-plan.num_cells // _CELLS_AT_ONCE)
    edges = [number * _HASHES // num_ranges for number in range(num_ranges + 1)]
    shuffle = plan.shuffle if plan.config.duplicates == "drop" else None
    tasks = [
        (_find_in_range, work, number, lowest, highest - 1, plan.first_index, shuffle)
        for number, (lowest, highest) in enumerate(pairwise(edges))
    ]
    total: Counter[tuple[int, int]] = Counter()
    for found in compute("compare", tasks):
        total.update(found)
    names = [source.name for source in plan.sources]
    return [SharedCells(names[b], names[a], cells) for (a, b), cells in sorted(total.items())]


def dropped_places(work: Path, start: int, stop: int) -> NDArray[np.int64]:
    """Places in [start, stop) of cells that are dropped as duplicates, ascending."""
    pieces = [np.empty(0, np.int64)]
    for file in sorted((work / "duplicates").glob("*.npy")):
        places = np.load(file, mmap_mode="r")
        pieces.append(np.asarray(places[slice(*np.searchsorted(places, [start, stop]))]))
    return np.sort(np.concatenate(pieces))


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
    later, earlier = index[again], index[first[again]]
    if shuffle is not None:
        target = work / "duplicates" / f"range_{number:05d}.npy"
        beside = unfinished(target)
        with beside.open("wb") as file:
            np.save(file, np.sort(shuffle.places(later)), allow_pickle=False)
        beside.replace(target)
    sources = np.searchsorted(first_index, np.stack([earlier, later]), side="right") - 1
    pairs, cells = np.unique(sources, axis=1, return_counts=True)
    return Counter({(int(a), int(b)): int(n) for (a, b), n in zip(pairs.T, cells, strict=True)})


def _cells_in_range(
    work: Path, lowest: int, highest: int
) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
    digests, index = [np.empty(0, np.uint64)], [np.empty(0, np.int64)]
    for path in sorted((work / "spool").glob("slice_*[0-9]")):
        of_slice, cells = read_digests(path)
        start = np.searchsorted(of_slice, np.uint64(lowest), side="left")
        stop = np.searchsorted(of_slice, np.uint64(highest), side="right")
        digests.append(of_slice[start:stop])
        index.append(cells[start:stop])
    return np.concatenate(digests), np.concatenate(index)
