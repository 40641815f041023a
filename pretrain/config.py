"""Knobs of pretraining: each is one field of one frozen record."""

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from datastore.config import BinningConfig, OrderConfig, SelectionConfig


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """Shape of the Performer encoder (scBERT, Methods; the defaults are the published model)."""

    dim: int = 200
    """Model width, D."""
    depth: int = 6
    """Number of Performer blocks."""
    heads: int = 10
    """Attention heads, H."""
    dim_head: int = 64
    """Width of one head; heads × dim_head may differ from dim."""
    ff_mult: int = 4
    """Width of the feed-forward layer in units of dim."""
    num_features: int | None = None
    """Random features of the attention; none takes int(dim_head × ln dim_head), 266 for 64."""
    gene_embedding: Literal["none", "learned", "gene2vec"] = "learned"
    """What tells genes apart: nothing, a trained table, or frozen gene2vec vectors."""
    expression: Literal["binned", "continuous"] = "binned"
    """How expression is embedded: a row per bin (the published model), or rows mixed by how near
    log2(1 + CP10k) is to each bin's learned centre."""
    sequence: Literal["full", "expressed"] = "full"
    """What the model sees of a cell: every gene of the panel (the published model), or only genes
    of bin 1 or more, about one in twenty; another model, that knows nothing of absent genes."""
    num_zeros: int = 0
    """Genes of bin 0 that each cell shows besides in pretraining, drawn anew each epoch (only with
    `sequence` expressed)."""
    attention: Literal["stable", "published"] = "stable"
    """Numerics of the attention: ours, or those of the published code, whose features can sink to
    a constant, for weights that were trained with them (`scbert export x.pth`)."""
    kernel: Literal["auto", "native", "torch", "reference"] = "auto"
    """What computes the attention: the fastest that runs here, compiled C++ for CPUs, PyTorch in
    tiles, or the formula as it is written."""
    checkpointing: bool = False
    """Keep only the states between blocks and compute the rest again in the backward pass."""

    def __post_init__(self) -> None:
        for name, choices in get_type_hints(type(self)).items():
            if get_origin(choices) is Literal and getattr(self, name) not in get_args(choices):
                raise ValueError(
                    f"encoder.{name} is {getattr(self, name)!r}; choose one of "
                    f"{', '.join(get_args(choices))}"
                )
        if self.num_zeros < 0:
            raise ValueError(f"encoder.num_zeros is {self.num_zeros}; give 0 or more")
        if self.num_zeros and self.sequence == "full":
            raise ValueError(
                f"encoder.num_zeros is {self.num_zeros}, but encoder.sequence is full and shows "
                "every gene; choose expressed, or leave num_zeros out"
            )
        # int(1 × ln 1) random features for a width of 1 are none.
        least = {"dim": 1, "depth": 1, "heads": 1, "dim_head": 2, "ff_mult": 1, "num_features": 1}
        for name, number in least.items():
            if getattr(self, name) is not None and getattr(self, name) < number:
                raise ValueError(f"encoder.{name} is {getattr(self, name)}; give {number} or more")
        if self.dim % self.heads:
            raise ValueError(
                f"encoder.dim is {self.dim}, not a multiple of encoder.heads {self.heads}"
            )
        if self.attention == "published" and self.kernel == "native":
            raise ValueError(
                "encoder.kernel is native, but encoder.attention is published, of which there is "
                "no native kernel; choose auto"
            )

    @property
    def features(self) -> int:
        """Random features per head, m."""
        if self.num_features is not None:
            return self.num_features
        return int(self.dim_head * math.log(self.dim_head))

    def architecture(self) -> dict[str, Any]:
        """All fields that belong to the model, without those that say how to compute it."""
        return {
            name: value
            for name, value in asdict(self).items()
            if name not in ("kernel", "checkpointing")
        }


@dataclass(frozen=True, kw_only=True)
class Gene2VecConfig:
    """Files of gene vectors: gene2vec keeps them as they are, a learned table begins with them."""

    vectors: str | None = None
    """NumPy file of shape (genes, dim), or word2vec text; `scbert genes embed` makes one."""
    names: str | None = None
    """Gene name of each row of a NumPy file; none takes the `.txt` of the same name beside it."""


