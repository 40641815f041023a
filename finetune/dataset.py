"""Labelled cells: check the labels, and split the cells into a training and a test side.

Both functions are pure: the same labels, share and seed give the same rows on every machine, so the
network and the baselines it must beat see the same split.
"""

import warnings
from collections.abc import Iterable

import numpy as np
import pandas as pd

TEXT_FOR_MISSING = ("", "nan", "<NA>")
"""What pandas leaves behind when a missing label is turned into text."""


def check_labels(values: Iterable[object] | None, key: str) -> np.ndarray:
    """Return cell-type labels as text, or refuse them by name.

    Labels that are all numbers (cluster numbers, codes) are accepted with a warning; whole floats
    lose their ``.0``.

    Args:
        values: One label per cell, in the order of the cells: a column of ``obs``, an array or a
            list.
        key: Name of the column in ``obs``, for the messages.

    Returns:
        Labels of shape (N,), NumPy text.

    Raises:
        ValueError: If there are no labels, some are missing, or all cells have the same one.
    """
    labels = np.asarray([] if values is None else list(values), dtype=object)
    if labels.ndim != 1 or len(labels) == 0:
        raise ValueError(
            f"obs[{key!r}] has no labels (shape {labels.shape}); "
            "give a cell type for each of one or more cells"
        )
    _refuse_missing(labels, key)
    text = np.asarray([_as_text(label) for label in labels])
    if split := [name for name in np.unique(text) if len(str(name).splitlines()) > 1]:
        raise ValueError(
            f"obs[{key!r}] holds {str(split[0])!r}, a name with a line break; rename this type"
        )
    classes = np.unique(text)
    if len(classes) < 2:
        raise ValueError(
            f"obs[{key!r}] holds one cell type only ({str(classes[0])!r}, {len(text):,} cells); "
            "training a classifier needs two or more, so name another column"
        )
    if all(_is_number(name) for name in classes):
        warnings.warn(
            f"obs[{key!r}] holds numbers ({', '.join(classes[:3])}, …); "
            "they are taken as names of cell types: check that they are not "
            "cluster numbers, measurements or codes",
            UserWarning,
            stacklevel=2,
        )
    return text


def stratified_split(
    labels: np.ndarray, test_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split rows into training and test, class by class.

    Each class gives the nearest whole number of its cells to the test side, yet keeps one on each
    side if it has two or more. The only cell of a class goes to training.

    Args:
        labels: Cell types of shape (N,), at least two different ones.
        test_share: Share of each class to hold out, in (0, 1).
        seed: The same seed holds out the same rows.

    Returns:
        Training rows and test rows, each int64 and sorted; together every row once.

    Raises:
        ValueError: If ``test_share`` is not inside (0, 1), or there are fewer than two classes.
    """
    if not 0 < test_share < 1:
        raise ValueError(
            f"test_share is {test_share}; give the share of cells to hold out, between 0 and 1"
        )
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError(
            f"labels hold {len(classes)} cell type(s) in {len(labels):,} cells; "
            "a split needs two or more"
        )
    rng = np.random.default_rng(seed)
    is_test = np.zeros(len(codes), dtype=bool)
    for code in range(len(classes)):
        rows = rng.permutation(np.flatnonzero(codes == code))
        is_test[rows[: _num_held_out(len(rows), test_share)]] = True
    return np.flatnonzero(~is_test), np.flatnonzero(is_test)


def stratified_folds(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Deal the cells of each class to folds in turn.

    The only cell of a class is always trained on. So every class is known in every fold, however
    few its cells, which scikit-learn's StratifiedKFold does not promise.

    Args:
        labels: Cell types, (N,).
        num_folds: How many folds, two or more.
        seed: The same seed gives the same folds.

    Returns:
        Fold of each cell, int64 of shape (N,); -1 for the only cell of a class.

    Raises:
        ValueError: If there are fewer than two folds.
    """
    if num_folds < 2:
        raise ValueError(f"num_folds is {num_folds}; give two or more")
    rng = np.random.default_rng([seed, num_folds])
    folds = np.full(len(labels), -1)
    for name in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == name))
        if len(rows) > 1:
            # A random first fold spreads the small classes over all folds.
            folds[rows] = (np.arange(len(rows)) + rng.integers(num_folds)) % num_folds
    return folds


def _num_held_out(num_cells: int, test_share: float) -> int:
    """Cells of one class for the test side: the nearest whole number that leaves both sides one."""
    if num_cells < 2:
        return 0
    return min(max(int(test_share * num_cells + 0.5), 1), num_cells - 1)


def _refuse_missing(labels: np.ndarray, key: str) -> None:
    """Raise if a label is missing, be it as NaN, None or NA or as the text that these turn into."""
    is_missing = np.asarray(pd.isna(labels), dtype=bool)
    if is_missing.any():
        raise ValueError(
            f"obs[{key!r}] lacks a label for {is_missing.sum():,} of {len(labels):,} cells (NaN); "
            f"drop them with adata = adata[adata.obs[{key!r}].notna()].copy()"
        )
    is_blank = np.asarray([str(label).strip() in TEXT_FOR_MISSING for label in labels])
    if is_blank.any():
        raise ValueError(
            f"obs[{key!r}] has empty or 'nan' text for {is_blank.sum():,} of {len(labels):,} "
            "cells; drop them with "
            f"adata = adata[~adata.obs[{key!r}].isin({list(TEXT_FOR_MISSING)})].copy()"
        )


def _as_text(label: object) -> str:
    if isinstance(label, float | np.floating) and float(label).is_integer():
        return str(int(label))
    return str(label)


def _is_number(name: str) -> bool:
    try:
        float(name)
    except ValueError:
        return False
    return True
