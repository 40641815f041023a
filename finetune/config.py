"""Knobs of fine-tuning and annotation."""

from dataclasses import dataclass, field
from typing import Literal

from finetune.annotation_config import GeneTablesConfig
from pretrain.config import EncoderConfig, TrackingConfig


@dataclass(frozen=True, kw_only=True)
class LabelledConfig:
    """Labelled cells and what is held out of them."""

    path: str
    """`.h5ad` with raw counts and a label for each cell."""
    label_key: str = "cell_type"
    """Column of obs that holds the cell types."""
    layer: str | None = None
    """Layer that holds the counts, or `raw`; none takes the first of `X`, `layers["counts"]` and
    `raw` that holds counts."""
    test_path: str | None = None
    """`.h5ad` of held-out labelled cells; none holds out `test_share` of `path`."""
    test_share: float = 0.2
    """Share of each cell type that is held out for the reported scores."""
    num_folds: int | None = None
    """Hold out one of so many folds instead of `test_share`; which cells are in which does not
    depend on the training's seed."""
    fold: int = 0
    """The fold that is held out, from 0."""
    validation_share: float = 0.1
    """Share of each remaining type that decides when to stop."""
    panel: GeneTablesConfig = field(default_factory=GeneTablesConfig)
    min_share_found: float = 0.3
    """Refuse a file that measured less than this share of the model's genes."""

    def __post_init__(self) -> None:
        for name in ("test_share", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)}; give a share inside 0 to 1"
                )
        if self.num_folds is not None and not 0 <= self.fold < self.num_folds:
            raise ValueError(
                f"data.fold is {self.fold} of data.num_folds {self.num_folds}; count from 0"
            )
        if self.num_folds is not None and (self.num_folds < 2 or self.test_path is not None):
            raise ValueError("data.num_folds must be 2 or more, and goes without data.test_path")
        if not 0 <= self.min_share_found <= 1:
            raise ValueError(
                f"data.min_share_found is {self.min_share_found}; give a share from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classifier on the encoder (scBERT, Methods: convolution, then 512, 128, classes)."""

    kind: Literal["conv1d", "pooled"] = "conv1d"
    """One value per gene and three layers (scBERT), or mean and attention over the expressed genes
    and two layers, far smaller."""
    expression: bool = True
    """Start from linear experts on log-normalised expression, tuned inside the training cells, and
    add what share of the network's logits helps; off is the network alone, as published."""
    hidden: int = 512
    """Width of the first layer over the genes (conv1d)."""
    bottleneck: int = 128
    """Width of the second layer, which is also the cell embedding."""
    dropout: float = 0.1
    """Share of units dropped in training, in [0, 1)."""
    normalize: bool = True
    """Centre and scale the value of each gene over the training cells before the layers (conv1d);
    off is the published head, which takes several times the epochs."""

    def __post_init__(self) -> None:
        if min(self.hidden, self.bottleneck) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("head.hidden and head.bottleneck must be 1 or more, dropout in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """What a wrong answer costs in training."""

    balance: Literal["none", "weights", "sampling"] = "weights"
    """Let each cell count alike, weigh types by 1 / cells, or draw types alike often."""
    label_smoothing: float = 0.0
    """Share of each target that is spread over all types, in [0, 1)."""
    focal: float = 0.0
    """Exponent that discounts cells that are right already (Lin et al. 2017); 0 is cross-entropy.
    """

    def __post_init__(self) -> None:
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"loss.label_smoothing is {self.label_smoothing}; give a share from 0 to below 1"
            )
        if not self.focal >= 0:
            raise ValueError(f"loss.focal is {self.focal}; give an exponent of 0 or more")


@dataclass(frozen=True, kw_only=True)
class NoveltyConfig:
    """When a cell is said to be of no known type."""

    score: Literal["distance", "probability", "energy"] = "distance"
    """Distance of the expression to the class means, 1 − highest probability, or energy."""
    rule: Literal["thresholds", "probability"] = "thresholds"
    """A threshold of that score for each type, or the paper's: highest probability too low."""
    false_rejection: float = 0.05
    """Share of each type's known cells that the thresholds reject, in (0, 1)."""
    probability: float = 0.5
    """Probability below which the paper's rule calls a cell novel (scBERT, Methods)."""

    def __post_init__(self) -> None:
        if not 0 < self.false_rejection < 1:
            raise ValueError(
                f"novelty.false_rejection is {self.false_rejection}; give a share inside 0 to 1"
            )
        if not 0 <= self.probability <= 1:
            raise ValueError(
                f"novelty.probability is {self.probability}; give a probability from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class FreshConfig:
    """The encoder of a training without pretraining (`encoder: none`)."""

    encoder: EncoderConfig = field(
        default_factory=lambda: EncoderConfig(dim=64, depth=2, heads=2, dim_head=32)
    )
    panel: str | None = None
    """Text file with a gene per line; none takes the most variable genes of the training cells."""
    num_genes: int = 2_000
    """How many variable genes."""

    def __post_init__(self) -> None:
        if self.num_genes < 1:
            raise ValueError(f"fresh.num_genes is {self.num_genes}; give 1 or more")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train a cell-type classifier on an exported encoder."""

    encoder: str
    """Export of a pretrained encoder: a folder, or `models:/name@alias` in the registry; `none`
    begins with random weights."""
    data: LabelledConfig
    output: str
    """Folder for metrics, figures and the classifier's export."""
    head: HeadConfig = field(default_factory=HeadConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    novelty: NoveltyConfig = field(default_factory=NoveltyConfig)
    fresh: FreshConfig = field(default_factory=FreshConfig)
    train: Literal["head", "last_block", "all"] = "head"
    """What learns: the head alone, with it the last Performer block and final norm (scBERT), or
    all."""
    epochs: int = 20
    """Passes over the training cells at most, each followed by validation."""
    epoch_steps: int | None = None
    """An epoch passes over few cells several times, in up to so many optimizer steps; none takes
    100 where the head alone learns from states that are kept, and one pass where each costs."""
    patience: int = 5
    """Stop after this many epochs without a better validation macro-F1."""
    batch_size: int = 16
    """Cells per optimizer step, over all ranks."""
    lr: float = 1e-3
    """Learning rate of the head, after warm-up; falls to zero by a cosine."""
    encoder_lr: float = 1e-4
    """Learning rate of whatever of the encoder learns."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW)."""
    clip_norm: float = 1.0
    """Highest norm of the whole gradient."""
    cache_gigabytes: float = 1.5
    """When the head alone learns, cells are encoded once and kept if their states fit in this,
    on each rank."""
    reasons_cells: int = 10
    """Held-out cells of each type whose genes are weighed for the page; 0 leaves that out."""
    seed: int = 0
    """Seed of the split, the head and the order."""
    deepspeed: str | None = None
    """DeepSpeed JSON for a training on several ranks (ZeRO 0, 1 or 2); none takes ZeRO 1."""
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment="scbert-finetune")
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if self.epoch_steps is not None and self.epoch_steps < 1:
            raise ValueError(f"epoch_steps is {self.epoch_steps}; give 1 or more, or null")
        if self.reasons_cells < 0:
            raise ValueError(f"reasons_cells is {self.reasons_cells}; give 0 or more")
        if not self.lr > 0 or not self.encoder_lr >= 0 or not self.clip_norm > 0:
            raise ValueError("lr and clip_norm must be positive, encoder_lr 0 or more")
