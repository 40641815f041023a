"""How well predicted cell types agree with the true ones.

Everything is derived from one confusion matrix, so two figures of one report cannot disagree.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class ClassificationScores:
    """Agreement of predicted with true cell types; ``C`` classes."""

    classes: tuple[str, ...]
    """Class names, in the order of every array below."""

    confusion: np.ndarray
    """Cells by true class (rows) and predicted class (columns), int64 of shape (C, C)."""

    @property
    def num_cells(self) -> int:
        """Cells that were scored."""
        return int(self.confusion.sum())

    @property
    def support(self) -> np.ndarray:
        """Cells that truly are of each class, int64 of shape (C,)."""
        return np.asarray(self.confusion.sum(axis=1))

    @property
    def accuracy(self) -> float:
        """Share of cells with the right label, in [0, 1]."""
        return int(np.trace(self.confusion)) / self.num_cells

    @property
    def precision(self) -> np.ndarray:
        """Share of the cells given each label that deserve it, (C,); 0 if never given."""
        return _shares(np.diag(self.confusion), self.confusion.sum(axis=0))

    @property
    def recall(self) -> np.ndarray:
        """Share of each class's cells that were found, shape (C,); 0 for a class without cells."""
        return _shares(np.diag(self.confusion), self.support)

    @property
    def f1(self) -> np.ndarray:
        """Harmonic mean of precision and recall, (C,); 0 if neither present nor predicted."""
        return _shares(2 * np.diag(self.confusion), self.support + self.confusion.sum(axis=0))

    @property
    def macro_f1(self) -> float:
        """Plain mean of F1 over the classes that occur in truth.

        A class without a true cell does not enter the mean; giving its label still costs, as recall
        of the class that the cell truly has.
        """
        return float(self.f1[self.support > 0].mean())

    def as_json(self) -> dict[str, object]:
        """Return all scores as plain numbers, lists and text, for ``json.dump``."""
        per_class = {
            name: {
                "precision": float(self.precision[i]),
                "recall": float(self.recall[i]),
                "f1": float(self.f1[i]),
                "support": int(self.support[i]),
            }
            for i, name in enumerate(self.classes)
        }
        return {
            "accuracy": self.accuracy,
            "macro_f1": self.macro_f1,
            "num_cells": self.num_cells,
            "classes": list(self.classes),
            "per_class": per_class,
            "confusion": self.confusion.tolist(),
        }


def score(
    truth: Sequence[str], predicted: Sequence[str], classes: Sequence[str]
) -> ClassificationScores:
    """Compare predicted with true cell types.

    Args:
        truth: True label of each cell.
        predicted: Predicted label of each cell, in the same order.
        classes: All labels that may occur, in the order wanted; one that never occurs is allowed. A
            label for rejected cells, such as ``Unknown``, is a class like any other here.

    Returns:
        The scores; macro-F1 averages over the classes that occur in ``truth``.

    Raises:
        ValueError: If there are no cells, the lengths differ, a class is named twice, or a label is
            no class.
    """
    if len(truth) != len(predicted):
        raise ValueError(
            f"truth has {len(truth)} cells and predicted {len(predicted)}; "
            "give one label each per cell"
        )
    if len(truth) == 0:
        raise ValueError("truth has no cells; score one cell or more")
    code_of = {str(name): code for code, name in enumerate(classes)}
    if len(code_of) != len(classes):
        raise ValueError(f"classes name a cell type twice: {list(classes)}; name each once")
    confusion = np.zeros((len(classes), len(classes)), dtype=np.int64)
    rows = _codes(truth, code_of, "truth")
    columns = _codes(predicted, code_of, "predicted")
    np.add.at(confusion, (rows, columns), 1)
    return ClassificationScores(tuple(code_of), confusion)


def _codes(labels: Sequence[str], code_of: dict[str, int], name: str) -> np.ndarray:
    """Return the position of each label among the classes, int64 of shape (N,)."""
    unknown = sorted({str(label) for label in labels} - set(code_of))
    if unknown:
        raise ValueError(
            f"{name} has labels outside classes: {unknown}; classes are {list(code_of)}"
        )
    return np.asarray([code_of[str(label)] for label in labels], dtype=np.int64)


def _shares(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """Divide counts, with 0 where there is nothing to divide by."""
    shares = np.zeros(len(whole))
    np.divide(part, whole, out=shares, where=whole > 0)
    return shares
