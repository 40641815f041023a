"""What a fine-tuning begins with: labelled cells on two sides of a split, and an encoder.

A test file, one fold of several, or a share of each type is the test side. Everything that is
chosen (genes of a fresh panel, too) is chosen on the other side.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import anndata
import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from datastore.config import BinningConfig
from datastore.gene_tables import GeneTables
from datastore.genes import GenePanel, read_panel
from datastore.harmonize import translate
from finetune.cells import labels_of, panel_counts, read_adata
from finetune.check import gene_tables
from finetune.config import FinetuneConfig, FreshConfig, LabelledConfig
from finetune.dataset import stratified_folds, stratified_split
from finetune.expression import counts_per_10k, variable_genes
from finetune.query import Query, adata_query
from finetune.registry import resolve_model
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.export import read_export

FOLD_SEED = 0
"""Seed of the folds: they stay the same when a training is repeated with other seeds."""


@dataclass(frozen=True)
class Labelled:
    """Counts in panel order, CSR (N, G), and the cell types, (N,)."""

    counts: sparse.csr_matrix
    labels: NDArray[np.str_]

    def take(self, rows: NDArray[np.int64]) -> "Labelled":
        """Some of the cells."""
        return Labelled(self.counts[rows], self.labels[rows])


@dataclass(frozen=True)
class Start:
    """The encoder to begin with, its genes, and where it comes from."""

    encoder: ExpressionEncoder
    panel: GenePanel
    lineage: str
    store_id: str | None = None
    """Cell store that the encoder was pretrained on, if it says so."""


@dataclass(frozen=True)
class Sides:
    """Both sides of a split, and the start.

    Attributes:
        learn: Cells to learn from, validation cells among them.
        test: Held-out cells.
        start: Encoder and panel.
    """

    learn: Labelled
    test: Labelled
    start: Start


def read_sides(config: FinetuneConfig) -> Sides:
    """Read the labelled files of a configuration, and its encoder.

    Raises:
        FileNotFoundError: If a file or the encoder does not exist.
        ValueError: If labels or counts are not usable, or the genes are not the encoder's.
    """
    learn = read_adata(config.data.path, config.data.layer)
    if config.data.test_path is None:
        return sides_of(learn, config)
    return sides_of(learn, config, read_adata(config.data.test_path, config.data.layer))


def sides_of(
    adata: anndata.AnnData, config: FinetuneConfig, test: anndata.AnnData | None = None
) -> Sides:
    """Split cells in memory, and bring them into the order of the encoder's panel.

    Args:
        adata: Labelled cells with raw counts.
        config: Says how, and which encoder.
        test: The test side; none splits `adata`.
    """
    data = config.data
    labels = labels_of(adata, data.label_key, data.path)
    rows = np.arange(len(labels))
    test_rows = rows[:0]
    if test is None:
        rows, test_rows = split_rows(labels, data, config.seed)
    tables = gene_tables(data.panel)
    query = adata_query(adata, data.layer, data.path)
    start = _start(query, rows, config, tables)
    counts = panel_counts(query, start.panel, data.min_share_found, tables)
    whole = Labelled(counts, labels)
    if test is None:
        return Sides(whole.take(rows), whole.take(test_rows), start)
    where = data.test_path or "the test cells"
    held_out = labels_of(test, data.label_key, where)
    query = adata_query(test, data.layer, where)
    counts = panel_counts(query, start.panel, data.min_share_found, tables)
    return Sides(whole, Labelled(counts, held_out), start)


def split_rows(
    labels: NDArray[np.str_], data: LabelledConfig, seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to learn from and rows to test on: a fold, or a share of each type."""
    if data.num_folds is None:
        return stratified_split(labels, data.test_share, seed)
    is_test = stratified_folds(labels, data.num_folds, FOLD_SEED) == data.fold
    if not is_test.any():
        raise ValueError(
            f"data.fold {data.fold} of {data.num_folds} has none of the {len(labels)} cells; "
            "choose fewer folds"
        )
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def fresh_start(panel: GenePanel, config: FreshConfig, seed: int) -> Start:
    """An encoder with random weights."""
    encoder = build_encoder(config.encoder, BinningConfig(), len(panel), seed)
    return Start(encoder.eval(), panel, "none")


def file_digest(path: str | Path) -> str | None:
    """SHA-256 of a file; none where there is no file, as of cells in memory."""
    if not Path(path).is_file():
        return None
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _start(
    query: Query, rows: NDArray[np.int64], config: FinetuneConfig, tables: GeneTables
) -> Start:
    if config.encoder != "none":
        pretrained = resolve_model(config.encoder, uri=config.tracking.uri)
        export = read_export(pretrained.path, "encoder")
        store_id = (export.metadata.get("provenance") or {}).get("store_id")
        lineage = pretrained.uri or str(pretrained.path)
        return Start(export.encoder(), export.panel, lineage, store_id)
    if config.fresh.panel is not None:
        return fresh_start(read_panel(Path(config.fresh.panel)), config.fresh, config.seed)
    genes = translate(query.genes, query.where, tables).genes
    everything = GenePanel(tuple(dict.fromkeys(gene for gene in genes if gene)))
    counts = panel_counts(query, everything, tables=tables)[rows]
    chosen = variable_genes(counts_per_10k(counts), config.fresh.num_genes)
    names = tuple(everything.names[place] for place in chosen)
    return fresh_start(GenePanel(names), config.fresh, config.seed)
