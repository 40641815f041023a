"""Encoder + head = cell-type classifier, and its predictions."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn
from tqdm import tqdm

from datastore.binning import expression_values, to_dense, tokenize
from datastore.genes import GenePanel
from finetune.config import HeadConfig
from finetune.expression import counts_per_10k
from finetune.heads import HEADS, ExpressionLogits
from finetune.novelty import NoveltyDetector, detector_shape
from pretrain.encoder import ExpressionEncoder
from pretrain.export import Export, read_export, write_export

MOST_WORKERS: Final = 8
"""Batches labelled at a time, at most: each takes memory for its activations."""
LATER: Final = {"correction", "temperature", "expression.compared"}
"""Weights that older exports lack; what a new model starts with is what these had."""
Part = TypeVar("Part", bound=tuple[Tensor, ...])


class CellClassifier(nn.Module):
    """Names the type of a cell from its tokens."""

    def __init__(
        self,
        encoder: ExpressionEncoder,
        labels: tuple[str, ...],
        config: HeadConfig,
        expression: ExpressionLogits | None = None,
        novelty: NoveltyDetector | None = None,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.labels = labels
        self.config = config
        self.head: Any = HEADS[config.kind](
            encoder.config.dim, encoder.num_genes + 1, len(labels), config
        )
        self.expression = expression
        self.novelty = novelty
        self.register_buffer("correction", torch.ones(()))
        self.register_buffer("temperature", torch.ones(()))

    correction: Tensor
    """How much of the head's logits is added to the experts', chosen on validation cells."""
    temperature: Tensor
    """What all logits are divided by, so that probabilities are calibrated."""

    def forward(self, tokens: Tensor, rates: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Classify cells.

        Args:
            tokens: Expression bins, (B, G).
            rates: Counts per 10,000, (B, G), if the model has experts on expression.

        Returns:
            Calibrated logits, (B, C), and embedding, (B, bottleneck).
        """
        logits, embedding = self.head(self.encoder(tokens), tokens)
        if self.expression is not None:
            if rates is None:
                raise ValueError("this classifier has experts on expression; give rates too")
            logits = self.expression(rates) + self.correction * logits
        return logits / self.temperature, embedding


