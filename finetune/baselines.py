"""What the network must beat: simple methods on the same split and the same genes.

``majority`` gives every cell the commonest training label. ``logistic_regression`` is done as well
as we know how, for a weak baseline proves nothing; its recipe was chosen by accuracy and macro-F1
on held-out cells of Baron's pancreas and 10x's pbmc3k, two to six splits each. On these two data
sets that flatters the baseline, not the network. In order:

1. Counts per 10,000, and of these log(1 + x); not standardised (1 to 2 points of macro-F1 better).
2. The 2,000 most variable genes of the training side, by dispersion among genes of similar mean.
3. Classes weighted by 1 / cells (about 2 points of macro-F1 better).
4. C by stratified three-fold cross-validation inside the training side, on out-of-fold macro-F1
   (half a point of macro-F1 better than on accuracy or log-likelihood).
"""

import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import scipy.sparse as sp
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from finetune.metrics import ClassificationScores, score

NUM_GENES = 2_000
"""Variable genes that logistic regression sees."""

PENALTIES = (0.001, 0.003, 0.01, 0.1, 1.0)
"""Values of scikit-learn's ``C`` to try, from the strongest regularisation to the weakest."""

NUM_FOLDS = 3
"""Folds for choosing ``C``."""

MAX_ITERATIONS = 1_000
"""Limit for the solver; the data we know need less than 200."""

NUM_MEAN_GROUPS = 20
"""Groups of genes of similar mean, within which dispersions are compared."""

LEVEL_POINTS = 0.05
"""Leads below this many points are called level."""

MIN_CELLS_PER_GENE = 3
"""A gene expressed in fewer training cells is never called variable."""


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
    """Fit every baseline on the training side and score it on the test side.

    Args:
        train_counts: Raw counts of the training cells, (N, G).
        train_labels: Their cell types.
        test_counts: Raw counts of the held-out cells, with the same genes in the same order.
        test_labels: Their cell types.
        classes: All cell types, in the order of the report.
        seed: Decides the folds inside the training side.

    Returns:
        Results in order of effort: majority, logistic regression.

    Raises:
        ValueError: As ``logistic_regression``.
    """
    return [
        majority(train_labels, test_labels, classes),
        logistic_regression(train_counts, train_labels, test_counts, test_labels, classes, seed),
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
    started = time.perf_counter()
    _check_side(train_counts, train_labels, "train")
    _check_side(test_counts, test_labels, "test")
    if train_counts.shape[1] != test_counts.shape[1]:
        raise ValueError(
            f"train_counts has {train_counts.shape[1]:,} genes and "
            f"test_counts {test_counts.shape[1]:,}; "
            "align both to the same gene panel"
        )
    if len(np.unique(train_labels)) < 2:
        raise ValueError(
            "train_labels hold fewer than two cell types; logistic regression needs two"
        )
    train_rates = _counts_per_10k(train_counts)
    genes = _variable_genes(train_rates, NUM_GENES)
    train = np.log1p(train_rates[:, genes].toarray())
    test = np.log1p(_counts_per_10k(test_counts)[:, genes].toarray())
    penalty = _tuned_penalty(train, train_labels, _folds(train_labels, NUM_FOLDS, seed))
    model = _fit(_model(penalty), train, train_labels)
    scores = score(list(test_labels), list(model.predict(test)), classes)
    setting = f"{len(genes):,} variable genes, C = {penalty:g} by {NUM_FOLDS}-fold cross-validation"
    if int(np.max(model.n_iter_)) >= MAX_ITERATIONS:
        setting += f", solver stopped after {MAX_ITERATIONS:,} iterations"
    return BaselineResult("logistic regression", scores, time.perf_counter() - started, setting)


def verdict(ours: ClassificationScores, baselines: Sequence[BaselineResult]) -> str:
    """Say in one sentence who won by accuracy and by macro-F1, and by how many points.

    The network is compared with the best baseline under each measure. A point is a hundredth; a
    lead under 0.05 points counts as none.

    Raises:
        ValueError: If there are no baselines, or one was scored on another number of cells.
    """
    if not baselines:
        raise ValueError("baselines is empty; run at least one to compare with")
    for baseline in baselines:
        if baseline.scores.num_cells != ours.num_cells:
            raise ValueError(
                f"{baseline.name} was scored on {baseline.scores.num_cells} cells "
                f"and the network on {ours.num_cells}; compare them on the same split"
            )
    by_accuracy = max(baselines, key=lambda baseline: baseline.scores.accuracy)
    by_macro_f1 = max(baselines, key=lambda baseline: baseline.scores.macro_f1)
    leads = [
        _Lead("accuracy", ours.accuracy, by_accuracy.scores.accuracy, by_accuracy.name),
        _Lead("macro-F1", ours.macro_f1, by_macro_f1.scores.macro_f1, by_macro_f1.name),
    ]
    first, second = leads
    if (first.side, first.rival) == (second.side, second.rival):
        body = f"{first.opening} {first.amount} and {second.amount}"
    else:
        joint = "and" if first.side == second.side else "but"
        body = f"{first.opening} {first.amount}, {joint} {second.opening} {second.amount}"
    return f"On {ours.num_cells:,} test cells {body}."


@dataclass(frozen=True)
class _Lead:
    """The network against its best rival under one measure."""

    measure: str
    ours: float
    theirs: float
    rival: str

    @property
    def points(self) -> float:
        """Lead of the network in hundredths; negative when it lost."""
        return 100 * (self.ours - self.theirs)

    @property
    def side(self) -> int:
        """1 when the network won, -1 when it lost, 0 when they are level."""
        return 0 if abs(self.points) < LEVEL_POINTS else int(np.sign(self.points))

    @property
    def opening(self) -> str:
        """Who did what, up to the amount."""
        return {
            1: f"the network beats {self.rival} by",
            0: f"the network and {self.rival} are level by",
            -1: f"{self.rival} beats the network by",
        }[self.side]

    @property
    def amount(self) -> str:
        """By how much, with both values, the winner's first."""
        if self.side == 0:
            return f"{self.measure} ({100 * self.ours:.1f})"
        size = f"{abs(self.points):.1f}"
        unit = "point" if size == "1.0" else "points"
        better, worse = sorted((100 * self.ours, 100 * self.theirs), reverse=True)
        return f"{size} {unit} of {self.measure} ({better:.1f} against {worse:.1f})"


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


def _counts_per_10k(counts: sp.csr_matrix) -> sp.csr_matrix:
    """Return counts per 10,000 of each cell, float32; a cell without counts stays empty."""
    rates = counts.astype(np.float32)  # a copy
    totals = np.asarray(counts.sum(axis=1), dtype=np.float64).ravel()
    factors = np.divide(1e4, totals, out=np.zeros(len(totals)), where=totals > 0)
    rates.data *= np.repeat(factors, np.diff(counts.indptr)).astype(np.float32)
    return rates


def _variable_genes(rates: sp.csr_matrix, num_genes: int) -> np.ndarray:
    """Return the most variable genes' columns, sorted.

    Variable is what has a high dispersion for its mean: log(variance / mean) is standardised within
    groups of genes of similar mean.
    """
    num_cells = rates.shape[0]
    num_expressing = np.bincount(rates.indices, minlength=rates.shape[1])
    mean = np.asarray(rates.sum(axis=0), dtype=np.float64).ravel() / num_cells
    mean_square = np.asarray(rates.power(2).sum(axis=0), dtype=np.float64).ravel() / num_cells
    variance = np.maximum(mean_square - mean**2, 0)
    candidates = np.flatnonzero((num_expressing >= MIN_CELLS_PER_GENE) & (variance > 0))
    if len(candidates) <= num_genes:
        return candidates if len(candidates) else np.arange(rates.shape[1])
    dispersion = np.log(variance[candidates] / mean[candidates])
    standardised = np.empty(len(candidates))
    by_mean = np.argsort(mean[candidates], kind="stable")
    for group in np.array_split(by_mean, NUM_MEAN_GROUPS):
        spread = dispersion[group].std() or 1.0
        standardised[group] = (dispersion[group] - dispersion[group].mean()) / spread
    return np.sort(candidates[np.argsort(-standardised, kind="stable")[:num_genes]])


def _folds(labels: np.ndarray, num_folds: int, seed: int) -> np.ndarray:
    """Deal the cells of each class to folds in turn, (N,).

    The only cell of a class gets -1: it is always trained on. So every class is known in every
    fold, however few its cells, which scikit-learn's StratifiedKFold does not promise.
    """
    rng = np.random.default_rng([seed, num_folds])
    folds = np.full(len(labels), -1)
    for name in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == name))
        if len(rows) > 1:
            # A random first fold spreads the small classes over all folds.
            folds[rows] = (np.arange(len(rows)) + rng.integers(num_folds)) % num_folds
    return folds


