"""Knobs of the cell store: how expression becomes tokens, how a store is built, how it is read."""

from dataclasses import dataclass, field
from typing import Final, Literal

from datastore.worker_config import ArrayConfig, SlurmConfig

Codec = Literal["fast", "archive"]
_OWN_NAMES: Final = ("source", "source_row", "_index", "zarr.json", ".", "..")


def may_be_column(name: str) -> bool:
    """Tell whether a column of obs may have this name: it becomes a folder in the store."""
    short = 0 < len(name.encode("utf-8", "replace")) <= 200
    return short and name not in _OWN_NAMES and "/" not in name and name.isprintable()


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
    """How a cell store is built from raw files, or grows by more of them."""

    sources: list[str]
    """Raw files with integer counts: `.h5ad`, AnnData `.zarr`, 10x `.h5` and mtx folders, `.loom`,
    PanglaoDB `.RData`, `.csv` and `.tsv`. Globs and folders are expanded; so are tables of files
    (`.csv`, `.tsv` with a column `path`), whose other columns land in obs."""
    output: str
    """Folder of the new store; it appears only when it is whole."""
    layer: str | None = None
    """Layer that holds the counts, or `raw`; none takes `X`. Formats without layers ignore it."""
    recover_counts: bool = False
    """Take sources of normalised expression, too (`log1p` of scaled counts and the like): compute
    their counts back where it can be proved that they are the counts, else refuse the source."""
    orientation: Literal["auto", "genes_x_cells", "cells_x_genes"] = "auto"
    """What rows × columns of `.csv` and `.tsv` are; `auto` looks for gene names in both."""
    obs_columns: list[str] = field(default_factory=list)
    """Columns of the sources' obs to carry along as categories; missing where a source has none."""
    skip_broken: bool = False
    """Go on without sources that cannot be used; the manifest lists them."""
    panel: PanelConfig = field(default_factory=PanelConfig)
    min_genes: int = 200
    """Drop cells with fewer expressed panel genes than this (scBERT, Methods)."""
    duplicates: Literal["report", "drop", "keep"] = "report"
    """Cells with the same counts as an earlier one of this ingest or of the store appended to: say
    how many each two sources share and keep them, drop all but the first, or do not look for
    them. Looking reads the store that is appended to once."""
    seed: int = 0
    """Seed of the one shuffle that all cells get when they are written. An appended generation is
    shuffled by the store's seed and its own number."""
    codec: Codec = "fast"
    """`fast` (lz4) for training, `archive` (zstd) for a store two thirds as large that is slower to
    write and read."""
    cells_per_partition: int = 32_768
    """How many cells one AnnData part of the store holds at most; all hold about equally many."""
    cells_per_shard: int = 16_384
    """About how many cells share one file."""
    cells_per_chunk: int = 64
    """About how many cells are decoded at once."""
    cells_per_slice: int = 8_192
    """Cells of a source that one task holds in memory. A worker holds one such slice or one
    partition (`cells_per_partition`), at about 4 bytes per expressed gene."""
    workers: int | None = None
    """Local workers that ingest at once; none takes one per core."""
    processes: bool | None = None
    """Whether several local workers are processes (true) or threads (false). Processes are faster
    once they have started, which takes about two seconds; none takes them from 64 MB of sources
    on."""
    scheduler: str | None = None
    """Address of a running Dask cluster (`tcp://host:8786`), best of workers with one thread each;
    none ingests with local workers."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)
    array: ArrayConfig = field(default_factory=ArrayConfig)
    overwrite: bool = False
    """Replace a store that stands at `output` already, once the new one is whole."""
    append: bool = False
    """Add the sources to the store at `output`, as a generation of its own: with the store's panel
    and seed, in new partitions. What is there already is not touched."""

    def __post_init__(self) -> None:
        if not self.sources:
            raise ValueError("sources is empty; name at least one raw file")
        for name in self.obs_columns:
            if not may_be_column(name) or self.obs_columns.count(name) > 1:
                raise ValueError(
                    f"obs_columns has {name!r}: twice, the store's own, or no name for a folder; "
                    "remove or rename it"
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
        if self.scheduler is not None and self.slurm.jobs:
            raise ValueError("scheduler and slurm.jobs exclude each other; give one of them")
        if self.array.tasks and (self.scheduler is not None or self.slurm.jobs):
            raise ValueError("tasks of an array work together; leave scheduler and slurm.jobs out")
        if self.append and self.overwrite:
            raise ValueError("append and overwrite exclude each other; give one of them")
        if self.append and (self.panel.size is not None or self.panel.min_source_share):
            raise ValueError(
                "append takes the store's panel; leave panel.size and panel.min_source_share out"
            )


@dataclass(frozen=True, kw_only=True)
class OrderConfig:
    """In which order training meets the cells. Part of a checkpoint: do not change it midway."""

    lanes: int = 64
    """Streams that the epoch is dealt from; the highest number of ranks that read only their own
    part of the store."""
    block: int = 2_048
    """Cells that lie together in the store and are read together; at most a lane's length."""
    window: int = 64
    """Cells of a lane that are shuffled among themselves, and fetched together: a window of each
    lane must be there before the first batch is. Powers of four are ordered quickest."""

    def __post_init__(self) -> None:
        for name in ("lanes", "block", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"order.{name} is {getattr(self, name)}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class SelectionConfig:
    """Which cells of a store to train on, and how often. Part of a checkpoint."""

    where: dict[str, list[str]] = field(default_factory=dict)
    """Columns of obs and the values that are wanted, such as `{species: [human]}`; a cell must
    match all columns. `(missing)` stands for no value. Nothing takes all cells."""
    split_by: Literal["cell", "source"] = "cell"
    """Whether single cells of every source are held out, or whole sources."""
    split_seed: int = 0
    """Which cells or sources are held out. They stay the same whatever else is chosen, and when the
    store grows."""
    weight_by: str | None = None
    """Column of obs whose values are groups with weights; none takes each cell once an epoch."""
    weights: dict[str, float] = field(default_factory=dict)
    """How many times as often cells of a group are seen, such as `{Blood: 2.0}`; 1 where nothing is
    said, 0 leaves a group out."""
    balance: float = 0.0
    """0 leaves the groups as large as they are, 1 gives all the same share (before `weights`):
    shares grow with the number of cells to the power of 1 − balance."""

    def __post_init__(self) -> None:
        for column, values in self.where.items():
            if not values:
                raise ValueError(f"data.where names no value of {column!r}; give one or more")
        if self.weight_by is None and (self.weights or self.balance):
            raise ValueError(
                "data.weights and data.balance need groups; name a column with data.weight_by"
            )
        if not 0 <= self.balance <= 1:
            raise ValueError(f"data.balance is {self.balance}; give a number from 0 to 1")
        for group, weight in self.weights.items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"data.weights gives {group!r} {weight}; give 0 or more")


