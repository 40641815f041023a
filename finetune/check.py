"""What a file of cells holds, and what annotation will make of it, before any cell is labelled.

`inspect` looks at gene names and at some cells, in seconds; annotation begins with it. `check` also
reads every cell once.
"""

import hashlib
import logging
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import PanelConfig
from datastore.gene_tables import NO_TABLES, GeneTables, is_ensembl_id, read_tables
from datastore.genes import GenePanel, align_counts, match_genes
from datastore.harmonize import Harmonization, species_of
from finetune.annotation_config import GeneTablesConfig
from finetune.query import Query, open_query

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """Facts of a file, in the words of the report.

    Attributes:
        file: Its name.
        format: What it is.
        cells: Rows.
        genes: Columns.
        scales: What each place that was looked at holds.
        counts_from: Where the counts are taken from; none if there are none.
        gene_names: `symbols`, `Ensembl ids`, or both.
        species: What the names look like.
        repeated_gene_names: Columns beyond the first of their name.
        panel: Cover of the model's genes, if a model was named.
        plan: What annotation will do, a sentence each.
        problems: Why annotation will refuse the file, a sentence each.
        whole: What a pass over all cells found.
    """

    file: str
    format: str
    cells: int
    genes: int
    scales: Mapping[str, str]
    counts_from: str | None
    gene_names: str
    species: str
    repeated_gene_names: int
    panel: Mapping[str, Any] = field(default_factory=dict)
    plan: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()
    whole: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return the facts as JSON holds them, those that are known."""
        facts = asdict(self)
        return {name: value for name, value in facts.items() if value not in ({}, ())}


@dataclass(frozen=True)
class Alignment:
    """How the columns of a query become the genes of a panel."""

    panel: GenePanel
    places: NDArray[np.int64]
    line: Harmonization

    def counts(self, query: Query, start: int, stop: int) -> sparse.csr_matrix:
        """Read rows [start, stop) as checked counts in panel order, CSR (B, G)."""
        return align_counts(query.counts(start, stop), self.places, len(self.panel))


def gene_tables(config: GeneTablesConfig) -> GeneTables:
    """Read the tables that translate gene names; as `datastore.gene_tables.read_tables`."""
    if config == GeneTablesConfig():
        return NO_TABLES
    return read_tables(
        PanelConfig(hgnc=config.hgnc, ensembl=config.ensembl, orthologues=config.orthologues)
    )


def align(
    query: Query, panel: GenePanel, min_share_found: float, tables: GeneTables = NO_TABLES
) -> Alignment:
    """Find the panel's genes among a query's.

    Raises:
        ValueError: If too few are found, or the file mixes species; with the likely cause.
    """
    places, line = match_genes(list(query.genes), panel, query.where, min_share_found, tables)
    return Alignment(panel, places, line)


def inspect(
    query: Query,
    panel: GenePanel | None = None,
    min_share_found: float = 0.3,
    tables: GeneTables = NO_TABLES,
) -> Inspection:
    """Describe an open query and say what annotation will do with it. Refuses nothing."""
    scale = query.scales.get(query.place)
    has_counts = query.recovers or (scale is not None and scale.is_counts)
    problems = [] if has_counts else [_scale_problem(query)]
    verb = "computed back" if query.recovers else "taken"
    plan = [f"counts are {verb} from {query.place}"] if has_counts else []
    species, cover = "unknown", {}
    try:
        species = species_of(query.genes, query.where, tables) or "unknown"
        if panel is not None:
            alignment = align(query, panel, min_share_found, tables)
            cover = _cover(alignment.line)
            plan += _gene_plan(alignment.line)
    except ValueError as refusal:
        problems.append(str(refusal))
    return Inspection(
        file=query.where,
        format=query.kind,
        cells=query.num_cells,
        genes=len(query.genes),
        scales={place: scale.name for place, scale in query.scales.items()},
        counts_from=query.place if has_counts else None,
        gene_names=_kind_of_names(query.genes),
        species=species,
        repeated_gene_names=len(query.genes) - len(set(query.genes)),
        panel=cover,
        plan=tuple(plan),
        problems=tuple(problems),
    )


def check(
    path: str | Path,
    panel: GenePanel | None = None,
    *,
    layer: str | None = None,
    recover_counts: bool = False,
    min_share_found: float = 0.3,
    tables: GeneTables = NO_TABLES,
) -> Inspection:
    """Describe a file, and read all its cells once: empty ones, repeated ones, repeated names.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read as cells at all. What annotation would refuse for another
            reason stands in `problems`.
    """
    with open_query(path, layer, recover_counts=recover_counts) as query:
        found = inspect(query, panel, min_share_found, tables)
        facts = asdict(found)
        alignment = None
        if panel is not None and found.panel:
            alignment = align(query, panel, min_share_found, tables)
        try:
            facts["whole"] = _read_all(query, alignment)
        except ValueError as refusal:  # a value further down that is no count
            if not found.problems:
                facts["problems"] = (str(refusal),)
        return Inspection(**facts)


def log_inspection(found: Inspection) -> None:
    """Say where counts and genes come from."""
    for sentence in found.plan:
        log.info("%s: %s", found.file, sentence)


def _read_all(query: Query, alignment: Alignment | None) -> dict[str, Any]:
    empty = without_panel = 0
    digests: list[NDArray[np.uint64]] = []
    names: Counter[str] = Counter()
    for start, stop in query.slices():
        counts = query.counts(start, stop)
        counts.sum_duplicates()
        counts.eliminate_zeros()
        filled = np.diff(counts.indptr) > 0
        empty += int((~filled).sum())
        digests.append(_row_digests(counts)[filled])
        names.update(map(str, query.names(start, stop)))
        if alignment is not None:
            aligned = align_counts(counts, alignment.places, len(alignment.panel))
            without_panel += int((np.diff(aligned.indptr) == 0).sum())
    different = np.concatenate([np.empty(0, np.uint64), *digests])
    facts = {
        "empty_cells": empty,
        "cells_with_the_counts_of_another": len(different) - len(np.unique(different)),
        "repeated_cell_names": sum(names.values()) - len(names),
    }
    return facts if alignment is None else {**facts, "cells_without_panel_genes": without_panel}


def _row_digests(counts: sparse.csr_matrix) -> NDArray[np.uint64]:
    """Hash each row's genes and counts, (B,); equal rows have equal hashes."""
    genes, values = counts.indices.astype(np.int32), counts.data.astype(np.int64)
    digests = np.empty(counts.shape[0], np.uint64)
    for row in range(counts.shape[0]):
        part = slice(counts.indptr[row], counts.indptr[row + 1])
        digest = hashlib.blake2b(genes[part].tobytes(), digest_size=8)
        digest.update(values[part].tobytes())
        digests[row] = int.from_bytes(digest.digest(), "little")
    return digests


