"""Pass 1: slices of sources, checked, aligned to the panel and spooled in shuffle order."""

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from datastore.packing import (
    PackedCells,
    cells_of,
    pack_counts,
    packed_digests,
    unpack_counts,
)
from datastore.plan import Plan, Shuffle, Slice
from datastore.scanning import or_broken, usable
from datastore.sources import OpenSource, Source, open_source
from datastore.spool import SpooledCells, read_tally, write_spool
from datastore.workers import Compute

_CELLS_AT_ONCE: Final = 1024


@dataclass(frozen=True, kw_only=True)
class Tally:
    """What became of the cells of a slice, or of a source."""

    kept: int = 0
    empty: int = 0
    """Cells without a count of a panel gene, dropped."""
    poor: int = 0
    """Cells with fewer expressed panel genes than `min_genes`, dropped."""
    recovered: int = 0
    """Cells whose counts were computed back from normalised expression."""
    counts: int = 0
    """Sum of all counts."""
    counts_on_panel: int = 0
    """Sum of the counts that fell on panel genes."""

    def __add__(self, other: "Tally") -> "Tally":
        added = asdict(other)
        return Tally(**{name: value + added[name] for name, value in asdict(self).items()})

    @property
    def share_on_panel(self) -> float:
        """Share of the counts that fell on panel genes."""
        return self.counts_on_panel / max(1, self.counts)


@dataclass(frozen=True, kw_only=True)
class Alignment:
    """What every task of the pass needs to know."""

    work: Path
    num_genes: int
    min_genes: int
    shuffle: Shuffle
    edges: tuple[int, ...]
    with_digests: bool


def align_sources(work: Path, plan: Plan, num_genes: int, compute: Compute) -> list[Tally]:
    """Spool all cells that are kept; work that is there already is not done again.

    Args:
        work: Folder of the ingest, with the places of all sources' genes.
        plan: What goes where.
        num_genes: Length of the panel, G.
        compute: Where tasks run.

    Returns:
        What became of the cells of each source.

    Raises:
        BrokenSources: If some hold no raw counts, after all have been looked at.
    """
    alignment = Alignment(
        work=work,
        num_genes=num_genes,
        min_genes=plan.config.min_genes,
        shuffle=plan.shuffle,
        edges=tuple(plan.edges),
        with_digests=plan.config.duplicates != "keep",
    )
    tasks = []
    for parts in plan.read_together:
        # Its gene names are long, and no task needs them again.
        source = replace(plan.sources[parts[0].source], genes=())
        tasks.append((or_broken, source.path, _spool_source, alignment, source, parts))
    tallies = [Tally() for _ in plan.sources]
    for parts, found in zip(plan.read_together, usable(compute("align", tasks)), strict=True):
        for part, tally in zip(parts, found, strict=True):
            tallies[part.source] += tally
    return tallies


def save_places(work: Path, number: int, places: NDArray[np.int64]) -> None:
    """Keep the panel position of each gene of a source, -1 where it has none.

    In a file: a source may be thousands of tasks, and memory is not to grow with the sources.
    """
    np.save(_places_file(work, number), places, allow_pickle=False)


def load_places(work: Path, number: int) -> NDArray[np.int64]:
    """Give what `save_places` kept of a source."""
    places: NDArray[np.int64] = np.load(_places_file(work, number), allow_pickle=False)
    return places


def _spool_source(alignment: Alignment, source: Source, parts: Sequence[Slice]) -> list[Tally]:
    targets = [alignment.work / "spool" / part.name for part in parts]
    missing = [part for part, target in zip(parts, targets, strict=True) if not target.exists()]
    if missing:
        places = load_places(alignment.work, parts[0].source)
        with open_source(source) as cells:
            for part in missing:
                _spool_slice(alignment, cells, part, places)
    if source.decoded is not None:
        shutil.rmtree(source.decoded, ignore_errors=True)  # nobody will ask for it again
    return [Tally(**read_tally(target)) for target in targets]


def _spool_slice(
    alignment: Alignment, source: OpenSource, part: Slice, places: NDArray[np.int64]
) -> None:
    cells, digests, tally = _align(alignment, source, part, places)
    num_genes = np.concatenate([block.num_genes for block in cells])
    kept = np.flatnonzero(num_genes >= alignment.min_genes)
    place = alignment.shuffle.places(part.first + kept)
    order = np.argsort(place)
    rows = kept[order]
    names = source.cell_names(part.start, part.stop)[rows]
    obs = {
        column: pd.Categorical(values[rows])
        for column, values in source.obs(part.start, part.stop).items()
    }
    spooled = SpooledCells(
        position=place[order],
        row=part.start + rows,
        num_genes=num_genes[rows],
        name=np.array([str(name).encode() for name in names], dtype=np.bytes_),
        labels={"source": source.source.name, **dict(source.source.labels)},
        codes={column: values.codes.astype(np.int32) for column, values in obs.items()},
        categories={column: list(values.categories) for column, values in obs.items()},
    )
    of_cell = cells_of(cells)
    write_spool(
        alignment.work / "spool" / part.name,
        spooled,
        [of_cell[row] for row in rows.tolist()],
        alignment.edges,
        asdict(tally),
        digests[rows] if alignment.with_digests else digests,
        part.first + rows,
    )


def _align(
    alignment: Alignment, source: OpenSource, part: Slice, places: NDArray[np.int64]
) -> tuple[list[PackedCells], NDArray[np.uint64], Tally]:
    """Read, pack and hash all cells of a slice, and count what became of them."""
    cells: list[PackedCells] = []
    digests = [np.empty(0, np.uint64)]
    tally = Tally()
    for start, stop in pairwise(_read_at_once(source, part)):
        raw = source.counts(start, stop)
        try:
            block = pack_counts(raw, places, alignment.num_genes)
        except ValueError as error:
            raise ValueError(f"{source.source.path}: {error}; give the raw counts") from error
        cells.append(block)
        if alignment.with_digests:
            digests.append(packed_digests(block, alignment.num_genes))
        counts = on_panel = int(raw.data.sum(dtype=np.float64))  # whole numbers below 2^53
        if len(block.packed) < raw.nnz:  # some counts were dropped, or summed
            on_panel = int(unpack_counts(block.packed).sum(dtype=np.uint64))
        num_genes = block.num_genes
        kept = int((num_genes >= alignment.min_genes).sum())
        empty = int((num_genes == 0).sum())
        tally += Tally(
            kept=kept,
            empty=empty,
            poor=len(num_genes) - kept - empty,
            recovered=stop - start if start in source.recovered else 0,
            counts=counts,
            counts_on_panel=on_panel,
        )
    return cells, np.concatenate(digests), tally


def _read_at_once(source: OpenSource, part: Slice) -> list[int]:
    """Cut a slice into cells whose numbers stay in cache, if the file is read as fast in parts."""
    step = _CELLS_AT_ONCE if source.cells.by_row else part.stop - part.start
    return [*range(part.start, part.stop, step), part.stop]


def _places_file(work: Path, number: int) -> Path:
    return work / "places" / f"source_{number:05d}.npy"