@dataclass(frozen=True, kw_only=True)
class GeneVectorsConfig:
    """Gene vectors for a panel: imported by gene name, or trained from a store (gene2vec)."""

    output: str
    """New folder for `genes.npy`, `genes.txt` and `provenance.json`."""
    vectors: str | None = None
    """Vectors to import: a NumPy file (`.npy`) or word2vec text (plain or gzipped); none trains."""
    names: str | None = None
    """Gene name of each row of a `.npy` file; none takes the `.txt` of the same name beside it."""
    store: str | None = None
    """Cell store that has the panel, and to train from."""
    panel: str | None = None
    """Text file with the panel, in place of a store's; for importing."""
    missing: Literal["random", "zeros"] = "random"
    """Vectors of genes that have none: random ones with the spread of the others, or zeros."""
    dim: int = 200
    """Length of a trained vector (gene2vec: 200)."""
    group_by: str = "source"
    """Column of obs: genes are correlated within each of its values."""
    cells_per_group: int = 20_000
    """At most so many cells of a group, a random sample; a worker holds as many."""
    min_cells: int = 10
    """Genes expressed in fewer cells of a group have no pairs there."""
    neighbours: int = 20
    """Each gene is paired with so many others in a group, those it correlates with most."""
    min_correlation: float = 0.1
    """Least correlation of a pair, between 0 and 1; four standard errors if that is more."""
    epochs: int | None = None
    """Passes of the skip-gram over all pairs; none takes 10, or so many that a million pairs are
    seen if that is more."""
    negative: int = 5
    """Random genes against which each pair is held."""
    threads: int = 1
    """Threads of the skip-gram. With more than one, two runs give two results."""
    seed: int = 0
    """Seed of the skip-gram, the order of pairs and random vectors."""
    workers: int | None = None
    """Groups that are worked on at once; none takes one per core."""
    scheduler: str | None = None
    """Address of a running Dask cluster (`tcp://host:8786`); none uses local threads."""
    slurm: SlurmConfig = field(default_factory=SlurmConfig)

    def __post_init__(self) -> None:
        if self.store is not None and self.panel is not None:
            raise ValueError("store and panel both give a panel; leave one out")
        if self.vectors is None and self.store is None:
            raise ValueError(
                "give vectors to import (--vectors FILE with --panel or --store), or a store to "
                "train from (--store STORE)"
            )
        if self.vectors is not None and self.store is None and self.panel is None:
            raise ValueError("vectors are brought into a panel's order; give --panel or --store")
        for name in ("dim", "cells_per_group", "neighbours", "epochs", "negative", "threads"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.min_cells < 2:
            raise ValueError(f"min_cells is {self.min_cells}; give 2 or more")
        if not 0 < self.min_correlation < 1:
            raise ValueError(f"min_correlation is {self.min_correlation}; give a number in (0, 1)")
