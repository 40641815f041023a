"""Strange cells are found, thresholds reject the share of known cells they are set to."""

import numpy as np
import pytest
import scipy.sparse as sp
import torch

from finetune.calibration import auroc
from finetune.classifier import Predictions
from finetune.expert_pool import fit_pool
from finetune.expression import counts_per_10k, scaled
from finetune.novelty import (
    RATE,
    NoveltyDetector,
    class_thresholds,
    fit_detector,
    fit_view,
    novelty_of,
    novelty_scores,
)
from tests.support.simulated import simulated_cells


def predictions(probabilities: list[list[float]], novelty: list[float] | None) -> Predictions:
    found = None if novelty is None else np.array(novelty, np.float32)
    table = np.array(probabilities, np.float32)
    return Predictions(table, np.zeros((len(table), 2), np.float32), ("a", "b"), found)


def test_distance_is_mahalanobis_in_the_principal_components() -> None:
    rng = np.random.default_rng(0)
    codes = np.repeat([0, 1], 60)
    x = rng.normal(size=(120, 12)).astype(np.float32) @ np.diag(np.linspace(3, 0.5, 12))
    x = (np.abs(x) + 2 * codes[:, None] * np.eye(1, 12)).astype(np.float32)
    detector = NoveltyDetector(1, 12, 5, 2)
    detector.genes.copy_(torch.arange(12))
    fit_view(detector, 0, x, codes)
    centred = x - x.mean(axis=0)
    _, _, rows = np.linalg.svd(centred, full_matrices=False)
    place = centred @ rows[:5].T
    means = np.stack([place[codes == code].mean(axis=0) for code in range(2)])
    apart = place - means[codes]
    within = apart.T @ apart / 120
    within = 0.9 * within + 0.1 * np.trace(within) / 5 * np.eye(5)
    delta = place[:, None] - means
    square = np.einsum("ncj,jk,nck->nc", delta, np.linalg.inv(within), delta)
    found = detector(torch.zeros(120, 2), torch.from_numpy(np.expm1(x) / RATE))
    np.testing.assert_allclose(found.numpy(), np.sqrt(square.min(axis=1)), rtol=2e-3)


@pytest.mark.parametrize("score", ["distance", "probability", "energy"])
def test_an_unknown_type_scores_higher_and_known_cells_pass(score: str) -> None:
    counts, labels = simulated_cells((150, 150, 150, 80), depth=5)
    is_known = labels != "rare"
    train = is_known & (np.arange(len(labels)) % 2 == 0)
    pool = fit_pool(counts[train], labels[train], seed=0)
    codes = np.unique(labels[train], return_inverse=True)[1]
    detector = fit_detector(
        counts[train],
        codes,
        pool.genes,
        pool.folds,
        pool.logits,
        score=score,  # type: ignore[arg-type]
        false_rejection=0.1,
    )
    logits = torch.from_numpy(pool.predict(counts[~train]))
    rates = torch.from_numpy(counts_per_10k(counts[~train]).toarray())
    probabilities = logits.softmax(-1).numpy()
    scores = detector(logits, rates).numpy()
    said = Predictions(probabilities, probabilities, pool.classes, scores)
    strange, flagged = novelty_of(said, detector)
    is_novel = ~is_known[~train]
    assert auroc(strange, is_novel) > (0.95 if score == "distance" else 0.75)
    facts = novelty_scores(strange, flagged, is_novel)
    assert 0.8 < facts["known_kept"] < 0.99  # 0.9 was asked for
    assert set(facts) == {"auroc", "novel_found", "known_kept"}


def test_cells_that_were_trained_on_pass_as_fresh_ones_do() -> None:
    # Few cells and many genes: principal components fit the noise of the cells they are made of.
    counts, labels = wide_cells(600)
    learnt = np.arange(len(labels)) % 2 == 0
    codes = np.unique(labels, return_inverse=True)[1]
    genes = np.arange(counts.shape[1])
    logits = np.eye(3, dtype=np.float32)[codes]
    folds = np.zeros(int(learnt.sum()), np.int64)
    detector = fit_detector(
        counts[learnt], codes[learnt], genes, folds, logits[learnt], false_rejection=0.1
    )
    rates = torch.from_numpy(counts_per_10k(counts).toarray())
    scores = detector(torch.from_numpy(logits), rates).numpy()
    flagged = scores > detector.thresholds.numpy()[codes]
    # 0.10 and 0.04; with all cells in one view, and thresholds by cells outside it, 1.00 and 0.30.
    assert 0.07 < flagged[learnt].mean() < 0.13
    assert 0.02 < flagged[~learnt].mean() < 0.13


def wide_cells(num_cells: int) -> tuple[sp.csr_matrix, np.ndarray]:
    """Cells of three types in 1,500 genes, a tenth of them expressed higher in a type."""
    rng = np.random.default_rng(0)
    labels = np.repeat(["a", "b", "c"], num_cells // 3)
    rates = np.tile(rng.gamma(0.5, 1, size=1_500), (len(labels), 1))
    for place, name in enumerate("abc"):
        rates[np.ix_(labels == name, np.arange(150 * place, 150 * place + 150))] *= 3
    order = rng.permutation(len(labels))
    return sp.csr_matrix(rng.poisson(rates).astype(np.float32))[order], labels[order]


def test_thresholds_by_hand() -> None:
    scores = np.concatenate([np.linspace(0, 1, 101), np.linspace(10, 12, 101), [5.0]])
    given = np.repeat([0, 1, 2], (101, 101, 1))
    found = class_thresholds(scores, given, 4, 0.1)
    np.testing.assert_allclose(found[:2], [0.9, 11.8], atol=1e-6)  # many cells: own quantile
    # A class with one cell stays near the median of all; one without any is at it.
    median = np.median(scores)
    assert abs(found[2] - found[3] - (5 - median) / 6) < 1e-6
    assert found[3] > median


def test_the_papers_rule_stays_available() -> None:
    said = predictions([[0.4, 0.6], [0.51, 0.49], [0.45, 0.55]], [1.0, 3.0, 5.0])
    detector = NoveltyDetector(1, 2, 1, 2, probability=0.58)
    detector.thresholds.copy_(torch.tensor([2.0, 4.0]))
    assert novelty_of(said, detector)[1].tolist() == [False, True, True]
    assert novelty_of(said, detector, "probability")[1].tolist() == [False, True, True]
    assert novelty_of(said, detector, "probability", 0.5)[1].tolist() == [False, False, False]
    assert novelty_of(said, None)[1].tolist() == [False, False, False]
    with pytest.raises(ValueError, match="no novelty thresholds"):
        novelty_of(said, None, "thresholds")


def test_cells_without_counts_have_a_score() -> None:
    counts, labels = simulated_cells((20, 20))
    pool = fit_pool(counts, labels, seed=0)
    codes = np.unique(labels, return_inverse=True)[1]
    detector = fit_detector(counts, codes, pool.genes, pool.folds, pool.logits)
    empty = scaled(counts_per_10k(sp.csr_matrix((2, 60), dtype=np.float32)), pool.genes, "log")
    assert np.isfinite(detector(torch.zeros(2, 2), torch.from_numpy(empty)).numpy()).all()
