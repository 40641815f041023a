"""Experts beside scikit-learn's own, out-of-fold logits, and the pool's weights."""

from dataclasses import replace

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression

from finetune.baselines import logistic_regression
from finetune.expert_pool import (
    class_weights,
    fit_pool,
    is_worse,
    rare_bonus,
    rarity,
    temperature,
)
from finetune.experts import (
    EXPERTS,
    FEW_CELL_EXPERTS,
    fit_correlation,
    fit_discriminant,
    fit_regression,
    share_outside,
    thinned,
)
from finetune.expression import counts_per_10k, scaled, sparsely_scaled
from finetune.heads import expression_logits
from tests.support.simulated import simulated_cells


@pytest.fixture(scope="module")
def cells() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1, 2], (30, 20, 10))
    x = rng.normal(size=(60, 40)) + 0.8 * np.eye(3, 40)[codes] * 2
    return x.astype(np.float32), codes


@pytest.mark.parametrize("num_genes", [pytest.param(40, id="cells > genes"), 90])
@pytest.mark.parametrize("shrinkage", [0.1, 0.7])
def test_discriminant_is_scikit_learns(num_genes: int, shrinkage: float) -> None:
    rng = np.random.default_rng(1)
    codes = np.repeat([0, 1, 2], 20)
    x = (rng.normal(size=(60, num_genes)) + np.eye(3, num_genes)[codes]).astype(np.float32)
    (ours,) = fit_discriminant(x, codes, [shrinkage])
    means = np.stack([x[codes == code].mean(axis=0) for code in range(3)])
    apart = (x - means[codes]).astype(np.float64)
    within = apart.T @ apart / 57
    shrunk = (1 - shrinkage) * within + shrinkage * np.trace(within) / num_genes * np.eye(num_genes)
    inverse = np.linalg.inv(shrunk)
    place = x[:, None] - means  # (N, C, K)
    distance = np.einsum("nck,kl,ncl->nc", place, inverse, place)
    expected = -0.5 * distance
    found = ours(x)
    np.testing.assert_allclose(
        found - found.mean(axis=1, keepdims=True),
        expected - expected.mean(axis=1, keepdims=True),
        rtol=1e-3,
        atol=1e-3,
    )
    if num_genes == 40:  # scikit-learn divides by N, not by N - C: another shrinkage by 5 %
        theirs = LinearDiscriminantAnalysis(
            solver="lsqr", shrinkage=shrinkage, priors=np.ones(3) / 3
        ).fit(x, codes)
        assert (theirs.predict(x) == found.argmax(axis=1)).mean() > 0.95


def test_discriminant_gives_a_type_of_one_cell_its_share() -> None:
    codes, truth = np.repeat([0, 1, 2], (12, 12, 1)), np.repeat([0, 1, 2], 100)
    shift = 9 * np.eye(3, 1_000)
    shares = []
    for seed in range(8):
        rng = np.random.default_rng(seed)
        x = (rng.normal(size=(25, 1_000)) + shift[codes]).astype(np.float32)
        fresh = (rng.normal(size=(300, 1_000)) + shift[truth]).astype(np.float32)
        (ours,) = fit_discriminant(x, codes, [0.5])
        shares.append((ours(fresh).argmax(axis=1) == 2).mean())
    # A third of the cells are of it. Without the correction it is given to none of them.
    assert 0.15 < np.mean(shares) < 0.45, shares


def test_share_outside_is_what_least_squares_leaves() -> None:
    rng = np.random.default_rng(3)
    codes = np.repeat([0, 1], (9, 6))
    x = rng.normal(size=(15, 40)) * np.linspace(3, 0.1, 40)
    residuals = x - np.stack([x[codes == code].mean(axis=0) for code in (0, 1)])[codes]
    others, ours = residuals[::2], residuals[1::2]
    left = sum(
        ((row - others.T @ np.linalg.lstsq(others.T, row, rcond=None)[0]) ** 2).sum()
        for row in ours
    )
    assert share_outside(residuals, codes) == pytest.approx(left / (ours**2).sum(), rel=1e-6)
    assert share_outside(np.zeros((4, 7)), np.array([0, 0, 1, 1])) == 1.0


