"""The pool of linear experts on expression: what the network's logits start from.

1. Cells are dealt to folds. Each expert predicts the cells that it was not fitted on; by these
   predictions its own setting is tuned (macro-F1), then its temperature (log-likelihood).
2. The experts' log-probabilities are averaged: one that is often wrong is unsure, and says little.
   Types of few cells get a bonus, for a new cell of theirs is less like the few than these are.
   Should regression alone be right about significantly more cells out of fold, it is taken alone;
   so the pool starts where tuned logistic regression ends.
3. All experts are fitted again on all cells. As a softmax does not see what is common to all types,
   the mean of log-probabilities is again a linear map of expression, one on each scale.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import scipy.sparse as sp
import torch
from numpy.typing import NDArray
from scipy.special import log_softmax
from scipy.stats import binomtest
from threadpoolctl import threadpool_limits

from finetune.dataset import stratified_folds
from finetune.experts import (
    EXPERTS,
    FEW_CELL_EXPERTS,
    MANY_CELL_EXPERTS,
    NUM_GENES,
    Array,
    Cells,
    Expert,
    LinearMap,
    thinned,
)
from finetune.expression import (
    DENSE_CELLS,
    counts_per_10k,
    on_scale,
    scaled,
    sparsely_scaled,
    variable_genes,
)
from finetune.metrics import score

NUM_FOLDS: Final = 3
SMALL: Final = 1 << 26
"""Values of expression below which experts are fitted on one thread."""
MANY_CELLS: Final = 1_000
"""From so many training cells on, the regression on thinned cells takes the place of what goes by
class means: trained on the 2,700 cells of 10x's pbmc3k, these lost 1 to 3 points of accuracy on
Kang's cells."""
BONUSES: Final = (0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
"""What a type of one cell may get in the logits."""


@dataclass(frozen=True, kw_only=True)
class ExpertPool:
    """Experts fitted on all cells and merged to one linear map on each scale.

    Attributes:
        classes: Names of the types, C, in the order of the logits.
        genes: Columns of the counts that are seen, (K,).
        variable: The `NUM_GENES` most variable of them; scales that compare a cell's genes with
            each other see these.
        maps: Map by scale, of all genes seen; the pool's logits are their sum.
        folds: Fold of each training cell, (N,), -1 if it was never held out.
        logits: Logits of each training cell from experts that did not see it, (N, C).
        weights: Weight of each expert by name: alike, or regression's alone.
        bonus: What types of one cell get in the logits; those of n cells, this by n².
        tuned: Each expert by name, alone.
    """

    classes: tuple[str, ...]
    genes: NDArray[np.int64]
    variable: NDArray[np.int64]
    maps: Mapping[str, LinearMap]
    folds: NDArray[np.int64]
    logits: Array
    weights: Mapping[str, float]
    bonus: float
    tuned: Mapping[str, "TunedExpert"]

    @property
    def setting(self) -> str:
        """What was tuned, in words."""
        parts = (f"{name} {self.tuned[name].value:g}" for name, w in self.weights.items() if w)
        return f"{len(self.genes):,} variable genes; {', '.join(parts)}"

    @property
    def compared(self) -> NDArray[np.bool_]:
        """Which of the genes are among the most variable ones, (K,)."""
        return np.isin(self.genes, self.variable)

    def logits_of(self, found: LinearMap, rates: sp.csr_matrix, scale: str) -> Array:
        """Logits, (N, C), by one map on a scale, of counts per 10,000, (N, G)."""
        seen, compared = rates[:, self.genes], torch.from_numpy(self.compared)
        parts = [found(np.zeros((0, len(self.genes)), np.float32))]
        for start in range(0, seen.shape[0], DENSE_CELLS):
            dense = torch.from_numpy(seen[start : start + DENSE_CELLS].toarray())
            parts.append(found(on_scale(dense, scale, compared).numpy()))
        return np.concatenate(parts)

    def predict(self, counts: sp.csr_matrix) -> Array:
        """Logits of cells, (N, C), of raw counts with the same genes, (N, G)."""
        rates = counts_per_10k(counts)
        parts = [self.logits_of(found, rates, scale) for scale, found in self.maps.items()]
        return np.asarray(np.sum(parts, axis=0), np.float32)


@dataclass(frozen=True)
class TunedExpert:
    """One expert with its best setting and temperature.

    Attributes:
        value: The setting.
        map: Fitted on all cells; its logits are divided by the temperature. Of a pool's expert it
            takes all genes of the pool, and weighs those that it does not see by zero.
        logits: Of each training cell, from a fit that did not see it, (N, C).
    """

    value: float
    map: LinearMap
    logits: Array


def fit_pool(
    counts: sp.csr_matrix,
    labels: NDArray[np.str_],
    seed: int,
    experts: Sequence[str] | None = None,
) -> ExpertPool:
    """Tune and fit experts on training cells, and pool them.

    Args:
        counts: Raw counts, (N, G).
        labels: Cell types, (N,), two or more different ones.
        seed: Decides the folds.
        experts: Names of the experts, in `EXPERTS`; none takes those that suit the number of cells.

    Raises:
        ValueError: If there are fewer than two types, or an expert is not known.
    """
    if experts is None:
        experts = MANY_CELL_EXPERTS if len(labels) >= MANY_CELLS else FEW_CELL_EXPERTS
    if unknown := sorted(set(experts) - set(EXPERTS)):
        raise ValueError(f"there is no expert {unknown[0]!r}; there are {', '.join(EXPERTS)}")
    classes, codes = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise ValueError("labels hold fewer than two cell types; experts need two")
    rates = counts_per_10k(counts)
    genes = variable_genes(rates, max(EXPERTS[name].num_genes for name in experts))
    folds = stratified_folds(labels, NUM_FOLDS, seed)
    tuned = {}
    for name in experts:
        expert = EXPERTS[name]
        own = variable_genes(rates, expert.num_genes)
        seen = sparsely_scaled if expert.sparse else scaled
        more = None
        if expert.thinned:
            more = seen(counts_per_10k(thinned(counts, seed)), own, expert.scale)
        found = tune(expert, seen(rates, own, expert.scale), more, codes, folds)
        tuned[name] = replace(found, map=found.map.spread(np.searchsorted(genes, own), len(genes)))
    weights, bonus = dict.fromkeys(tuned, 1 / len(tuned)), 0.0
    pooled = np.mean([found.logits for found in tuned.values()], axis=0)
    if len(tuned) > 1:
        rare = rarity(codes, folds)
        bonus = rare_bonus(pooled, rare, codes, folds >= 0)
        pooled += bonus * rare
    if "regression" in tuned and is_worse(pooled, tuned["regression"].logits, codes, folds >= 0):
        weights = {name: float(name == "regression") for name in tuned}
        pooled, bonus = tuned["regression"].logits, 0.0
    merged: dict[str, LinearMap] = {}
    for name, weight in weights.items():
        part = tuned[name].map.times(weight)
        former = merged.get(EXPERTS[name].scale)
        if former is not None:
            part = LinearMap(former.weight + part.weight, former.bias + part.bias)
        merged[EXPERTS[name].scale] = part
    first, given = next(iter(merged)), bonus / np.bincount(codes) ** 2
    merged[first] = LinearMap(merged[first].weight, merged[first].bias + given.astype(np.float32))
    return ExpertPool(
        classes=tuple(str(name) for name in classes),
        genes=genes,
        variable=variable_genes(rates, NUM_GENES),
        maps={scale: found for scale, found in merged.items() if np.any(found.weight)},
        folds=folds,
        logits=pooled,
        weights=weights,
        bonus=bonus,
        tuned=tuned,
    )


def tune(
    expert: Expert,
    x: Cells,
    more: Cells | None,
    codes: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> TunedExpert:
    """Choose an expert's setting by macro-F1 out of fold, of equals the most regularised.

    Of `more`, (N, K), it learns as well where it learns of a cell in `x`. Small products keep to
    one thread: several take turns for longer than they multiply, four times as long on a busy
    machine.
    """
    with threadpool_limits(1 if x.size < SMALL else None):
        return _tune(expert, x, more, codes, folds)


def _tune(
    expert: Expert,
    x: Cells,
    more: Cells | None,
    codes: NDArray[np.int64],
    folds: NDArray[np.int64],
) -> TunedExpert:
    def fit(rows: NDArray[np.bool_], settings: Sequence[float]) -> list[LinearMap]:
        if more is None:
            return expert.fit(x[rows], codes[rows], settings)
        join = sp.vstack if expert.sparse else np.concatenate
        both = join([x[rows], more[rows]])
        return expert.fit(both, np.tile(codes[rows], 2), settings)

    is_scored, everything = folds >= 0, np.ones(len(codes), bool)
    if not is_scored.any():  # each class has a single cell: nothing to tune by
        middle = expert.settings[len(expert.settings) // 2]
        (found,) = fit(everything, [middle])
        return TunedExpert(middle, found, found(x))
    outside = np.zeros((len(expert.settings), len(codes), codes.max() + 1), np.float32)
    for fold in np.unique(folds[is_scored]):
        held_out = folds == fold
        maps = fit(~held_out, expert.settings)
        for place, found in enumerate(maps):
            outside[place, held_out] = found(x[held_out])
    quality = [macro_f1(codes[is_scored], logits[is_scored].argmax(1)) for logits in outside]
    best = int(np.argmax(quality))
    (found,) = fit(everything, [expert.settings[best]])
    logits = outside[best]
    logits[~is_scored] = found(x[~is_scored])
    factor = 1 / temperature(logits[is_scored], codes[is_scored])
    return TunedExpert(expert.settings[best], found.times(factor), logits * np.float32(factor))


def rarity(codes: NDArray[np.int64], folds: NDArray[np.int64]) -> Array:
    """Of each cell's out-of-fold logits, 1 / n², (N, C): n cells of the type were learnt from."""
    sizes = np.bincount(codes)
    rare = np.empty((len(codes), len(sizes)), np.float32)
    for fold in np.unique(folds):
        held_out = folds == fold
        given = sizes if fold < 0 else sizes - np.bincount(codes[held_out], minlength=len(sizes))
        rare[held_out] = 1 / np.maximum(given, 1) ** 2
    return rare


def rare_bonus(
    pooled: Array, rare: Array, codes: NDArray[np.int64], is_scored: NDArray[np.bool_]
) -> float:
    """Factor of `rare`, in `BONUSES`, of the highest log-likelihood, each type counting alike.

    Args:
        pooled: Logits of cells by experts that did not see them, (N, C).
        rare: From `rarity`, (N, C).
        codes: Type codes, (N,).
        is_scored: Which cells were held out, (N,).
    """
    truth = codes[is_scored]
    if not len(truth):
        return 0.0
    of_cell = class_weights(truth, codes.max() + 1)[truth]

    def nats(bonus: float) -> float:
        likely = log_softmax(pooled[is_scored] + np.float32(bonus) * rare[is_scored], axis=1)
        return float(-(of_cell * likely[np.arange(len(truth)), truth]).mean())

    return min(BONUSES, key=nats)


def is_worse(
    pooled: Array, alone: Array, codes: NDArray[np.int64], is_scored: NDArray[np.bool_]
) -> bool:
    """Whether the pool gives fewer cells their type than one expert alone, logits (N, C) of both.

    A sign test (5 %, one-sided) of the held-out cells on which they disagree.
    """
    is_right, is_alone_right = (
        found[is_scored].argmax(axis=1) == codes[is_scored] for found in (pooled, alone)
    )
    lost, won = int((is_alone_right & ~is_right).sum()), int((is_right & ~is_alone_right).sum())
    return lost > won and binomtest(lost, lost + won, alternative="greater").pvalue < 0.05


def class_weights(codes: NDArray[np.int64], num_classes: int) -> NDArray[np.float64]:
    """Weight of each class, (C,): mean 1 over the cells, equal sums over the classes."""
    sizes = np.bincount(codes, minlength=num_classes)
    present = sizes > 0
    weights = np.zeros(num_classes)
    weights[present] = len(codes) / (present.sum() * sizes[present])
    return weights


def temperature(logits: Array, codes: NDArray[np.int64]) -> float:
    """Return the temperature of the highest log-likelihood, between 1/50 and 100.

    Targets are smoothed by one cell in N + 2 (Platt 1999): all of a few cells being right does not
    prove that no cell will ever be wrong.
    """
    share = 1 / (len(codes) + 2)
    rows = np.arange(len(codes))

    def nats(level: float) -> float:
        likely = log_softmax(logits.astype(np.float64) / level, axis=1)
        return float(-((1 - share) * likely[rows, codes] + share * likely.mean(axis=1)).mean())

    grid = np.exp(np.linspace(np.log(0.02), np.log(100), 86))
    return float(min(grid, key=nats))


def macro_f1(truth: NDArray[np.int64], predicted: NDArray[np.int64]) -> float:
    """Macro-F1 of type codes."""
    names = [str(code) for code in range(max(truth.max(), predicted.max()) + 1)]
    return score([names[c] for c in truth], [names[c] for c in predicted], names).macro_f1
