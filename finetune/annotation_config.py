"""Knobs of annotation: what is labelled by which model, and what is written."""

import re
from dataclasses import dataclass, field
from typing import Literal

from datastore.worker_config import SlurmConfig


@dataclass(frozen=True, kw_only=True)
class GeneTablesConfig:
    """Tables that translate gene names to the model's; as those that a store is built with."""

    hgnc: str | None = None
    """HGNC complete set, tab-separated, plain or gzipped: previous symbols, aliases and Ensembl ids
    → approved symbols."""
    ensembl: str | None = None
    """Text file with an Ensembl gene id, a tab and a symbol per line, for ids not in `hgnc`."""
    orthologues: str | None = None
    """CSV of human symbol,mouse symbol: mouse cells are labelled by its one-to-one pairs."""


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Label new cells with a fine-tuned classifier."""

    model: str
    """Export of a classifier: a folder, or `models:/name@alias` in the registry."""
    input: str
    """Raw counts: `.h5ad`, AnnData Zarr, 10x `.h5` or mtx folder, `.loom`, `.RData`, a table, or a
    cell store (folder or address); never changed."""
    output: str
    """`.h5ad` to write: a copy of the input with labels. A CSV with the labels is written beside
    it. Of a store it has the labels without the counts."""
    layer: str | None = None
    """Layer that holds the counts, or `raw`; none takes the first of `X`, `layers["counts"]` and
    `raw` that holds counts."""
    recover_counts: bool = False
    """Compute counts back from log-normalised expression where that can be proved."""
    panel: GeneTablesConfig = field(default_factory=GeneTablesConfig)
    min_share_found: float = 0.3
    """Refuse a file that measured less than this share of the model's genes."""
    key_added: str = "scbert"
    """Name that everything added begins with: `obs["scbert_label"]`, `obsm["X_scbert"]`, …"""
    majority_over: str | None = None
    """Column of obs, such as a clustering: each of its groups also gets its commonest label."""
    novelty_threshold: float | None = None
    """Call a cell novel if its best class has a lower probability; none takes the model's rule."""
    batch_size: int | Literal["auto"] = "auto"
    """Cells per forward pass; the result does not depend on it. `auto` goes by the memory."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Numbers that the encoder calculates with: `bfloat16` is several times as fast where the
    processor has it, and moves probabilities in the third digit."""
    tracking_uri: str | None = None
    """Registry to pull from; none takes MLFLOW_TRACKING_URI, else ./mlflow.db (SQLite)."""

    reasons: bool = False
    """Also say which genes spoke for each type: in `varm` and `uns`, as a CSV and as a heat map."""
    markers: str | None = None
    """Table of marker genes (PanglaoDB's, or columns `gene` and `cell_type`), tab-separated, whose
    overlap with the top genes is told; implies `reasons`."""
    reasons_cells: int = 50
    """Cells of each type that reasons are averaged over."""
    part: int | None = None
    """Label only this partition of a store, numbered from 0, as one of many tasks do; the same
    command without it does what is missing and writes the output."""
    workers: int | None = 1
    """Partitions of a store that are labelled at the same time on this machine."""
    scheduler: str | None = None
    """Address of a running Dask cluster, to whose workers the partitions of a store go."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if self.reasons_cells < 1:
            raise ValueError(f"reasons_cells is {self.reasons_cells}; give 1 or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; give 1 or more")
        if isinstance(self.batch_size, int) and self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more, or auto")
        if not 0 <= self.min_share_found <= 1:
            raise ValueError(f"min_share_found is {self.min_share_found}; give a share from 0 to 1")
        if self.novelty_threshold is not None and not 0 <= self.novelty_threshold <= 1:
            raise ValueError(
                f"novelty_threshold is {self.novelty_threshold}; give a probability from 0 to 1"
            )
        if not re.fullmatch(r"[A-Za-z]\w*", self.key_added):
            raise ValueError(
                f"key_added is {self.key_added!r}; give a name of letters, digits and underscores"
            )
