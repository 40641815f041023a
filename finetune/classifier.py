"""Encoder + head = cell-type classifier, and its predictions."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from tqdm import tqdm

from datastore.binning import tokenize
from datastore.config import BinningConfig
from datastore.genes import GenePanel
from finetune.config import HeadConfig
from pretrain.encoder import ExpressionEncoder
from pretrain.export import Export, read_export, write_export


class ConvHead(nn.Module):
    """One value per gene by convolution, then two layers, then classes (scBERT, Methods).

    Between convolution and layers the published head has a ReLU; with `normalize` the values are
    brought to mean 0 and variance 1 over the training cells instead. In evaluation these are
    constants, so a cell's result does not depend on its batch.
    """

    def __init__(self, dim: int, length: int, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        # A convolution with a kernel of 1 × D over the embedding is a linear map per gene.
        self.convolution = nn.Linear(dim, 1)
        self.activation = nn.BatchNorm1d(length, affine=False) if config.normalize else nn.ReLU()
        self.hidden = nn.Linear(length, config.hidden)
        self.bottleneck = nn.Linear(config.hidden, config.bottleneck)
        self.classes = nn.Linear(config.bottleneck, num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Args:
            states: Encoder states, (B, G + 1, D).

        Returns:
            Logits, (B, C), and the cell embedding, (B, bottleneck).
        """
        per_gene = self.activation(self.convolution(states).squeeze(-1))  # (B, G + 1)
        hidden = self.dropout(torch.relu(self.hidden(per_gene)))
        embedding = torch.relu(self.bottleneck(hidden))
        return self.classes(self.dropout(embedding)), embedding


class CellClassifier(nn.Module):
    """Names the type of a cell from its tokens."""

    def __init__(
        self, encoder: ExpressionEncoder, labels: tuple[str, ...], config: HeadConfig
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = labels
        self.config = config
        self.head = ConvHead(encoder.config.dim, encoder.num_genes + 1, len(labels), config)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Classify cells: tokens (B, G) to logits (B, C) and embedding (B, bottleneck)."""
        logits, embedding = self.head(self.encoder(tokens))
        return logits, embedding


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of N cells.

    Attributes:
        probabilities: Per class, float32, (N, C).
        embedding: Cell embedding, float32, (N, bottleneck).
        labels: The class names, C.
    """

    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    labels: tuple[str, ...]

    @property
    def best(self) -> list[str]:
        """Likeliest class of each cell."""
        return [self.labels[number] for number in self.probabilities.argmax(axis=1)]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Probability of the likeliest class, (N,)."""
        highest: NDArray[np.float32] = self.probabilities.max(axis=1)
        return highest


def predict(model: CellClassifier, counts: sparse.csr_matrix, batch_size: int) -> Predictions:
    """Classify cells; a cell's result depends on the cell alone.

    Args:
        model: The classifier.
        counts: Raw counts in panel order, CSR of shape (N, G).
        batch_size: Cells per forward pass.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    probabilities, embeddings = [], []
    with torch.no_grad(), tqdm(total=counts.shape[0], unit="cell", disable=None) as bar:
        for tokens in token_batches(counts, batch_size, model.encoder.binning):
            logits, embedding = model(tokens.to(device))
            probabilities.append(logits.float().softmax(-1).cpu().numpy())
            embeddings.append(embedding.float().cpu().numpy())
            bar.update(len(tokens))
    model.train(was_training)
    return Predictions(np.concatenate(probabilities), np.concatenate(embeddings), model.labels)


def token_batches(
    counts: sparse.csr_matrix, batch_size: int, binning: BinningConfig
) -> Iterator[Tensor]:
    """Cut counts in panel order into batches of tokens, uint8 (B, G)."""
    for start in range(0, counts.shape[0], batch_size):
        part = counts[start : start + batch_size]
        tokens = tokenize(
            part.indptr.astype(np.int64), part.indices, part.data, part.shape[1], binning
        )
        yield torch.from_numpy(tokens)


def save_classifier(
    folder: Path, model: CellClassifier, panel: GenePanel, metadata: dict[str, Any]
) -> None:
    """Write a classifier as an export of kind `classifier`."""
    write_export(
        folder,
        "classifier",
        model.encoder,
        panel,
        model.state_dict(),
        {"head": asdict(model.config), **metadata},
        {"labels.txt": "\n".join(model.labels) + "\n"},
    )


def load_classifier(folder: str | Path) -> tuple[CellClassifier, Export]:
    """Read a classifier's export.

    Raises:
        ValueError: If it is not a whole export of a classifier.
    """
    export = read_export(folder, "classifier")
    path = export.path / "labels.txt"
    if not path.is_file():
        raise ValueError(f"{export.path} is not a classifier: labels.txt is missing")
    labels = tuple(path.read_text(encoding="utf-8").splitlines())
    model = CellClassifier(export.encoder(), labels, HeadConfig(**export.metadata["head"]))
    head = {
        name.removeprefix("head."): value
        for name, value in export.weights.items()
        if name.startswith("head.")
    }
    try:
        model.head.load_state_dict(head)
    except RuntimeError as error:
        raise ValueError(
            f"{export.path}: the head's weights do not fit its {len(labels)} labels: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    return model.eval(), export