def _kind_of_names(genes: tuple[str, ...]) -> str:
    share = float(np.mean([is_ensembl_id(gene) for gene in genes]))
    if 0.05 < share < 0.95:
        return f"Ensembl ids ({share:.0%}) and symbols"
    return "Ensembl ids" if share > 0.5 else "symbols"


def _scale_problem(query: Query) -> str:
    found = "; ".join(f"{place} holds {scale.name}" for place, scale in query.scales.items())
    return (
        f"{query.where} has no raw counts where they were looked for ({found}); name the layer "
        "that holds them (--layer), or compute them back (--recover_counts true)"
    )


def _cover(line: Harmonization) -> dict[str, Any]:
    return {
        "genes_of_the_model": line.panel_genes,
        "found": line.panel_genes_found,
        "share_found": round(line.share_found, 4),
        "found_under_another_name": line.renamed.count,
        "summed_into_one": line.summed.count,
        "not_the_model's": line.dropped.count,
        "ambiguous": line.ambiguous.count,
    }


def _gene_plan(line: Harmonization) -> list[str]:
    plan = [
        f"{line.panel_genes_found:,} of the model's {line.panel_genes:,} genes are there "
        f"({line.share_found:.1%}); the others count as not expressed"
    ]
    for names, what in (
        (line.renamed, "columns are taken for genes of another name"),
        (line.summed, "columns are added to another of the same gene"),
        (line.ambiguous, "columns may be one of two genes and are left out"),
    ):
        if names.count:
            more = ", …" if names.count > 3 else ""
            plan.append(f"{names.count:,} {what} ({', '.join(names.first[:3])}{more})")
    return plan