def _tuned_penalty(x: np.ndarray, labels: np.ndarray, folds: np.ndarray) -> float:
    """Return the ``C`` of best macro-F1 out of fold; of equals, the strongest regularisation.

    Predictions are pooled over the folds before scoring, so a class of two cells counts once, not
    as a fold's noise.
    """
    if np.all(folds < 0):  # each class has a single cell: nothing to learn from
        return PENALTIES[len(PENALTIES) // 2]
    predicted = {penalty: labels.astype(object) for penalty in PENALTIES}
    for fold in np.unique(folds[folds >= 0]):
        is_held_out = folds == fold
        model = _model(PENALTIES[0])
        for penalty in PENALTIES:  # each fit starts from the former one's weights
            model.set_params(C=penalty)
            _fit(model, x[~is_held_out], labels[~is_held_out])
            predicted[penalty][is_held_out] = model.predict(x[is_held_out])
    is_scored = folds >= 0
    classes = [str(name) for name in np.unique(labels)]
    quality = {}
    for penalty in PENALTIES:
        scores = score(list(labels[is_scored]), list(predicted[penalty][is_scored]), classes)
        quality[penalty] = scores.macro_f1
    return max(PENALTIES, key=lambda penalty: quality[penalty])  # the first of equals


def _model(penalty: float) -> LogisticRegression:
    return LogisticRegression(
        C=penalty, class_weight="balanced", max_iter=MAX_ITERATIONS, warm_start=True
    )


def _fit(model: LogisticRegression, x: np.ndarray, labels: np.ndarray) -> LogisticRegression:
    """Fit in place; ``setting`` reports a solver stopped early, not a warning per fold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        model.fit(x, labels)
    return model
