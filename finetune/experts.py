"""Linear experts on expression; `finetune.expert_pool` tunes and joins them.

Each expert turns a cell's expression into a logit per type by one matrix:

- `regression`: multinomial logistic regression with L2 penalty, classes weighted by 1 / cells;
- `wide`: the same on three times as many genes: what tells types in other data may vary little
  here;
- `discriminant`: linear discriminant analysis, its covariance shrunk towards a multiple of the
  identity;
- `correlation`: correlation with the mean of each type;
- `thinned`: logistic regression on cells brought to equal length, each learnt as it is and once
  more thinned to a random share of its counts, as if it had been sequenced less deeply.
"""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final, TypeAlias

import numpy as np
import scipy.sparse as sp
from numpy.typing import NDArray
from scipy.linalg import eigh
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

Array = NDArray[np.float32]
Cells: TypeAlias = Array | sp.csr_matrix
"""Expression of cells on a scale, (N, K)."""

NUM_GENES: Final = 2_000
"""Variable genes that an expert sees."""
WIDE_GENES: Final = 6_000
"""Variable genes that the wide one sees."""
PENALTIES: Final = (0.001, 0.003, 0.01, 0.1, 1.0)
"""Values of scikit-learn's ``C`` to try, from the strongest regularisation to the weakest."""
WIDE_PENALTIES: Final = PENALTIES[:3]
"""The same for the wide one, whose weights share what there is to tell between more genes."""
MAX_ITERATIONS: Final = 1_000
"""Limit for the solver; the data we know need less than 200."""
SHRINKAGES: Final = (0.9, 0.7, 0.5, 0.3, 0.1)
"""Shares of the identity in a covariance to try."""
THINNED_PENALTY: Final = 0.01
"""Value of ``C`` for the regression on thinned cells; not tuned, which would double all costs."""
LEAST_SHARE: Final = 0.1
"""Thinned cells keep a share of their counts between this and 1, even in its logarithm."""
CORRELATION_SCALE: Final = 40.0
"""Factor that makes a logit of a correlation; its temperature is tuned anyway."""


@dataclass(frozen=True)
class LinearMap:
    """Logits of expression: `x @ weight.T + bias`.

    Attributes:
        weight: (C, K).
        bias: (C,).
    """

    weight: Array
    bias: Array

    def __call__(self, x: Cells) -> Array:
        """Return logits, (N, C)."""
        return np.asarray(x @ self.weight.T + self.bias, np.float32)

    def times(self, factor: float) -> "LinearMap":
        """The map whose logits are multiplied."""
        return LinearMap(self.weight * np.float32(factor), self.bias * np.float32(factor))

    def spread(self, places: NDArray[np.int64], num_genes: int) -> "LinearMap":
        """The map of more genes, of which its own lie at `places`, (K,); others weigh nothing."""
        weight = np.zeros((len(self.weight), num_genes), np.float32)
        weight[:, places] = self.weight
        return LinearMap(weight, self.bias)


FitFunction = Callable[[Cells, NDArray[np.int64], Sequence[float]], list[LinearMap]]


@dataclass(frozen=True)
class Expert:
    """How one expert is fitted.

    Attributes:
        scale: Scale of expression that it sees (`finetune.expression.SCALES`).
        settings: Values to tune over, most regularised first.
        fit: Cells (N, K), type codes (N,) and settings to one map for each setting.
        sparse: Whether it is given them as a CSR matrix, which takes a half to a third of the time
            and a fraction of the memory.
        thinned: Whether it learns from thinned copies of the cells as well.
        num_genes: Variable genes that it sees.
    """

    scale: str
    settings: tuple[float, ...]
    fit: FitFunction
    sparse: bool = False
    thinned: bool = False
    num_genes: int = NUM_GENES


def fit_regression(
    x: Cells, codes: NDArray[np.int64], penalties: Sequence[float]
) -> list[LinearMap]:
    """Fit logistic regressions; each starts from the former one's weights."""
    model = LogisticRegression(class_weight="balanced", max_iter=MAX_ITERATIONS, warm_start=True)
    maps = []
    for penalty in penalties:
        model.set_params(C=penalty)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)
            model.fit(x, codes)
        weight, bias = model.coef_, model.intercept_
        if len(weight) == 1:  # of two classes scikit-learn keeps the difference only
            weight, bias = np.concatenate([-weight, weight]) / 2, np.concatenate([-bias, bias]) / 2
        maps.append(LinearMap(weight.astype(np.float32), bias.astype(np.float32)))
    return maps


