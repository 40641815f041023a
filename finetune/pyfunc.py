"""A registered classifier behind MLflow's `predict` and `serve`: records in, labels out.

MLflow imports this module because ``MLmodel`` names it, and hands it the folder of the entry; the
entry itself holds no code and no pickle. A request has a record per cell, in one of two forms:

- sparse, ``{"genes": ["INS", "GCG"], "counts": [40, 2]}``: genes that are not named count zero,
- dense, ``{"counts": [0, 3, …]}``: every gene of the panel, in its order.

What is wrong with a request is answered with code 400 and one sentence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import pandas as pd
from mlflow.exceptions import MlflowException
from scipy import sparse

from finetune.classifier import CellClassifier, Predictions, load_classifier, predict
from finetune.export_files import check_contents, refuse_kinds, refuse_links
from finetune.novelty import novelty_of
from finetune.serving_contract import COUNTS, GENES, PROBABILITIES

if TYPE_CHECKING:
    from pretrain.export import Export

MAX_CELLS: Final = 1_000
"""Cells in one request; send more of them in several."""
MAX_COUNT: Final = 2**24
"""Highest count of a gene in a cell that is taken for one."""
MAX_GENES: Final = 100_000
"""Counts of one cell in a request."""
BATCH_SIZE: Final = 32


class CellLabeller:
    """Labels cells with a loaded classifier; the face that MLflow calls."""

    def __init__(self, model: CellClassifier, export: Export) -> None:
        self._model, self._export = model, export
        self._column_of = {gene: place for place, gene in enumerate(export.panel.names)}

    def predict(
        self, model_input: pd.DataFrame, params: Mapping[str, Any] | None = None
    ) -> list[dict[str, Any]]:
        """Label cells.

        Args:
            model_input: A row per cell, with `counts` and perhaps `genes`.
            params: ``{"probabilities": true}`` adds the probability of every class.

        Returns:
            A record per cell: label, confidence, novel, on request probabilities.

        Raises:
            MlflowException: With the code of a bad request, if a cell is not one.
        """
        try:
            counts = self._counts(model_input)
        except ValueError as error:
            raise MlflowException.invalid_parameter_value(str(error)) from None
        found = predict(self._model, counts, BATCH_SIZE, progress=False)
        return self._records(found, bool((params or {}).get(PROBABILITIES)))

    def _counts(self, cells: pd.DataFrame) -> sparse.csr_matrix:
        """Return the counts of all cells in panel order, (N, G)."""
        if not isinstance(cells, pd.DataFrame) or COUNTS not in cells:
            raise ValueError(
                f"give a record with {COUNTS!r} (and {GENES!r}) per cell, as "
                '{"dataframe_records": [{"genes": ["INS"], "counts": [40]}]}'
            )
        if not 1 <= len(cells) <= MAX_CELLS:
            raise ValueError(f"there are {len(cells)} cells; send 1 to {MAX_CELLS} in a request")
        names = cells[GENES] if GENES in cells else [None] * len(cells)
        rows = [
            self._row(number, counts, genes)
            for number, (counts, genes) in enumerate(zip(cells[COUNTS], names, strict=True))
        ]
        return sparse.vstack(rows, format="csr")

    def _row(self, number: int, counts: Any, genes: Any) -> sparse.csr_matrix:
        """Check one cell and return its counts, (1, G)."""
        values = _numbers(number, counts)
        num_genes = len(self._column_of)
        if _is_absent(genes):
            if len(values) != num_genes:
                raise ValueError(
                    f"cell {number} has {len(values)} counts; without {GENES!r} give one for each "
                    f"of the {num_genes} genes of the panel"
                )
            return sparse.csr_matrix(values[None, :])
        if not _is_list(genes) or len(genes) != len(values):
            raise ValueError(f"cell {number}: {GENES!r} must be a list as long as {COUNTS!r}")
        columns = [self._column_of.get(gene) for gene in map(str, genes)]
        known = [place for place, column in enumerate(columns) if column is not None]
        if not known:
            raise ValueError(
                f"cell {number} names no gene of the panel; the model knows names such as "
                f"{', '.join(list(self._column_of)[:3])}"
            )
        taken = np.array([columns[place] for place in known], dtype=np.int64)
        if len(np.unique(taken)) != len(taken):
            raise ValueError(f"cell {number} names a gene twice; give the sum of its counts")
        place = (np.zeros(len(taken), dtype=np.int64), taken)
        row: sparse.csr_matrix = sparse.csr_matrix((values[known], place), shape=(1, num_genes))
        row.sort_indices()
        return row

    def _records(self, found: Predictions, with_probabilities: bool) -> list[dict[str, Any]]:
        settings = self._export.metadata.get("novelty", {})
        _, novel = novelty_of(
            found, self._model.novelty, probability=settings.get("threshold", 0.5)
        )
        records: list[dict[str, Any]] = []
        for label, confidence, is_novel, row in zip(
            found.best, found.confidence, novel, found.probabilities, strict=True
        ):
            record: dict[str, Any] = {
                "label": label,
                "confidence": float(confidence),
                "novel": bool(is_novel),
            }
            if with_probabilities:
                record[PROBABILITIES] = dict(zip(found.labels, map(float, row), strict=True))
            records.append(record)
        return records


def _load_pyfunc(path: str) -> CellLabeller:
    """Open an entry; MLflow calls this by name.

    Raises:
        ValueError: If the entry holds what an entry may not.
    """
    folder = Path(path)
    refuse_links(folder)
    refuse_kinds([file.name for file in folder.iterdir() if file.name not in _OF_MLFLOW], folder)
    check_contents(folder)
    return CellLabeller(*load_classifier(folder))


_OF_MLFLOW: Final = {"registered_model_meta"}
"""What MLflow writes beside the files when it fetches an entry."""


def _numbers(number: int, counts: Any) -> np.ndarray:
    """Counts of a cell as float32, (G,), if that is what they are."""
    try:
        values = np.asarray(counts if _is_list(counts) else None, dtype=np.float64)
    except (TypeError, ValueError):
        values = np.zeros((0, 0))
    if values.ndim != 1 or not 1 <= len(values) <= MAX_GENES:
        raise ValueError(f"cell {number}: {COUNTS!r} must be a list of 1 to {MAX_GENES} numbers")
    if not np.isfinite(values).all() or (values < 0).any() or (values > MAX_COUNT).any():
        raise ValueError(f"cell {number}: counts must be numbers from 0 to {MAX_COUNT}")
    if (values != np.rint(values)).any():
        raise ValueError(f"cell {number}: counts must be whole; send raw counts, not normalised")
    return values.astype(np.float32)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray) and not isinstance(value, str | bytes)


def _is_absent(genes: Any) -> bool:
    return genes is None or (isinstance(genes, float) and np.isnan(genes))
