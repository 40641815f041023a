"""The baselines do what they say and see nothing of the test side."""

import numpy as np
import pytest
import scipy.sparse as sp

from finetune.baselines import (
    BaselineResult,
    logistic_regression,
    majority,
    marker_scoring,
    run_baselines,
)
from finetune.dataset import stratified_folds, stratified_split
from finetune.expression import counts_per_10k, variable_genes
from finetune.metrics import ClassificationScores, score
from finetune.verdict import verdict
from tests.support.simulated import NAMES, simulated_cells


def scores_of(num_right: int, num_wrong: int, macro_from: str = "b") -> ClassificationScores:
    truth = ["a"] * num_right + [macro_from] * num_wrong
    return score(truth, ["a"] * len(truth), ["a", "b"])


def test_logistic_regression_learns_simulated_types_and_repeats_itself() -> None:
    counts, labels = simulated_cells((60, 50, 40, 3))
    train, test = stratified_split(labels, 0.3, seed=0)
    sides = (counts[train], labels[train], counts[test], labels[test])
    first, nearest, regression = run_baselines(*sides, NAMES.tolist(), seed=1)
    assert (first.name, nearest.name) == ("majority", "nearest mean")
    assert regression.name == "logistic regression"
    assert nearest.scores.accuracy > 0.9
    assert regression.scores.accuracy > 0.9
    assert regression.scores.accuracy > first.scores.accuracy + 0.4
    assert regression.seconds > 0
    assert "60 variable genes, C = " in regression.setting
    again = logistic_regression(*sides, NAMES.tolist(), seed=1)
    np.testing.assert_array_equal(again.scores.confusion, regression.scores.confusion)
    assert again.setting == regression.setting


@pytest.mark.parametrize(
    "num_cells",
    [
        pytest.param((20, 20, 2), id="a class with fewer cells than folds"),
        pytest.param((20, 20, 1), id="a class with one cell"),
        pytest.param((1, 1), id="one cell per class"),
    ],
)
def test_small_classes_are_trained_on(num_cells: tuple[int, ...]) -> None:
    counts, labels = simulated_cells(num_cells)
    classes = NAMES[: len(num_cells)].tolist()
    result = logistic_regression(counts, labels, counts, labels, classes, seed=0)
    assert result.scores.recall.min() == 1  # every cell was seen in training


def test_folds_keep_every_class_in_every_training_side() -> None:
    labels = np.repeat(NAMES, (10, 4, 2, 1))
    folds = stratified_folds(labels, 3, seed=0)
    for fold in range(3):
        assert set(labels[folds != fold]) == set(NAMES)
    assert folds[-1] == -1
    assert np.ptp(np.bincount(folds[:10], minlength=3)) <= 1


def test_genes_of_the_test_side_do_not_matter() -> None:
    counts, labels = simulated_cells((30, 30))
    rows = np.arange(60) % 2 == 0
    dense = counts.toarray()
    dense[1] = 0  # another test side, an empty cell among it
    changed = sp.csr_matrix(dense)
    args = (counts[rows], labels[rows])
    one = logistic_regression(*args, counts[~rows], labels[~rows], ["a", "b"], seed=0)
    two = logistic_regression(*args, changed[~rows], labels[~rows], ["a", "b"], seed=0)
    assert one.setting == two.setting


def test_variable_genes_are_the_ones_that_differ_between_types() -> None:
    rng = np.random.default_rng(0)
    means = rng.uniform(1, 20, size=400)
    rates = np.tile(means, (100, 1))
    own = rng.choice(400, size=8, replace=False)
    rates[np.ix_(np.arange(50), own)] *= 5
    counts = sp.csr_matrix(rng.poisson(rates).astype(np.float32))
    genes = variable_genes(counts_per_10k(counts), 40)
    assert len(genes) == 40
    assert np.isin(own, genes).all()


def test_counts_per_10k_by_hand() -> None:
    counts = sp.csr_matrix(np.array([[1, 3, 0], [0, 0, 0]], dtype=np.uint16))
    rates = counts_per_10k(counts)
    np.testing.assert_array_equal(rates.toarray(), [[2500, 7500, 0], [0, 0, 0]])
    assert counts.dtype == np.uint16


