"""Reasons for the labels of a query: from some cells of each type, in the scverse's places."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import sparse

from datastore.genes import GenePanel
from datastore.store import write_json
from finetune.annotation_config import GeneTablesConfig
from finetune.annotator import Annotator, load_annotator
from finetune.attribution import attribute
from finetune.check import Alignment, align, gene_tables
from finetune.classifier import CellClassifier
from finetune.labelled import CellLabels, KeptMatrices, collect_labels
from finetune.markers import read_markers
from finetune.query import Query, adata_query
from finetune.reasons import (
    CELLS_PER_TYPE,
    TypeReasons,
    describe_deletions,
    rows_per_type,
    type_reasons,
)

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Explained:
    """Reasons and where they go.

    Attributes:
        reasons: Views by type and the deletion test.
        table: Top genes, a row each.
        sentence: What the deletion test found.
        matrices: By name for `varm`: (genes of the query, C); NaN where the model lacks the gene.
    """

    reasons: TypeReasons
    table: pd.DataFrame
    sentence: str
    matrices: Mapping[str, NDArray[np.float32]]

    def for_uns(self) -> dict[str, Any]:
        """Top genes and the deletion test, for `uns`."""
        deletions = pd.DataFrame([vars(deletion) for deletion in self.reasons.deletions])
        return {
            "top_genes": self.table,
            "deletion_test": deletions.astype({"removed": object}),
            "deletion_sentence": self.sentence,
        }


def explain(
    annotator: Annotator,
    query: Query,
    alignment: Alignment,
    labels: CellLabels,
    *,
    markers: str | Path | None = None,
    cells_per_type: int = CELLS_PER_TYPE,
) -> Explained:
    """Find what genes did for the labels of a query, from some cells of each type.

    Args:
        annotator: The classifier.
        query: The cells.
        alignment: How their genes become the model's.
        labels: The labels that they got.
        markers: Table of marker genes.
        cells_per_type: Cells of each type, chosen at random.
    """
    known = None if markers is None else read_markers(markers)
    rows = rows_per_type(labels.codes, len(labels.labels), cells_per_type)
    log.info("reasons from %d cells", len(rows))
    counts = _read_rows(query, alignment, rows)
    reasons = type_reasons(annotator.model, annotator.export.panel, counts)
    sentence = describe_deletions(reasons.deletions, reasons.num_removed)
    log.info("%s", sentence)
    views = {"reasons": reasons.specific("logit"), "attention": reasons.views["attention"]}
    return Explained(
        reasons=reasons,
        table=reasons.top_genes(markers=known),
        sentence=sentence,
        matrices={name: _by_column(view, alignment) for name, view in views.items()},
    )


def gene_attention(
    adata: anndata.AnnData,
    model: str | Path,
    *,
    layer: str | None = None,
    key_added: str = "scbert",
    copy: bool = False,
    per_cell: bool = False,
    markers: str | Path | None = None,
    cells_per_type: int = CELLS_PER_TYPE,
    min_share_found: float = 0.3,
    panel: GeneTablesConfig | None = None,
    tracking_uri: str | None = None,
    device: str | torch.device | None = None,
) -> anndata.AnnData | None:
    """Say which genes speak for the type of cells: attention, gradients, linear part.

    Adds `varm["scbert_reasons"]` (what a gene adds to the logit of each type, less what it adds to
    those of the others), `varm["scbert_attention"]` (attention received, 1 is uniform), both
    (genes, C) in the order of `uns["scbert_reasons"]["labels"]`, and there the top genes of each
    type and the deletion test.

    Args:
        adata: Cells with raw counts.
        model: Export of a classifier: a folder, or `models:/name@alias`.
        layer: Layer with the counts, or `raw` (which leaves `varm` alone: it has other genes).
        key_added: What everything added begins with.
        copy: Return a copy and leave `adata` as it is.
        per_cell: Also add `obsm["scbert_attention"]`, sparse (N, G), for every cell, its columns
            the genes in `uns["scbert_reasons"]["genes"]`.
        markers: Table of marker genes; the top genes' overlap with it is added to the table.
        cells_per_type: Cells of each type that the means are taken over.
        min_share_found: Refuse cells that measured less than this share of the model's genes.
        panel: Tables that translate gene names.
        tracking_uri: Registry to pull from.
        device: Where to compute; none takes a GPU if there is one.

    Returns:
        The copy, or None if `adata` itself was changed.

    Raises:
        FileNotFoundError: If the model or the table of markers does not exist.
        ValueError: If cells, model or markers are unfit, as `finetune.annotate`.
    """
    query = adata_query(adata, layer)
    annotator = load_annotator(
        str(model),
        torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu")),
        tracking_uri=tracking_uri,
    )
    tables = gene_tables(panel or GeneTablesConfig())
    alignment = align(query, annotator.export.panel, min_share_found, tables)
    slices = annotator.slices(query, alignment)
    labels = collect_labels(slices, query, annotator.model.labels, KeptMatrices())
    found = explain(
        annotator, query, alignment, labels, markers=markers, cells_per_type=cells_per_type
    )
    target = adata.copy() if copy else adata
    if len(query.genes) == adata.n_vars:
        for name, matrix in found.matrices.items():
            target.varm[f"{key_added}_{name}"] = matrix
    target.uns[f"{key_added}_reasons"] = {
        **found.for_uns(),
        "labels": np.array(labels.labels, object),
        "genes": np.array(alignment.panel.names, object),
    }
    if per_cell:
        pieces = [
            sparse.csr_matrix(part.views["attention"])
            for start, stop in query.slices()
            for part in attribute(
                annotator.model,
                alignment.counts(query, start, stop),
                annotator.batch_size,
                views=("attention",),
            )
        ]
        target.obsm[f"{key_added}_attention"] = sparse.vstack(pieces, format="csr")
    return target if copy else None


def write_run_reasons(
    model: CellClassifier,
    panel: GenePanel,
    counts: sparse.csr_matrix,
    codes: NDArray[np.int64],
    folder: Path,
    *,
    cells_per_type: int,
) -> TypeReasons:
    """Write `reasons.json` of a fine-tuning run, for its page.

    Args:
        model: The classifier.
        panel: Its genes.
        counts: Raw counts of the held-out cells in panel order, (N, G).
        codes: The label that each got, (N,).
        folder: Folder of the run.
        cells_per_type: Cells of each type that are looked at.
    """
    rows = rows_per_type(codes.astype(np.int32), len(model.labels), cells_per_type)
    reasons = type_reasons(model, panel, counts[rows])
    sentence = describe_deletions(reasons.deletions, reasons.num_removed)
    log.info("%s", sentence)
    write_json(folder / "reasons.json", {**reasons.as_json(), "sentence": sentence})
    return reasons


def _read_rows(query: Query, alignment: Alignment, rows: NDArray[np.int64]) -> sparse.csr_matrix:
    """Counts of some rows, in panel order, read slice by slice."""
    pieces = []
    for start, stop in query.slices():
        wanted = rows[(rows >= start) & (rows < stop)] - start
        if len(wanted):
            pieces.append(alignment.counts(query, start, stop)[wanted])
    return sparse.vstack(pieces, format="csr")


def _by_column(view: NDArray[np.float32], alignment: Alignment) -> NDArray[np.float32]:
    """Values (C, G) of the panel as (genes of the query, C)."""
    columns = np.full((len(alignment.places), len(view)), np.nan, np.float32)
    known = alignment.places >= 0
    columns[known] = view[:, alignment.places[known]].T
    return columns