def fit_discriminant(
    x: Array, codes: NDArray[np.int64], shrinkages: Sequence[float]
) -> list[LinearMap]:
    """Fit linear discriminants with equal priors; one decomposition serves all shrinkages.

    The covariance within types is (1 - s) S + s tr(S) / K: its eigenvectors are those of S. With
    fewer cells than genes they come from the smaller matrix of products between cells.

    The mean of n cells lies off the type's own by noise, which makes every cell look farther from
    it, by tr(W C) / n in the squared distance (W the inverse taken, C the true covariance): a type
    of one cell would never be given. What small types lose more than the largest is given back
    (Huang, Tong and Zhao 2010, Bias-corrected diagonal discriminant rules, Biometrics 66).
    """
    num_cells, num_genes = x.shape
    means = class_means(x, codes)
    residuals = (x - means[codes]).astype(np.float64)
    degrees = max(1, num_cells - len(means))
    if num_cells < num_genes:
        values, vectors = eigh(residuals @ residuals.T)
        kept = values > values[-1] * 1e-10
        values, vectors = values[kept], residuals.T @ vectors[:, kept] / np.sqrt(values[kept])
    else:
        values, vectors = eigh(residuals.T @ residuals)
    spread = np.maximum(values, 0) / degrees
    level = max(spread.sum() / num_genes, 1e-8)
    sizes = np.bincount(codes)
    outside = share_outside(residuals, codes)
    centre = means.mean(axis=0)
    shifts = means - centre  # (C, K)
    turned = shifts @ vectors
    maps = []
    for shrinkage in shrinkages:
        base = 1 / (shrinkage * level)
        inner = 1 / ((1 - shrinkage) * spread + shrinkage * level)
        weight = (turned * (inner - base)) @ vectors.T + shifts * base
        bias = -0.5 * (weight * shifts).sum(axis=1) - weight @ centre
        noise = outside * base * spread.sum() + (1 - outside) * (inner * spread).sum()
        bias += 0.5 * noise * (1 / sizes - 1 / sizes.max())
        maps.append(LinearMap(weight.astype(np.float32), bias.astype(np.float32)))
    return maps


def share_outside(residuals: NDArray[np.float64], codes: NDArray[np.int64]) -> float:
    """Share of a cell's variance that lies outside of what other cells vary in.

    Every other cell of each type is laid into the span of the rest.

    Args:
        residuals: Cells less the means of their types, (N, K).
        codes: Type codes, (N,).
    """
    is_other = np.zeros(len(codes), bool)
    is_other[np.argsort(codes, kind="stable")[::2]] = True
    ours, others = residuals[~is_other], residuals[is_other]
    values, vectors = eigh(others @ others.T)
    kept = values > values[-1] * 1e-10
    laid = (ours @ others.T) @ vectors[:, kept] / np.sqrt(values[kept])
    whole = float((ours**2).sum())
    return max(0.0, 1 - float((laid**2).sum()) / whole) if whole > 0 else 1.0


def fit_correlation(
    x: Array, codes: NDArray[np.int64], factors: Sequence[float]
) -> list[LinearMap]:
    """Correlate with the means of the types; `x` is standardised within each cell."""
    means = class_means(x, codes)
    norms = np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-6)
    means = means / norms / np.sqrt(x.shape[1])  # a cell's norm is the root of K
    bias = np.zeros(len(means), np.float32)
    return [LinearMap(means.astype(np.float32), bias).times(factor) for factor in factors]


EXPERTS: Final[dict[str, Expert]] = {
    "regression": Expert("log", PENALTIES, fit_regression, sparse=True),
    "wide": Expert("log", WIDE_PENALTIES, fit_regression, sparse=True, num_genes=WIDE_GENES),
    "discriminant": Expert("log", SHRINKAGES, fit_discriminant),
    "correlation": Expert("standardised", (CORRELATION_SCALE,), fit_correlation),
    "thinned": Expert("unit", (THINNED_PENALTY,), fit_regression, sparse=True, thinned=True),
}
FEW_CELL_EXPERTS: Final = ("regression", "wide", "discriminant")
"""Experts to pool with few cells. With 10 cells of each type they are together ahead of regression
alone, within data sets as across; discriminants of the square root, of 6,000 genes or of genes
divided by their spread helped within data sets and lost across them, and so did correlations."""
MANY_CELL_EXPERTS: Final = ("regression", "wide", "thinned")
"""Experts to pool with many: those of class means are worse across data sets, thinned copies of few
cells are worse within one."""


def thinned(counts: sp.csr_matrix, seed: int) -> sp.csr_matrix:
    """Keep each count with a chance that is drawn for its cell, `LEAST_SHARE` to 1."""
    rng = np.random.default_rng([seed, 4])
    shares = np.exp(rng.uniform(np.log(LEAST_SHARE), 0, counts.shape[0]))
    kept = sp.csr_matrix(counts, dtype=np.float32, copy=True)
    whole = np.rint(kept.data).astype(np.int64)
    kept.data = rng.binomial(whole, np.repeat(shares, np.diff(kept.indptr))).astype(np.float32)
    return kept


def class_means(x: Array, codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Mean of each class, (C, K)."""
    return np.stack([x[codes == code].mean(axis=0, dtype=np.float64) for code in np.unique(codes)])
