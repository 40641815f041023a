"""One generation of cells: all that an ingest makes but the manifest, inside its work folder.

1. Pass 1 (`align_pass`), a task per slice of a source (per source, if it can only be decoded
   whole): decode, check, align to the panel, drop poor cells, give each cell its place in the
   shuffle, and spool the cells in that order.
2. Look for cells that occur more than once, or are in the store (`duplicates`), a task per range
   of hashes.
3. Pass 2 (`write_pass`), a task per partition: gather its cells from all spools, write one AnnData
   part and its record.
4. Number the partitions, and write what became of each source.
"""

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.align_pass import Tally, align_sources, load_places, save_places
from datastore.duplicates import SharedCells, find_duplicates
from datastore.gene_tables import GeneTables
from datastore.genes import GenePanel, match_genes, measured_genes
from datastore.harmonize import Harmonization, write_report
from datastore.plan import Plan
from datastore.scanning import or_broken, usable
from datastore.sources import Source
from datastore.store import RECORDS, CellStore, generation_folder, record_path
from datastore.store_writing import write_measured
from datastore.workers import Compute
from datastore.write_pass import WrittenPart, part_folder, part_record, write_partitions

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Generation:
    """What the manifest says of a generation.

    Attributes:
        partitions: Cells of each partition.
        num_counts: Stored counts of all.
        lines: What became of each source.
    """

    partitions: list[int]
    num_counts: int
    lines: list[dict[str, Any]]


@dataclass(frozen=True)
class _Matched:
    """The genes of all sources against the panel; where they are in it, `align_pass` has on disk.

    Attributes:
        measured: Bits that say which panel genes each source measured.
        lines: What became of its gene names.
    """

    measured: list[NDArray[np.uint8]]
    lines: list[Harmonization]


def write_generation(
    work: Path,
    plan: Plan,
    panel: GenePanel,
    tables: GeneTables,
    columns: Sequence[str],
    compute: Compute,
    store: CellStore | None = None,
) -> Generation:
    """Write partitions, records and reports below `work/store`; what is there already stays.

    Args:
        work: Folder of the ingest.
        plan: Which cells go where.
        panel: The genes, G.
        tables: What foreign gene names stand for.
        columns: Columns of obs besides source and row.
        compute: Where tasks run.
        store: Store that they are appended to.

    Raises:
        BrokenSources: If some turn out to be unusable, after all have been looked at.
        ValueError: If no cell is left.
    """
    matched = _match_all(work, plan, panel, tables)
    tallies = align_sources(work, plan, len(panel), compute)
    if not sum(tally.kept for tally in tallies):
        raise ValueError(
            f"no cell has {plan.config.min_genes} expressed panel genes or more; lower min_genes "
            "(shallow or already filtered cells) or choose another panel"
        )
    shared = []
    if plan.config.duplicates != "keep":
        shared = find_duplicates(work, plan, compute, store)
    written = write_partitions(work, plan, panel, columns, compute)
    first = 0 if store is None else len(store.header.partitions)
    partitions = _collect(work, written, first)
    _write_reports(work / "store", plan, panel, matched, tallies, shared, tables)
    lines = _source_lines(plan, matched.lines, tallies, shared)
    _log_cells(plan, lines, shared)
    return Generation(partitions, sum(part.counts for part in written), lines)


def _match_all(work: Path, plan: Plan, panel: GenePanel, tables: GeneTables) -> _Matched:
    known: dict[tuple[str, ...], tuple[int, NDArray[np.uint8], Harmonization]] = {}

    def match(number: int, source: Source) -> tuple[NDArray[np.uint8], Harmonization]:
        if source.genes in known:  # many samples of one atlas have the same genes
            save_places(work, number, load_places(work, known[source.genes][0]))
        else:
            least = plan.config.panel.min_share_found
            places, line = match_genes(source.genes, panel, source.path, least, tables)
            save_places(work, number, places)
            bits = np.packbits(measured_genes(places, len(panel)))
            known[source.genes] = number, bits, line
        _, bits, line = known[source.genes]
        return bits, replace(line, source=source.name)

    numbered = enumerate(plan.sources)
    matches = usable([or_broken(source.path, match, number, source) for number, source in numbered])
    return _Matched([bits for bits, _ in matches], [line for _, line in matches])


def _collect(work: Path, written: Sequence[WrittenPart], first: int) -> list[int]:
    """Give the parts that hold cells consecutive numbers; return the cells of each."""
    folder = work / "store"
    (folder / RECORDS).mkdir(parents=True, exist_ok=True)
    filled = [part for part in written if part.cells]
    for place, part in enumerate(filled, first):
        for made, target in (
            (part_folder(work, part.number), folder / f"dataset_{place}"),
            (part_record(work, part.number), record_path(folder, place)),
        ):
            if made.exists():
                made.rename(target)
    return [part.cells for part in filled]


def _write_reports(
    folder: Path,
    plan: Plan,
    panel: GenePanel,
    matched: _Matched,
    tallies: Sequence[Tally],
    shared: Sequence[SharedCells],
    tables: GeneTables,
) -> None:
    write_measured(folder, np.stack(matched.measured), plan.generation)
    write_report(
        generation_folder(folder, plan.generation),
        matched.lines,
        [tally.share_on_panel for tally in tallies],
        tables,
        [
            {
                "empty_cells": tally.empty,
                "poor_cells": tally.poor,
                "recovered_cells": tally.recovered,
            }
            for tally in tallies
        ],
        [asdict(cells) for cells in shared],
    )


def _source_lines(
    plan: Plan,
    lines: Sequence[Harmonization],
    tallies: Sequence[Tally],
    shared: Sequence[SharedCells],
) -> list[dict[str, Any]]:
    """What the manifest keeps of each source."""
    kept = []
    for source, line, tally in zip(plan.sources, lines, tallies, strict=True):
        repeated = sum(cells.cells for cells in shared if cells.source == source.name)
        dropped = repeated if plan.config.duplicates == "drop" else 0
        kept.append(
            {
                "name": source.name,
                "generation": plan.generation,
                "sha256": source.sha256,
                "cells": source.num_cells,
                "cells_kept": tally.kept - dropped,
                "cells_empty": tally.empty,
                "cells_poor": tally.poor,
                "cells_repeated": repeated,
                "cells_recovered": tally.recovered,
                "panel_genes_found": line.panel_genes_found,
                "genes": line.genes_in_source,
                "duplicate_genes_summed": line.duplicates_summed,
            }
        )
    return kept


def _log_cells(plan: Plan, lines: Sequence[dict[str, Any]], shared: Sequence[SharedCells]) -> None:
    for line in lines:
        log.info(
            "%s: %d of %d cells kept; %d have no panel gene, %d fewer than %d",
            *(line["name"], line["cells_kept"], line["cells"]),
            *(line["cells_empty"], line["cells_poor"], plan.config.min_genes),
        )
        if line["cells_recovered"]:
            log.info(
                "%s: the counts of %d cells were computed back from normalised expression",
                *(line["name"], line["cells_recovered"]),
            )
    drops = plan.config.duplicates == "drop"
    for cells in shared:
        log.warning(
            "%d cells of %s have the counts of earlier cells of %s: %s",
            *(cells.cells, cells.source, cells.first),
            "dropped" if drops else "kept; --duplicates drop leaves them out",
        )