def test_marker_scoring_by_hand() -> None:
    counts = sp.csr_matrix(np.array([[9, 1, 5], [8, 2, 5], [1, 9, 5], [0, 0, 0]], np.float32))
    labels = np.array(["a", "a", "b", "b"])
    table = {"a": ("GA", "elsewhere"), "b": ("GB",), "not asked for": ("GC",)}
    result = marker_scoring(counts, ["GA", "GB", "GC"], labels, ["a", "b", "c"], table)
    assert result.scores.confusion[0, 0] == 2
    assert result.scores.confusion[1, 1] >= 1
    assert result.setting == "markers of 2 of 3 types"
    with pytest.raises(ValueError, match="no marker of these cell types"):
        marker_scoring(counts, ["GA", "GB", "GC"], labels, ["c"], table)


def test_majority_by_hand() -> None:
    train, test = np.array(["b", "b", "a"]), np.array(["a", "b", "b", "b"])
    result = majority(train, test, ["a", "b"])
    assert result.scores.accuracy == 0.75
    assert result.scores.macro_f1 == pytest.approx((0 + 6 / 7) / 2)
    assert result.setting == "always 'b'"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param({"train_counts": sp.csr_matrix((3, 5))}, "one label per cell", id="cells"),
        pytest.param({"test_counts": sp.csr_matrix((4, 6))}, "same gene panel", id="genes"),
        pytest.param({"test_counts": np.ones((4, 5))}, "CSR", id="dense"),
        pytest.param({"train_counts": -sp.eye_array(4, 5, format="csr")}, "negative", id="scaled"),
        pytest.param({"train_labels": np.array(["a"] * 4)}, "fewer than two", id="one class"),
    ],
)
def test_refusals(change: dict[str, object], message: str) -> None:
    labels = np.array(["a", "b", "a", "b"])
    counts = sp.csr_matrix(np.ones((4, 5)))
    sides: dict[str, object] = {
        "train_counts": counts,
        "train_labels": labels,
        "test_counts": counts,
        "test_labels": labels,
    }
    arguments = sides | change
    with pytest.raises(ValueError, match=message):
        logistic_regression(**arguments, classes=["a", "b"], seed=0)  # type: ignore[arg-type]


# Two classes; the second number is how many of 100 cells the method calls 'a' wrongly.
WON, LOST = scores_of(90, 10), scores_of(80, 20)


@pytest.mark.parametrize(
    ("ours", "others", "sentence"),
    [
        pytest.param(
            WON,
            {"majority": LOST},
            "On 100 test cells the network beats majority by 10.0 points of accuracy "
            "(90.0 against 80.0) and 2.9 points of macro-F1 (47.4 against 44.4).",
            id="won both",
        ),
        pytest.param(
            LOST,
            {"weak": scores_of(70, 30), "logistic regression": WON},
            "On 100 test cells logistic regression beats the network by 10.0 points of accuracy "
            "(90.0 against 80.0) and 2.9 points of macro-F1 (47.4 against 44.4).",
            id="lost both to the best",
        ),
        pytest.param(
            WON,
            {"twin": WON},
            "On 100 test cells the network and twin are level by accuracy (90.0) "
            "and macro-F1 (47.4).",
            id="level",
        ),
        pytest.param(
            scores_of(91, 9),
            {"twin": score(["a"] * 90 + ["b"] * 10, ["a"] * 85 + ["b"] * 15, ["a", "b"])},
            "On 100 test cells twin beats the network by 4.0 points of accuracy "
            "(95.0 against 91.0) and 40.9 points of macro-F1 (88.6 against 47.6).",
            id="far ahead by macro-F1",
        ),
        pytest.param(
            scores_of(90, 10),
            {"careful": score(["a"] * 90 + ["b"] * 10, ["a"] * 79 + ["b"] * 21, ["a", "b"])},
            "On 100 test cells the network beats careful by 1.0 point of accuracy "
            "(90.0 against 89.0), but careful beats the network by 31.6 points of "
            "macro-F1 (79.0 against 47.4).",
            id="divided",
        ),
    ],
)
def test_verdict_names_the_winner(
    ours: ClassificationScores, others: dict[str, ClassificationScores], sentence: str
) -> None:
    results = [BaselineResult(name, scores, 0.0, "") for name, scores in others.items()]
    assert verdict(ours, results) == sentence


def test_verdict_refuses_other_cells() -> None:
    with pytest.raises(ValueError, match="same split"):
        verdict(WON, [BaselineResult("majority", scores_of(5, 5), 0.0, "")])
    with pytest.raises(ValueError, match="baselines is empty"):
        verdict(WON, [])
