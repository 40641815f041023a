"""The labels of cells, a few bytes each, and their majority within groups."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse

from datastore.raw_cells import Names
from finetune.classifier import Predictions
from finetune.query import Query


@dataclass(frozen=True)
class LabelledSlice:
    """What a classifier says of rows [start, start + B) of a query, and their counts if at hand."""

    start: int
    counts: sparse.csr_matrix | None
    predictions: Predictions
    is_novel: NDArray[np.bool_]


@dataclass(frozen=True)
class CellLabels:
    """Label, confidence and novelty of N cells; they are put in as they become known.

    Attributes:
        labels: The model's cell types, C.
        num_cells: Cells, N.
        codes: Likeliest type of each cell, (N,); -1 as long as it is not known.
        confidence: Its probability, (N,).
        is_novel: Whether the cell is of no known type, (N,).
        majority: Commonest type of the cell's group, (N,), -1 without a group; none if not asked.
    """

    labels: tuple[str, ...]
    num_cells: int
    codes: NDArray[np.int32] = field(default_factory=lambda: np.empty(0, np.int32))
    confidence: NDArray[np.float32] = field(default_factory=lambda: np.empty(0, np.float32))
    is_novel: NDArray[np.bool_] = field(default_factory=lambda: np.empty(0, np.bool_))
    majority: NDArray[np.int32] | None = None

    def __post_init__(self) -> None:
        if len(self.codes) != self.num_cells:
            object.__setattr__(self, "codes", np.full(self.num_cells, -1, np.int32))
            object.__setattr__(self, "confidence", np.zeros(self.num_cells, np.float32))
            object.__setattr__(self, "is_novel", np.zeros(self.num_cells, np.bool_))

    def __len__(self) -> int:
        return self.num_cells

    def put(self, start: int, predictions: Predictions, is_novel: NDArray[np.bool_]) -> None:
        """Enter the cells from `start` on."""
        rows = slice(start, start + len(is_novel))
        self.codes[rows] = predictions.probabilities.argmax(axis=1)
        self.confidence[rows] = predictions.confidence
        self.is_novel[rows] = is_novel

    def with_majority(self, majority: NDArray[np.int32]) -> "CellLabels":
        """Add the majority labels."""
        return CellLabels(
            self.labels, self.num_cells, self.codes, self.confidence, self.is_novel, majority
        )

    def columns(self, key: str, rows: slice = slice(None)) -> dict[str, Any]:
        """Return columns of obs for some of the rows, by name."""
        found = {
            f"{key}_label": self._named(self.codes[rows]),
            f"{key}_confidence": self.confidence[rows],
            f"{key}_novel": self.is_novel[rows],
        }
        if self.majority is not None:
            found[f"{key}_majority"] = self._named(self.majority[rows])
        return found

    def cells_of(self) -> Mapping[str, int]:
        """How many cells got each label, most first."""
        numbers = np.bincount(self.codes, minlength=len(self.labels))
        return {
            self.labels[code]: int(numbers[code])
            for code in np.argsort(-numbers, kind="stable")
            if numbers[code]
        }

    def _named(self, codes: NDArray[np.int32]) -> pd.Categorical:
        return pd.Categorical.from_codes(codes, categories=list(self.labels))


def majority_labels(labels: CellLabels, groups: Names) -> NDArray[np.int32]:
    """Give each cell the commonest label of its group.

    Of labels that are equally common the one with the higher sum of confidences counts.

    Args:
        labels: Labels of all cells.
        groups: Group of each cell, (N,); None for a cell without one.

    Returns:
        Code of the group's label, (N,), -1 for a cell without a group.
    """
    of_cell, names = pd.factorize(groups)  # None becomes -1
    votes = np.zeros((len(names), len(labels.labels)))
    weights = np.zeros_like(votes)
    has_group = of_cell >= 0
    place = (of_cell[has_group], labels.codes[has_group])
    np.add.at(votes, place, 1)
    np.add.at(weights, place, labels.confidence[has_group].astype(np.float64))
    winners = np.lexsort((weights, votes), axis=1)[:, -1] if len(names) else np.empty(0, np.int64)
    result = np.full(len(groups), -1, np.int32)
    result[has_group] = winners[of_cell[has_group]]
    return result


class MatrixSink(Protocol):
    """Takes embedding and probabilities as they become known, in order."""

    def write(self, start: int, predictions: Predictions, counts: sparse.csr_matrix | None) -> None:
        """Take those of the rows from `start` on, and their counts if at hand."""


class KeptMatrices:
    """Keeps embedding and probabilities in memory."""

    def __init__(self) -> None:
        self.embedding: list[NDArray[np.float32]] = []
        self.probabilities: list[NDArray[np.float32]] = []

    def write(self, start: int, predictions: Predictions, counts: sparse.csr_matrix | None) -> None:
        """Take the next rows."""
        self.embedding.append(predictions.embedding)
        self.probabilities.append(predictions.probabilities)


def collect_labels(
    slices: Iterable[LabelledSlice],
    query: Query,
    labels: tuple[str, ...],
    sink: MatrixSink,
    majority_over: str | None = None,
) -> CellLabels:
    """Go through labelled slices: matrices go into the sink, labels are returned.

    Args:
        slices: Of all cells of the query, in order.
        query: Where the cells come from.
        labels: The model's cell types.
        sink: Takes the matrices.
        majority_over: Column of obs over whose groups the majority is counted.
    """
    found = CellLabels(labels, query.num_cells)
    for part in slices:
        found.put(part.start, part.predictions, part.is_novel)
        sink.write(part.start, part.predictions, part.counts)
    if majority_over is None:
        return found
    groups = query.obs[majority_over](0, query.num_cells)
    return found.with_majority(majority_labels(found, groups))