def test_an_expert_sees_its_own_genes_and_a_pool_all(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, labels = simulated_cells((40, 40, 40))
    for name in FEW_CELL_EXPERTS:
        num_genes = 60 if name == "wide" else 40
        monkeypatch.setitem(EXPERTS, name, replace(EXPERTS[name], num_genes=num_genes))
    monkeypatch.setattr("finetune.expert_pool.NUM_GENES", 40)
    pool = fit_pool(counts, labels, seed=0)
    assert set(pool.weights) == set(FEW_CELL_EXPERTS)
    assert len(pool.genes) == 60
    assert len(pool.variable) == 40
    assert set(pool.variable) < set(pool.genes)
    weighed = pool.genes[np.any(pool.tuned["regression"].map.weight != 0, axis=0)]
    assert set(weighed) <= set(pool.variable)
    alone = fit_pool(counts, labels, seed=0, experts=["regression"])
    x = scaled(counts_per_10k(counts), pool.genes, "log")
    np.testing.assert_allclose(
        pool.tuned["regression"].map(x),
        alone.tuned["regression"].map(x[:, np.searchsorted(pool.genes, alone.genes)]),
        rtol=1e-4,
        atol=1e-4,
    )


def test_scales_within_cells_compare_the_variable_genes_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    counts, labels = simulated_cells((40, 40, 40))
    for name, num_genes in (("correlation", 40), ("thinned", 40), ("wide", 60)):
        monkeypatch.setitem(EXPERTS, name, replace(EXPERTS[name], num_genes=num_genes))
    monkeypatch.setattr("finetune.expert_pool.NUM_GENES", 40)
    pool = fit_pool(counts, labels, seed=0, experts=["correlation", "thinned", "wide"])
    rates = counts_per_10k(counts)
    expected = np.full((len(labels), 3), pool.bonus / 40**2)
    for name, found in pool.tuned.items():
        own = pool.genes if name == "wide" else pool.variable
        weight = found.map.weight[:, np.searchsorted(pool.genes, own)]
        x = scaled(rates, own, EXPERTS[name].scale)
        expected += pool.weights[name] * (x @ weight.T + found.map.bias)
    np.testing.assert_allclose(pool.predict(counts), expected, rtol=1e-3, atol=1e-3)
    module = expression_logits(pool)
    dense = torch.from_numpy(rates.toarray())
    np.testing.assert_allclose(module(dense).numpy(), expected, rtol=1e-3, atol=1e-3)


def test_regression_is_scikit_learns_for_two_and_more_classes(
    cells: tuple[np.ndarray, np.ndarray],
) -> None:
    x, codes = cells
    for part in (codes < 2, codes < 3):
        (ours,) = fit_regression(x[part], codes[part], [0.1])
        theirs = LogisticRegression(C=0.1, class_weight="balanced", max_iter=1000)
        expected = theirs.fit(x[part], codes[part]).predict_proba(x[part])
        odds = np.exp(ours(x[part]))
        np.testing.assert_allclose(odds / odds.sum(axis=1, keepdims=True), expected, atol=1e-4)


def test_many_cells_are_told_by_regressions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, labels = simulated_cells((40, 40))
    monkeypatch.setattr("finetune.expert_pool.MANY_CELLS", 60)
    pool = fit_pool(counts, labels, seed=0)
    assert set(pool.weights) == {"regression", "wide", "thinned"}
    assert set(pool.maps) <= {"log", "unit"}


def test_sparse_expression_is_the_dense_one(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, labels = simulated_cells((8, 7))
    rates = counts_per_10k(counts)
    genes = np.array([5, 0, 17, 3])
    monkeypatch.setattr("finetune.expression.DENSE_CELLS", 4)
    for scale in ("log", "unit"):
        sparse = sparsely_scaled(rates, genes, scale)
        np.testing.assert_array_equal(sparse.toarray(), scaled(rates, genes, scale))
        assert sparse.nnz == (rates[:, genes].toarray() != 0).sum()
        assert sparsely_scaled(rates[:0], genes, scale).shape == (0, 4)
    codes = np.unique(labels, return_inverse=True)[1]
    (dense,) = fit_regression(scaled(rates, genes, "log"), codes, [0.1])
    (same,) = fit_regression(sparsely_scaled(rates, genes, "log"), codes, [0.1])
    np.testing.assert_allclose(same.weight, dense.weight, rtol=1e-3, atol=1e-4)


def test_thinned_cells_keep_a_share_of_their_counts() -> None:
    counts, _ = simulated_cells((100, 100), depth=20)
    kept = thinned(counts, 0)
    shares = np.asarray(kept.sum(axis=1) / counts.sum(axis=1)).ravel()
    assert (kept > counts).nnz == 0
    assert 0.09 < shares.min() < 0.13
    assert 0.9 < shares.max() <= 1
    assert abs(np.median(shares) - 0.1**0.5) < 0.05
    assert (thinned(counts, 0) != kept).nnz == 0
    assert (thinned(counts, 1) != kept).nnz > 0


def test_thinned_copies_help_to_tell_shallow_cells() -> None:
    # Learnt deep, asked shallow: few genes of a type are seen, each looking higher.
    deep, labels = simulated_cells((60, 60, 60), depth=8)
    shallow, truth = simulated_cells((300, 300, 300), seed=1, depth=0.05)
    pool = fit_pool(deep, labels, seed=0, experts=["regression", "thinned"])
    rates = counts_per_10k(shallow)
    right = {}
    for name, found in pool.tuned.items():
        x = scaled(rates, pool.genes, EXPERTS[name].scale)
        right[name] = float((np.array(pool.classes)[found.map(x).argmax(axis=1)] == truth).mean())
    assert right["thinned"] > right["regression"] + 0.02, right


def test_correlation_is_numpys(cells: tuple[np.ndarray, np.ndarray]) -> None:
    x, codes = cells
    centred = x - x.mean(axis=1, keepdims=True)
    scale = centred / centred.std(axis=1, keepdims=True)
    (ours,) = fit_correlation(scale, codes, [1.0])
    means = np.stack([scale[codes == code].mean(axis=0) for code in range(3)])
    expected = np.corrcoef(scale, means)[:60, 60:]
    np.testing.assert_allclose(ours(scale), expected, atol=1e-5)


def test_pool_predicts_and_keeps_cells_apart_from_their_own_logits() -> None:
    counts, labels = simulated_cells((40, 30, 20, 1))
    pool = fit_pool(counts, labels, seed=0)
    assert pool.classes == ("a", "b", "c", "rare")
    assert set(pool.weights) == set(FEW_CELL_EXPERTS)
    assert min(pool.weights.values()) >= 0
    assert (pool.folds[labels == "rare"] == -1).all()
    named = np.array(pool.classes)
    assert (named[pool.predict(counts).argmax(axis=1)] == labels).mean() > 0.95
    # Change one cell's counts: its own out-of-fold logits move, those of its fold-mates do not.
    changed = counts.toarray()
    changed[0] = changed[0][::-1]
    other = fit_pool(sp.csr_matrix(changed), labels, seed=0, experts=["correlation"])
    first = fit_pool(counts, labels, seed=0, experts=["correlation"])
    mates = (first.folds == first.folds[0]) & (np.arange(len(labels)) > 0)
    ratio = other.logits[mates] / first.logits[mates]  # but for the temperature, one number
    np.testing.assert_allclose(ratio, ratio[0, 0], rtol=1e-3)


def test_pool_is_the_weighted_mean_of_its_experts() -> None:
    counts, labels = simulated_cells((30, 30))
    pool = fit_pool(counts, labels, seed=0)
    rates = counts_per_10k(counts)
    parts = [
        pool.weights[name] * found.map(scaled(rates, pool.genes, EXPERTS[name].scale))
        for name, found in pool.tuned.items()
    ]
    expected = np.sum(parts, axis=0) + pool.bonus / 30**2
    np.testing.assert_allclose(pool.predict(counts), expected, rtol=1e-3, atol=1e-3)


def test_the_regression_expert_is_the_baseline() -> None:
    counts, labels = simulated_cells((40, 30, 20))
    rows = np.arange(90) % 3 > 0
    sides = (counts[rows], labels[rows], counts[~rows], labels[~rows])
    baseline = logistic_regression(*sides, ["a", "b", "c"], seed=0)
    pool = fit_pool(counts[rows], labels[rows], seed=0)
    assert f"C = {pool.tuned['regression'].value:g}" in baseline.setting


def test_regression_alone_is_taken_when_the_pool_is_significantly_worse() -> None:
    codes = np.random.default_rng(0).integers(0, 2, 400)
    scored = np.ones(400, bool)
    right = (1.2 * np.eye(2)[codes]).astype(np.float32)

    def judged(num_wrong: int) -> bool:
        pooled = right.copy()
        pooled[:num_wrong] = -right[:num_wrong]
        return is_worse(pooled, right, codes, scored)

    assert judged(200)
    assert judged(5)  # 1 of 32 by chance
    assert not judged(4)  # 1 of 16
    assert not judged(0)
    assert not is_worse(-right, right, codes, ~scored)


def test_a_pool_that_is_worse_is_regression(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, labels = simulated_cells((40, 30, 20))
    monkeypatch.setattr("finetune.expert_pool.is_worse", lambda *_: True)
    pool = fit_pool(counts, labels, seed=0)
    assert pool.weights == {"regression": 1, "wide": 0, "discriminant": 0}
    assert pool.bonus == 0
    alone = fit_pool(counts, labels, seed=0, experts=["regression"])
    np.testing.assert_array_equal(pool.logits, alone.logits)
    np.testing.assert_allclose(pool.predict(counts), alone.predict(counts), rtol=1e-3, atol=1e-3)


def test_rarity_counts_what_each_fold_learnt_from() -> None:
    codes = np.array([0, 0, 0, 0, 1, 1, 2])
    folds = np.array([0, 0, 1, 2, 0, 1, -1])
    # Of the first type 2, 3, 3 cells remain in the folds, of the second 1, 1, 2, of the third 1.
    expected = {0: [1 / 4, 1, 1], 1: [1 / 9, 1, 1], 2: [1 / 9, 1 / 4, 1], -1: [1 / 16, 1 / 4, 1]}
    np.testing.assert_allclose(rarity(codes, folds), [expected[fold] for fold in folds], rtol=1e-6)


def test_bonus_is_what_out_of_fold_cells_of_rare_types_lack() -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], (300, 30))
    sure = 3 * np.eye(2)[codes] + rng.normal(size=(330, 2))
    rare = np.tile([[0.0, 1.0]], (330, 1)).astype(np.float32)
    scored = np.ones(330, bool)
    assert rare_bonus(sure.astype(np.float32), rare, codes, scored) == 0
    less = (sure - 3 * rare).astype(np.float32)  # the second type looks farther away
    assert rare_bonus(less, rare, codes, scored) == 3
    assert rare_bonus(less, rare, codes, ~scored) == 0


def test_the_bonus_is_in_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    counts, labels = simulated_cells((20, 3, 1))
    monkeypatch.setattr("finetune.expert_pool.is_worse", lambda *_: False)
    pools = []
    for bonus in (0.0, 4.0):
        monkeypatch.setattr("finetune.expert_pool.BONUSES", (bonus,))
        pools.append(fit_pool(counts, labels, seed=0))
    gained = pools[1].predict(counts) - pools[0].predict(counts)
    sizes = np.array([20, 3, 1])
    np.testing.assert_allclose(gained, np.tile(4 / sizes**2, (24, 1)), atol=1e-3)
    codes = np.searchsorted(pools[0].classes, labels)
    expected = 4 * rarity(codes, pools[0].folds)
    np.testing.assert_allclose(pools[1].logits - pools[0].logits, expected, atol=1e-3)


def test_class_weights_and_temperature_by_hand() -> None:
    np.testing.assert_allclose(class_weights(np.array([0, 0, 0, 2]), 3), [2 / 3, 0, 2])
    codes = np.array([0] * 8 + [1] * 2)
    logits = np.tile([[10.0, 0.0]], (10, 1)).astype(np.float32)
    # right in 8 of 10, smoothed by a twelfth: the best probability is 0.8 * 11/12 + 0.5 / 12
    best = 0.8 * 11 / 12 + 0.5 / 12
    assert temperature(logits, codes) == pytest.approx(10 / np.log(best / (1 - best)), rel=0.06)


def test_refusals() -> None:
    counts, labels = simulated_cells((5, 5))
    with pytest.raises(ValueError, match="no expert 'oracle'; there are regression"):
        fit_pool(counts, labels, 0, ["oracle"])
    with pytest.raises(ValueError, match="fewer than two cell types"):
        fit_pool(counts, np.array(["a"] * 10), 0)