@dataclass(frozen=True)
class Predictions:
    """What a classifier says of N cells.

    Attributes:
        probabilities: Per class, float32, (N, C).
        embedding: Cell embedding, float32, (N, bottleneck).
        labels: The class names, C.
        novelty: Strangeness of each cell, float32, (N,), if the model has a detector.
    """

    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    labels: tuple[str, ...]
    novelty: NDArray[np.float32] | None = None

    @property
    def best(self) -> list[str]:
        """Likeliest class of each cell."""
        return [self.labels[number] for number in self.probabilities.argmax(axis=1)]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Probability of the likeliest class, (N,)."""
        highest: NDArray[np.float32] = self.probabilities.max(axis=1)
        return highest


def predict(
    model: CellClassifier, counts: sparse.csr_matrix, batch_size: int, *, progress: bool = True
) -> Predictions:
    """Classify cells; a cell's result depends on the cell alone.

    Args:
        model: The classifier.
        counts: Raw counts in panel order, CSR of shape (N, G).
        batch_size: Cells per forward pass.
        progress: Show a bar when somebody watches.
    """
    device = next(model.parameters()).device
    narrow, kind = torch.is_autocast_enabled(device.type), torch.get_autocast_dtype(device.type)

    def label(start: int) -> tuple[Tensor, ...]:
        part = counts[start : start + batch_size]
        (tokens,) = token_batches(part, batch_size, model.encoder)
        rates = dense_rates(part, device)
        # Both are a thread's own, so they are entered by whichever labels the batch.
        with torch.no_grad(), torch.autocast(device.type, kind, enabled=narrow):
            logits, embedding = model(tokens.to(device), rates)
            found = [logits.float().softmax(-1), embedding.float()]
            if model.novelty is not None:
                found.append(model.novelty(logits.float(), rates))
        return tuple(values.cpu() for values in found)

    was_training = model.training
    model.eval()
    parts = []
    hidden = None if progress else True
    with tqdm(total=counts.shape[0], unit="cell", disable=hidden) as bar:
        for part in _several_at_a_time(label, range(0, counts.shape[0], batch_size), device):
            parts.append(part)
            bar.update(len(part[0]))
    model.train(was_training)
    columns = [torch.cat(column).numpy() for column in zip(*parts, strict=True)]
    return Predictions(columns[0], columns[1], model.labels, *columns[2:])


def _several_at_a_time(
    label: Callable[[int], Part], starts: Sequence[int], device: torch.device
) -> Iterator[Part]:
    """Label batches, in order; on the CPU several at a time, each on its share of the threads.

    Threads that share a batch wait for each other at every step of it, and keep cores busy
    meanwhile: two of them labelled a fifth more cells than one, two batches at a time almost twice
    as many.
    """
    threads = torch.get_num_threads()
    workers = min(threads, MOST_WORKERS, len(starts)) if device.type == "cpu" else 1
    if workers <= 1:
        yield from map(label, starts)
        return
    pool = ThreadPoolExecutor(workers)
    torch.set_num_threads(threads // workers)
    try:
        yield from pool.map(label, starts)
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def dense_rates(counts: sparse.csr_matrix, device: torch.device) -> Tensor:
    """Counts per 10,000 of some cells, float32 (B, G)."""
    return torch.from_numpy(counts_per_10k(counts).toarray()).to(device)


def token_batches(
    counts: sparse.csr_matrix, batch_size: int, encoder: ExpressionEncoder
) -> Iterator[Tensor]:
    """Cut counts in panel order into batches of what an encoder takes.

    Yields:
        Tokens, uint8 (B, G); of a continuous encoder log2(1 + CP10k), float32 (B, G).
    """
    for start in range(0, counts.shape[0], batch_size):
        part = counts[start : start + batch_size]
        indptr = part.indptr.astype(np.int64)
        if encoder.config.expression == "continuous":
            values = expression_values(indptr, part.data, encoder.binning)
            dense = to_dense(indptr, part.indices, values, part.shape[1])
        else:
            dense = tokenize(indptr, part.indices, part.data, part.shape[1], encoder.binning)
        yield torch.from_numpy(dense)


def save_classifier(
    folder: Path, model: CellClassifier, panel: GenePanel, metadata: dict[str, Any]
) -> None:
    """Write a classifier as an export of kind `classifier`."""
    parts: dict[str, Any] = {"head": asdict(model.config)}
    if model.expression is not None:
        parts["expression"] = {
            "scales": list(model.expression.scales),
            "num_genes": len(model.expression.genes),
        }
    if model.novelty is not None:
        parts["novelty"] = detector_shape(model.novelty)
    write_export(
        folder,
        "classifier",
        model.encoder,
        panel,
        model.state_dict(),
        {**metadata, **parts},
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
    model = _blank(export, labels)
    own = {name: value for name, value in export.weights.items() if not name.startswith("encoder.")}
    try:
        missing, unknown = model.load_state_dict(own, strict=False)
    except RuntimeError as error:
        raise ValueError(
            f"{export.path}: the head's weights do not fit its {len(labels)} labels: "
            f"{str(error).splitlines()[-1].strip()}"
        ) from error
    needed = [name for name in missing if not name.startswith("encoder.")]
    if lost := sorted({*needed, *unknown} - LATER):
        raise ValueError(f"{export.path}: the weights {lost[0]} (and maybe others) do not fit")
    return model.eval(), export


def _blank(export: Export, labels: tuple[str, ...]) -> CellClassifier:
    """Build the classifier that an export describes, its encoder with the exported weights."""
    expression = novelty = None
    if "expression" in export.metadata:
        shape = export.metadata["expression"]
        expression = ExpressionLogits(shape["num_genes"], len(labels), shape["scales"])
    settings = export.metadata.get("novelty", {})
    if "shape" in settings:
        if len(settings["shape"]) != 4:
            raise ValueError(
                f"{export.path} has novelty thresholds of an older kind; fine-tune it again"
            )
        num_views, num_genes, width, num_classes = settings["shape"]
        novelty = NoveltyDetector(
            num_views,
            num_genes,
            width,
            num_classes,
            score=settings["score"],
            rule=settings["rule"],
            probability=settings["threshold"],
        )
    head = HeadConfig(**export.metadata["head"])
    return CellClassifier(export.encoder(), labels, head, expression, novelty)
