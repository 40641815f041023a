"""The panel of a new store: read from a file, or made of its sources' genes."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from datastore.gene_tables import GeneTables
from datastore.genes import GenePanel, align_counts, match_genes, panel_of_sources, read_panel
from datastore.harmonize import species_of
from datastore.plan import Plan, Slice
from datastore.scanning import or_broken, usable
from datastore.sources import Source, open_source
from datastore.workers import Compute


def choose_panel(plan: Plan, tables: GeneTables, compute: Compute) -> GenePanel:
    """Read the panel, or make it: the genes of enough sources, or those that rank highest.

    Raises:
        ValueError: If no panel can be made.
        BrokenSources: If some sources mix species or, where genes have to be ranked, hold no raw
            counts.
    """
    config = plan.config.panel
    if config.file is not None:
        return read_panel(Path(config.file))
    named = [(source.path, source.genes) for source in plan.sources]
    # One that mixes species can be left out; sources of one species each, but not the same, cannot.
    usable([or_broken(path, species_of, genes, path, tables) for path, genes in named])
    everything = panel_of_sources(named, tables, config.min_source_share)
    if config.size is None or config.size >= len(everything):
        return everything
    detected, total, squares = _moments(plan, everything, tables, compute)
    rank = detected if config.rank_by == "detection" else squares - total**2 / plan.num_cells
    best = np.argsort(-rank, kind="stable")[: config.size]
    return GenePanel(tuple(everything.names[place] for place in np.sort(best)))


def _moments(
    plan: Plan, panel: GenePanel, tables: GeneTables, compute: Compute
) -> NDArray[np.float64]:
    """Cells that express each gene, and the sums of log1p(CP10k) and of its square; (3, genes)."""
    places = [match_genes(s.genes, panel, s.path, 0.0, tables)[0] for s in plan.sources]
    tasks = []
    for parts in plan.read_together:
        number = parts[0].source
        source = replace(plan.sources[number], genes=())
        tasks.append(
            (or_broken, source.path, _moments_of, source, parts, places[number], len(panel))
        )
    return np.asarray(np.sum(usable(compute("genes", tasks)), axis=0), np.float64)


def _moments_of(
    source: Source, parts: Sequence[Slice], places: NDArray[np.int64], num_genes: int
) -> NDArray[np.float64]:
    moments = np.zeros((3, num_genes))
    with open_source(source) as cells:
        for part in parts:
            matrix = align_counts(cells.counts(part.start, part.stop), places, num_genes)
            library = np.asarray(matrix.sum(axis=1), np.float64).ravel()
            rows = np.repeat(np.arange(matrix.shape[0]), np.diff(matrix.indptr))
            values = np.log1p(matrix.data / library[rows] * 1e4)
            for moment, weights in zip(
                moments, (np.ones(len(values)), values, values**2), strict=True
            ):
                moment += np.bincount(matrix.indices, weights=weights, minlength=num_genes)
    return moments
