"""Knobs of the cell store: how expression becomes tokens, how a store is built, how it is read."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class BinningConfig:
    """How counts become tokens (scBERT, Methods: `floor(log2(1 + CP10k))`, cut at the top bin)."""

    target_sum: float = 10_000.0
    """Counts per cell after scaling; the library size is taken after alignment to the panel."""
    top_bin: int = 5
    """Highest expression bin; tokens are 0 (not expressed) to this, the mask token is one more."""

    def __post_init__(self) -> None:
        if not self.target_sum > 0:
            raise ValueError(f"binning.target_sum is {self.target_sum}; give a positive number")
        if not 1 <= self.top_bin <= 30:
            raise ValueError(f"binning.top_bin is {self.top_bin}; give a whole number from 1 to 30")

    @property
    def mask_token(self) -> int:
        """Token that stands for a hidden gene."""
        return self.top_bin + 1

    @property
    def num_tokens(self) -> int:
        """Size of the vocabulary: bins 0 to `top_bin`, and the mask token."""
        return self.top_bin + 2


@dataclass(frozen=True, kw_only=True)
class PanelConfig:
    """Which genes the store knows, in which order."""

    file: str | None = None
    """Text file with one gene name per line; without it the panel is made from the sources."""
    min_source_share: float = 0.0
    """Keep genes that at least this share of the sources measured when the panel is made from them:
    0 keeps all (union), 1 only those of every source (intersection)."""
    size: int | None = None
    """Keep only this many genes when the panel is made from the sources; none keeps all."""
    rank_by: Literal["variance", "detection"] = "variance"
    """What the kept genes rank highest in: variance of log1p(CP10k), or share of cells."""
    min_share_found: float = 0.3
    """Refuse a source that measured less than this share of the panel, between 0 and 1."""
    hgnc: str | None = None
    """HGNC complete set, tab-separated, plain or gzipped: previous symbols, aliases and Ensembl ids
    → approved symbols."""
    ensembl: str | None = None
    """Text file with an Ensembl gene id, a tab and a symbol per line, for ids not in `hgnc`."""
    orthologues: str | None = None
    """CSV of human symbol,mouse symbol: mouse sources become human by its one-to-one pairs."""

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 2:
            raise ValueError(f"panel.size is {self.size}; give 2 genes or more")
        if self.file is not None and self.size is not None:
            raise ValueError("panel.file and panel.size exclude each other; shorten the file")
        if self.file is not None and self.min_source_share:
            raise ValueError("panel.file and panel.min_source_share exclude each other")
        for name in ("min_share_found", "min_source_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"panel.{name} is {getattr(self, name)}; give a share from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class StoreConfig:
    """How a cell store is built from raw files."""

    sources: list[str]
    """Raw files with integer counts: `.h5ad`, AnnData `.zarr`, 10x `.h5` and mtx folders, `.loom`,
    PanglaoDB `.RData`, `.csv` and `.tsv`. Globs and folders are expanded; so are tables of files
    (`.csv`, `.tsv` with a column `path`), whose other columns land in obs."""
    output: str
    """Folder of the new store; it appears only when it is whole."""
    layer: str | None = None
    """Layer that holds the counts, or `raw`; none takes `X`. Formats without layers ignore it."""
    orientation: Literal["auto", "genes_x_cells", "cells_x_genes"] = "auto"
    """What rows × columns of `.csv` and `.tsv` are; `auto` looks for gene names in both."""
    obs_columns: list[str] = field(default_factory=list)
    """Columns of the sources' obs to carry along as categories; missing where a source has none."""
    skip_broken: bool = False
    """Go on without sources that cannot be used; the manifest lists them."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    min_genes: int = 200
    """Drop cells with fewer expressed panel genes than this (scBERT, Methods)."""
    seed: int = 0
    """Seed of the one shuffle that all cells get when they are written."""
    cells_per_partition: int = 65_536
    """About how many cells one AnnData part of the store holds."""
    cells_per_shard: int = 16_384
    """About how many cells share one file."""
    cells_per_chunk: int = 64
    """About how many cells are decoded at once."""
    cells_per_slice: int = 8_192
    """Cells of a source that one task holds in memory; with `workers`, the memory bound."""
    workers: int | None = None
    """Threads that ingest at once; none takes one per core."""
    scheduler: str | None = None
    """Address of a running Dask cluster (`tcp://host:8786`); none ingests with local threads."""
    overwrite: bool = False
    """Replace a store that stands at `output` already, once the new one is whole."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one raw file")
        for name in self.obs_columns:
            if name in ("source", "source_row") or self.obs_columns.count(name) > 1:
                raise ValueError(
                    f"obs_columns has {name!r} twice, or as the store's own; remove it"
                )
        if self.min_genes < 1:
            raise ValueError(f"min_genes is {self.min_genes}; give 1 or more")
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers is {self.workers}; give 1 or more")
        sizes = (
            self.cells_per_chunk,
            self.cells_per_shard,
            self.cells_per_partition,
            self.cells_per_slice,
        )
        if min(sizes) < 1:
            raise ValueError("cells_per_* must all be 1 or more")


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """In which order training meets the cells. Part of a checkpoint: do not change it midway."""

    lanes: int = 64
    """Streams that the epoch is dealt from; the highest number of ranks that read only their own
    part of the store."""
    block: int = 512
    """Cells that lie together in the store and are read together."""
    window: int = 512
    """Cells of a lane that are shuffled among themselves."""

    def __post_init__(self) -> None:
        for name in ("lanes", "block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"order.{name} is {getattr(self, name)}; give 1 or more")
