"""Knobs of fine-tuning and annotation."""

from dataclasses import dataclass, field
from typing import Literal

from pretrain.config import TrackingConfig


@dataclass(frozen=True, kw_only=True)
class LabelledConfig:
    """Labelled cells and what is held out of them."""

    path: str
    """`.h5ad` with raw counts and a label for each cell."""
    label_key: str = "cell_type"
    """Column of obs that holds the cell types."""
    layer: str | None = None
    """Layer that holds the counts; none takes `X`."""
    test_path: str | None = None
    """`.h5ad` of held-out labelled cells; none holds out `test_share` of `path`."""
    test_share: float = 0.2
    """Share of each cell type that is held out for the reported scores."""
    validation_share: float = 0.1
    """Share of each remaining type that decides when to stop."""
    min_share_found: float = 0.3
    """Refuse a file that measured less than this share of the model's genes."""

    def __post_init__(self) -> None:
        for name in ("test_share", "validation_share"):
            if not 0 < getattr(self, name) < 1:
                raise ValueError(
                    f"data.{name} is {getattr(self, name)}; give a share inside 0 to 1"
                )
        if not 0 <= self.min_share_found <= 1:
            raise ValueError(
                f"data.min_share_found is {self.min_share_found}; give a share from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class HeadConfig:
    """The classifier on the encoder (scBERT, Methods: convolution, then 512, 128, classes)."""

    hidden: int = 512
    """Width of the first layer over the genes."""
    bottleneck: int = 128
    """Width of the second layer, which is also the cell embedding."""
    dropout: float = 0.1
    """Share of units dropped in training, in [0, 1)."""
    normalize: bool = True
    """Centre and scale the value of each gene over the training cells before the layers; off is the
    published head, which takes several times the epochs."""

    def __post_init__(self) -> None:
        if min(self.hidden, self.bottleneck) < 1 or not 0 <= self.dropout < 1:
            raise ValueError("head.hidden and head.bottleneck must be 1 or more, dropout in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig:
    """Train a cell-type classifier on an exported encoder."""

    encoder: str
    """Export of a pretrained encoder: a folder, or `models:/name@alias` in the registry."""
    data: LabelledConfig
    output: str
    """Folder for metrics, figures and the classifier's export."""
    head: HeadConfig = field(default_factory=HeadConfig)
    train: Literal["head", "last_block", "all"] = "head"
    """What learns: the head alone, with it the last Performer block and final norm (scBERT), or
    all."""
    epochs: int = 20
    """Passes over the training cells at most."""
    patience: int = 5
    """Stop after this many epochs without a better validation macro-F1."""
    batch_size: int = 16
    """Cells per optimizer step."""
    lr: float = 1e-3
    """Learning rate of the head, after warm-up; falls to zero by a cosine."""
    encoder_lr: float = 1e-4
    """Learning rate of whatever of the encoder learns."""
    weight_decay: float = 0.01
    """Decoupled weight decay (AdamW)."""
    clip_norm: float = 1.0
    """Highest norm of the whole gradient."""
    cache_gigabytes: float = 1.5
    """When the head alone learns, cells are encoded once and kept if their states fit in this."""
    novelty_threshold: float = 0.5
    """A cell whose best class has a lower probability is called novel (scBERT, Methods)."""
    seed: int = 0
    """Seed of the split, the head and the order."""
    tracking: TrackingConfig = field(
        default_factory=lambda: TrackingConfig(experiment="scbert-finetune")
    )

    def __post_init__(self) -> None:
        for name in ("epochs", "patience", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give 1 or more")
        if not self.lr > 0 or not self.encoder_lr >= 0 or not self.clip_norm > 0:
            raise ValueError("lr and clip_norm must be positive, encoder_lr 0 or more")
        if not 0 <= self.novelty_threshold <= 1:
            raise ValueError(
                f"novelty_threshold is {self.novelty_threshold}; give a probability from 0 to 1"
            )


@dataclass(frozen=True, kw_only=True)
class AnnotateConfig:
    """Label new cells with a fine-tuned classifier."""

    model: str
    """Export of a classifier: a folder, or `models:/name@alias` in the registry."""
    input: str
    """`.h5ad` with raw counts; it is never changed."""
    output: str
    """`.h5ad` to write; a CSV with the labels is written beside it."""
    layer: str | None = None
    """Layer that holds the counts; none takes `X`."""
    batch_size: int = 32
    """Cells per forward pass; the result does not depend on it."""
    min_share_found: float = 0.3
    """Refuse a file that measured less than this share of the model's genes."""
    tracking_uri: str | None = None
    """Registry to pull from; none takes MLFLOW_TRACKING_URI, else ./mlflow.db (SQLite)."""

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; give 1 or more")
        if not 0 <= self.min_share_found <= 1:
            raise ValueError(f"min_share_found is {self.min_share_found}; give a share from 0 to 1")
