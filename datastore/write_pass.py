"""Pass 2: a partition gathers its cells from all spools and becomes an AnnData group."""

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore.duplicates import dropped_places
from datastore.genes import GenePanel, read_panel, write_panel
from datastore.packing import (
    Packed,
    PackedCells,
    cells_of,
    highest_count,
    unpack_counts,
    unpack_genes,
)
from datastore.plan import Plan
from datastore.spool import SpooledCells, read_block
from datastore.store import write_json
from datastore.store_writing import ArraySizes, digests_below, stream_partition
from datastore.work_folder import unfinished
from datastore.workers import Compute

_CELLS_AT_ONCE: Final = 512
_PANEL: Final = "places/panel.txt"
"""Where tasks find the panel, in the folder of the ingest."""


@dataclass(frozen=True)
class WrittenPart:
    """Number of a partition among those planned, the cells that fell into it, their counts."""

    number: int
    cells: int
    counts: int


def write_partitions(
    work: Path, plan: Plan, panel: GenePanel, columns: Sequence[str], compute: Compute
) -> list[WrittenPart]:
    """Write all partitions below `work/parts`; those that are there already stay.

    Args:
        work: Folder of the ingest, with the spools of all slices.
        plan: What goes where.
        panel: The genes, G.
        columns: Columns of obs besides source and row.
        compute: Where tasks run.
    """
    write_panel(panel, work / _PANEL)  # once, and not with each of thousands of tasks
    sizes = ArraySizes(
        cells_per_chunk=plan.config.cells_per_chunk,
        cells_per_shard=plan.config.cells_per_shard,
        codec=plan.config.codec,
    )
    return compute(
        "write",
        [
            (_write_part, work, number, start, stop, list(columns), sizes)
            for number, (start, stop) in enumerate(pairwise(plan.edges))
        ],
    )


def part_folder(work: Path, number: int) -> Path:
    """Where a partition is written; its record stands beside it."""
    return work / "parts" / f"dataset_{number}"


def part_record(work: Path, number: int) -> Path:
    """Size and SHA-256 of each file of a partition."""
    return work / "parts" / f"dataset_{number}.record"


def _write_part(
    work: Path,
    number: int,
    start: int,
    stop: int,
    columns: Sequence[str],
    sizes: ArraySizes,
) -> WrittenPart:
    target = part_folder(work, number)
    note = target.with_suffix(".json")
    if note.exists():
        return WrittenPart(**json.loads(note.read_text(encoding="utf-8")))
    paths = sorted((work / "spool").glob("slice_*[0-9]"))
    found = [read_block(path, number) for path in paths]
    blocks = [block for block, _ in found if len(block)]
    packed = [cells for block, cells in found if len(block)]
    gathered = _in_order(blocks, dropped_places(work, start, stop))
    counts = int(gathered.indptr[-1])
    if len(gathered.cell):
        beside = unfinished(target)
        stream_partition(
            beside,
            gathered.indptr,
            _pieces(packed, gathered),
            max(highest_count(cells) for cells in packed),
            _obs(blocks, gathered, columns),
            read_panel(work / _PANEL),
            sizes,
        )
        shutil.rmtree(target, ignore_errors=True)  # of an ingest that was killed just here
        beside.rename(target)
        write_json(part_record(work, number), digests_below(target))
    written = WrittenPart(number, len(gathered.cell), counts)
    write_json(note, vars(written))
    return written


@dataclass(frozen=True)
class _Gathered:
    """Which cell of the blocks, laid end to end, comes when, and where its counts will begin."""

    cell: NDArray[np.int64]
    indptr: NDArray[np.int64]


def _in_order(blocks: Sequence[SpooledCells], dropped: NDArray[np.int64]) -> _Gathered:
    empty = np.empty(0, np.int64)
    position = np.concatenate([empty, *[block.position for block in blocks]])
    num_genes = np.concatenate([empty, *[block.num_genes for block in blocks]])
    order = np.argsort(position)
    order = order[~np.isin(position[order], dropped, assume_unique=True)]
    return _Gathered(order, np.concatenate([[0], np.cumsum(num_genes[order])]).astype(np.int64))


def _pieces(blocks: Sequence[PackedCells], gathered: _Gathered) -> Iterator[tuple[Packed, Packed]]:
    """Genes and counts of the cells in their order, some cells at a time."""
    cells = cells_of(blocks)
    for start in range(0, len(gathered.cell), _CELLS_AT_ONCE):
        chosen = gathered.cell[start : start + _CELLS_AT_ONCE].tolist()
        piece = np.concatenate([cells[cell] for cell in chosen])
        yield unpack_genes(piece), unpack_counts(piece)


def _obs(
    blocks: Sequence[SpooledCells], gathered: _Gathered, columns: Sequence[str]
) -> pd.DataFrame:
    """One row per cell; the columns are the same in all parts, whichever sources they hold."""

    def ordered(values: Sequence[NDArray[Any]]) -> NDArray[Any]:
        return np.concatenate(values)[gathered.cell]

    names = [str(name, "utf-8") for name in ordered([block.name for block in blocks]).tolist()]
    obs = pd.DataFrame(index=pd.Index(names, dtype=object))
    obs["source"] = pd.Categorical(ordered([_values(block, "source") for block in blocks]))
    obs["source_row"] = ordered([block.row for block in blocks])
    for column in columns:
        obs[column] = pd.Categorical(ordered([_values(block, column) for block in blocks]))
    return obs


def _values(block: SpooledCells, column: str) -> NDArray[np.object_]:
    """A column of obs as text, None where it is missing."""
    if column not in block.categories:
        return np.full(len(block), block.labels.get(column), object)
    with_missing = np.array([*block.categories[column], None], object)
    return with_missing[block.codes[column]]  # code -1 is missing