@dataclass(frozen=True, kw_only=True)
class MaskingConfig:
    """Which genes to hide (scBERT, Methods)."""

    ratio: float = 0.15
    """Share of each cell's expressed genes that become targets, in (0, 1)."""
    keep_share: float = 0.1
    """Share of the targets that stay visible all the same, in [0, 1)."""
    zeros: float = 0.0
    """Genes of bin 0 that become targets, too, for each expressed gene that does; only such as the
    cell's source measured. 0, as published: the model never has to say that a gene is absent."""

    def __post_init__(self) -> None:
        if not 0 <= self.zeros <= 100:
            raise ValueError(f"masking.zeros is {self.zeros}; give a number from 0 to 100")
        if not 0 < self.ratio < 1:
            raise ValueError(f"masking.ratio is {self.ratio}; give a share between 0 and 1")
        if not 0 <= self.keep_share < 1:
            raise ValueError(f"masking.keep_share is {self.keep_share}; give a share below 1")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many cells make a step. The global batch is the same on any number of ranks."""

    global_size: int = 5_760
    """Cells per optimizer step over all ranks (scBERT: 3 × 60 × 32)."""
    micro_size: int = 3
    """Cells in one forward pass on one rank."""
    tokens: int | None = None
    """Most genes in one forward pass on one rank, in place of `micro_size`, with
    `encoder.sequence` expressed; a cell that has more goes alone. None counts cells."""

    def __post_init__(self) -> None:
        if self.global_size < 1 or self.micro_size < 1:
            raise ValueError("batch.global_size and batch.micro_size must be 1 or more")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"batch.tokens is {self.tokens}; give 1 or more, or leave it out")

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and step; with `tokens` 1, which is cut by their number later.

        Raises:
            ValueError: If the global batch cannot be dealt evenly.
        """
        if self.tokens is not None:
            return 1
        cells = self.micro_size * world_size
        if self.global_size % cells:
            nearest = self.global_size // cells * cells or cells
            raise ValueError(
                f"batch.global_size is {self.global_size}, not a multiple of batch.micro_size "
                f"{self.micro_size} × {world_size} ranks; {nearest} would be"
            )
        return self.global_size // cells


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Adam and its learning rate."""

    lr: float = 1e-4
    """Highest learning rate."""
    schedule: Literal["constant", "cosine", "restarts"] = "restarts"
    """After the warm-up: stay, fall once by a cosine, or restart as the published code does."""
    warmup_steps: int = 0
    """Steps of linear warm-up (constant, cosine)."""
    min_lr: float = 1e-6
    """Lowest learning rate (cosine, restarts)."""
    restart_epochs: int = 15
    """Epochs of the first cycle; each following is twice as long (restarts)."""
    restart_warmup_epochs: int = 5
    """Epochs of linear warm-up in each cycle (restarts)."""
    restart_decay: float = 0.9
    """Factor of the highest rate from one cycle to the next (restarts)."""
    beta1: float = 0.9
    """Adam's decay of the first moment."""
    beta2: float = 0.999
    """Adam's decay of the second moment."""
    weight_decay: float = 0.0
    """Decoupled weight decay (AdamW)."""
    clip_norm: float = 100.0
    """Highest norm of the whole gradient."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or not 0 <= self.min_lr <= self.lr:
            raise ValueError(
                f"optim.lr is {self.lr} and optim.min_lr {self.min_lr}; "
                "need lr > 0 and 0 <= min_lr <= lr"
            )
        if not self.clip_norm > 0:
            raise ValueError(f"optim.clip_norm is {self.clip_norm}; give a positive norm")
        if self.warmup_steps < 0 or not 0 <= self.restart_warmup_epochs < self.restart_epochs:
            raise ValueError(
                "optim.warmup_steps must be 0 or more, restart_warmup_epochs below restart_epochs"
            )


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where MLflow keeps the run."""

    uri: str | None = None
    """Tracking server or database; none takes MLFLOW_TRACKING_URI, else ./mlflow.db (SQLite)."""
    experiment: str = "scbert-pretrain"
    """Experiment that the run belongs to."""
    run_name: str | None = None
    """Name of the run; none takes the output folder's."""


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """Masked-gene pretraining of the encoder on a cell store."""

    store: str
    """Cell store to train on (launchers/build_store.py makes one)."""
    output: str
    """Folder for checkpoints, metrics and the export; a run that was stopped continues there."""
    epochs: int = 1
    """Passes over all training cells."""
    max_steps: int | None = None
    """Stop after this many optimizer steps in all; none trains all epochs."""
    stop_after: int | None = None
    """Save and stop once this step is reached, leaving the rest for the next start."""
    seed: int = 0
    """Seed of weights, order, masks and projections."""
    data: SelectionConfig = field(default_factory=SelectionConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    gene2vec: Gene2VecConfig = field(default_factory=Gene2VecConfig)
    binning: BinningConfig = field(default_factory=BinningConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    batch: BatchConfig = field(default_factory=BatchConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    order: OrderConfig = field(default_factory=OrderConfig)
    cell_objective: float = 0.0
    """Weight of a second objective, 0 none (as published): the state of a cell's constant position
    must foretell the bin of every gene that its source measured, so that it sums up the cell."""
    redraw_every: int = 17
    """Steps between redraws of the random features, 0 never (scBERT: 1,000 passes, 60 a step)."""
    validation_share: float = 0.05
    """Share of the store's cells that is held out, of each ingest into it; which ones,
    `data.split_by` and `data.split_seed` say."""
    validation_cells: int = 10_000
    """At most this many of the held-out cells are evaluated each time."""
    evaluate_every: int = 500
    """Steps between evaluations on held-out cells; one more ends the training."""
    attention_health: bool = False
    """Log at each evaluation, for every block, the share of key features that lie below the floor
    and the entropy of the mean attention (1: all positions alike), from each rank's first batch."""
    save_every: int = 500
    """Steps between checkpoints; one more ends the training."""
    keep_checkpoints: int = 2
    """How many of the latest checkpoints stay."""
    log_every: int = 10
    """Steps between log lines."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """When a loss or gradient is not finite: stop before the update, or leave the step out."""
    max_skipped_steps: int = 10
    """With `on_nonfinite skip`: one more such step in the whole training stops it all the same."""
    check_ranks_every: int = 0
    """Steps between comparisons of all ranks' weights and projections, bit by bit; 0 never."""
    watchdog_minutes: float = 10.0
    """End a training of several ranks after so many minutes without progress, naming the rank and
    host that holds up the others; 0 leaves that to the process group, after half an hour."""
    deepspeed: str | None = None
    """DeepSpeed JSON with what only DeepSpeed understands (ZeRO, precision); none takes ZeRO 1."""
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        for name in ("epochs", "evaluate_every", "save_every", "keep_checkpoints", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        for name in ("max_steps", "stop_after"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; give 1 or more, or leave it out")
        if not 0 <= self.cell_objective <= 1_000:
            raise ValueError(f"cell_objective is {self.cell_objective}; give a weight of 0 or more")
        if self.validation_cells < 0:
            raise ValueError(f"validation_cells is {self.validation_cells}; give 0 or more")
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"validation_share is {self.validation_share}; give a share from 0 to below 1"
            )
        if not self.watchdog_minutes >= 0:
            raise ValueError(f"watchdog_minutes is {self.watchdog_minutes}; give 0 (off) or more")
        for name in ("redraw_every", "check_ranks_every", "max_skipped_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} is {getattr(self, name)}; give 0 (never) or more")
        if self.batch.tokens is not None and self.encoder.sequence == "full":
            raise ValueError(
                f"batch.tokens is {self.batch.tokens}, but encoder.sequence is full and all cells "
                "are equally long: set batch.micro_size, or encoder.sequence expressed"
            )
        if self.encoder.gene_embedding == "gene2vec" and self.gene2vec.vectors is None:
            raise ValueError(
                "encoder.gene_embedding is gene2vec: name the files with --gene2vec.vectors X.npy "
                "--gene2vec.names GENES.txt (scbert genes embed makes them), or train a table "
                "(--encoder.gene_embedding learned)"
            )
        if self.encoder.gene_embedding == "none" and self.gene2vec.vectors is not None:
            raise ValueError(
                "gene2vec.vectors are given, but encoder.gene_embedding is none; choose gene2vec "
                "or learned"
            )
