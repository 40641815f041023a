"""What the network must beat: simple methods on the same split and the same genes.

``majority`` gives every cell the commonest training label, ``nearest mean`` the type whose mean
expression correlates best, ``marker scoring`` the type whose markers are expressed most.
``logistic regression`` is done as well as we know how, for a weak baseline proves nothing; its
recipe was chosen by accuracy and macro-F1 on held-out cells of Baron's pancreas and 10x's pbmc3k,
two to six splits each. On these two data sets that flatters the baseline, not the network. In
order:

1. Counts per 10,000, and of these log(1 + x); not standardised (1 to 2 points of macro-F1 better).
2. The 2,000 most variable genes of the training side, by dispersion among genes of similar mean.
3. Classes weighted by 1 / cells (about 2 points of macro-F1 better).
4. C by stratified three-fold cross-validation inside the training side, on out-of-fold macro-F1
   (half a point of macro-F1 better than on accuracy or log-likelihood).
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray

from finetune.expert_pool import ExpertPool, fit_pool
from finetune.expression import counts_per_10k, scaled
from finetune.metrics import ClassificationScores, score


@dataclass(frozen=True, eq=False)
class BaselineResult:
    """One baseline on one split."""

    name: str
    """As the report prints it, such as ``logistic regression``."""

    scores: ClassificationScores
    """Scores on the test side."""

    seconds: float
    """Wall-clock time of fitting, tuning included, and predicting."""

    setting: str
    """What was chosen on the training side, in words."""


def run_baselines(
    train_counts: sp.csr_matrix,
    train_labels: np.ndarray,
    test_counts: sp.csr_matrix,
    test_labels: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> list[BaselineResult]:
    """Fit the cheap baselines on the training side and score them on the test side.

    Args:
        train_counts: Raw counts of the training cells, (N, G).
        train_labels: Their cell types.
        test_counts: Raw counts of the held-out cells, with the same genes in the same order.
        test_labels: Their cell types.
        classes: All cell types, in the order of the report.
        seed: Decides the folds inside the training side.

    Returns:
        Results in order of effort: majority, nearest mean, logistic regression.

    Raises:
        ValueError: As ``logistic_regression``.
    """
    sides = (train_counts, train_labels, test_counts, test_labels, classes, seed)
    return [
        majority(train_labels, test_labels, classes),
        nearest_mean(*sides),
        logistic_regression(*sides),
    ]


def majority(
    train_labels: np.ndarray, test_labels: np.ndarray, classes: Sequence[str]
) -> BaselineResult:
    """Give every test cell the commonest training label, of equals the alphabetically first."""
    started = time.perf_counter()
    names, num_cells = np.unique(train_labels, return_counts=True)
    commonest = str(names[np.argmax(num_cells)])
    scores = score(list(test_labels), [commonest] * len(test_labels), classes)
    seconds = time.perf_counter() - started
    return BaselineResult("majority", scores, seconds, f"always {commonest!r}")


def nearest_mean(
    train_counts: sp.csr_matrix,
    train_labels: np.ndarray,
    test_counts: sp.csr_matrix,
    test_labels: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> BaselineResult:
    """Give each cell the type whose mean log expression correlates best, on variable genes.

    Arguments and errors as `logistic_regression`.
    """
    return _linear(
        "nearest mean",
        "correlation",
        (train_counts, train_labels),
        (test_counts, test_labels),
        classes,
        seed,
    )


def logistic_regression(
    train_counts: sp.csr_matrix,
    train_labels: np.ndarray,
    test_counts: sp.csr_matrix,
    test_labels: np.ndarray,
    classes: Sequence[str],
    seed: int,
) -> BaselineResult:
    """Fit and score multinomial logistic regression on variable genes, as the module describes.

    Nothing of the test side enters genes, weights or ``C``. The same arguments give the same
    result.

    Args:
        train_counts: Raw counts of the training cells, (N, G).
        train_labels: Their cell types.
        test_counts: Raw counts of the held-out cells, with the same genes in the same order.
        test_labels: Their cell types.
        classes: All cell types, in the order of the report.
        seed: Decides the folds inside the training side.

    Returns:
        The result; ``setting`` names the genes and ``C``.

    Raises:
        ValueError: If counts and labels do not fit each other, counts are negative or not finite,
            or the training side has one cell type only.
    """
    return _linear(
        "logistic regression",
        "regression",
        (train_counts, train_labels),
        (test_counts, test_labels),
        classes,
        seed,
    )


def marker_scoring(
    counts: sp.csr_matrix,
    genes: Sequence[str],
    labels: np.ndarray,
    classes: Sequence[str],
    markers: Mapping[str, Sequence[str]],
) -> BaselineResult:
    """Give each cell the type whose markers have the highest mean of standardised expression.

    Nothing is trained. A type without a marker among the genes is never given.

    Args:
        counts: Raw counts of the cells to label, (N, G).
        genes: Name of each gene.
        labels: True types of the cells.
        classes: All cell types, in the order of the report.
        markers: Marker genes of the types, by the names in ``classes``.

    Raises:
        ValueError: If no type has a marker among the genes.
    """
    started = time.perf_counter()
    known = sum(any(gene in set(genes) for gene in markers.get(name, ())) for name in classes)
    names = marker_types(counts, genes, classes, markers)
    scores = score(list(labels), names.tolist(), classes)
    setting = f"markers of {known} of {len(classes)} types"
    return BaselineResult("marker scoring", scores, time.perf_counter() - started, setting)


def marker_types(
    counts: sp.csr_matrix,
    genes: Sequence[str],
    classes: Sequence[str],
    markers: Mapping[str, Sequence[str]],
) -> NDArray[np.str_]:
    """Type of each cell by its markers, (N,); arguments and errors as `marker_scoring`."""
    position = {name: place for place, name in enumerate(genes)}
    found = {
        name: np.array(sorted({position[gene] for gene in markers[name] if gene in position}))
        for name in classes
        if name in markers
    }
    found = {name: places for name, places in found.items() if len(places)}
    if not found:
        raise ValueError(
            "the table of markers has no marker of these cell types among the genes; name the "
            "table's type for each label (--marker_types)"
        )
    used = np.unique(np.concatenate(list(found.values())))
    x = scaled(counts_per_10k(counts), used, "log")
    x = (x - x.mean(axis=0)) / np.maximum(x.std(axis=0), 1e-6)
    means = [x[:, np.searchsorted(used, places)].mean(axis=1) for places in found.values()]
    best = np.stack(means).argmax(axis=0)
    return np.asarray([list(found)[place] for place in best], np.str_)


def regression_of(
    pool: ExpertPool, seconds: float, test: tuple[sp.csr_matrix, np.ndarray], classes: Sequence[str]
) -> BaselineResult:
    """Score the logistic regression that is a pool's expert: the same fit as the baseline's."""
    expert = pool.tuned["regression"]
    logits = pool.logits_of(expert.map, counts_per_10k(test[0]), "log")
    names = [pool.classes[code] for code in logits.argmax(axis=1)]
    setting = f"{len(pool.variable):,} variable genes, C = {expert.value:g} by cross-validation"
    scores = score(list(test[1]), names, classes)
    return BaselineResult("logistic regression", scores, seconds, setting)


def _linear(
    name: str,
    expert: str,
    train: tuple[sp.csr_matrix, NDArray[np.str_]],
    test: tuple[sp.csr_matrix, NDArray[np.str_]],
    classes: Sequence[str],
    seed: int,
) -> BaselineResult:
    """Fit one expert alone and score it."""
    started = time.perf_counter()
    check_sides(train, test)
    pool = fit_pool(train[0], train[1], seed, [expert])
    predicted = [pool.classes[code] for code in pool.predict(test[0]).argmax(axis=1)]
    scores = score(list(test[1]), predicted, classes)
    setting = f"{len(pool.genes):,} variable genes"
    if expert == "regression":
        setting += f", C = {pool.tuned[expert].value:g} by cross-validation"
    return BaselineResult(name, scores, time.perf_counter() - started, setting)


def check_sides(
    train: tuple[sp.csr_matrix, NDArray[np.str_]], test: tuple[sp.csr_matrix, NDArray[np.str_]]
) -> None:
    """Refuse counts and labels that do not fit each other.

    Raises:
        ValueError: Saying which side and what to give.
    """
    _check_side(*train, "train")
    _check_side(*test, "test")
    if train[0].shape[1] != test[0].shape[1]:
        raise ValueError(
            f"train_counts has {train[0].shape[1]:,} genes and "
            f"test_counts {test[0].shape[1]:,}; "
            "align both to the same gene panel"
        )
    if len(np.unique(train[1])) < 2:
        raise ValueError("train_labels hold fewer than two cell types; a classifier needs two")


def _check_side(counts: sp.csr_matrix, labels: np.ndarray, side: str) -> None:
    """Refuse counts that do not fit their labels or are no counts."""
    if counts.shape[0] != len(labels):
        raise ValueError(
            f"{side}_counts has {counts.shape[0]:,} cells and {side}_labels {len(labels):,}; "
            "give one label per cell"
        )
    if not sp.issparse(counts) or counts.format != "csr":
        raise ValueError(f"{side}_counts is a {type(counts).__name__}; give a SciPy CSR matrix")
    if counts.nnz and not (np.isfinite(counts.data).all() and counts.data.min() >= 0):
        raise ValueError(
            f"{side}_counts has negative or non-finite values; "
            "give raw counts, not scaled expression"
        )
