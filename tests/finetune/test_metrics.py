"""Scores against scikit-learn and by hand."""

import json

import numpy as np
import pytest
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_recall_fscore_support,
)

from finetune.metrics import score

CLASSES = ["alpha", "beta", "delta", "gamma"]


def random_labels(seed: int, num_cells: int, present: list[str]) -> tuple[list[str], list[str]]:
    rng = np.random.default_rng(seed)
    truth = rng.choice(present, size=num_cells)
    is_wrong = rng.random(num_cells) < 0.4
    predicted = np.where(is_wrong, rng.choice(CLASSES, size=num_cells), truth)
    return [str(name) for name in truth], [str(name) for name in predicted]


@pytest.mark.parametrize(
    ("seed", "num_cells", "present"),
    [
        pytest.param(0, 200, CLASSES, id="all classes occur"),
        pytest.param(1, 200, CLASSES[:3], id="one class is only predicted"),
        pytest.param(2, 7, CLASSES, id="few cells"),
        pytest.param(3, 30, CLASSES[2:3], id="one true class"),
    ],
)
def test_scores_equal_scikit_learn(seed: int, num_cells: int, present: list[str]) -> None:
    truth, predicted = random_labels(seed, num_cells, present)
    scores = score(truth, predicted, CLASSES)
    precision, recall, f1, support = precision_recall_fscore_support(
        truth, predicted, labels=CLASSES, zero_division=0
    )
    np.testing.assert_array_equal(
        scores.confusion, confusion_matrix(truth, predicted, labels=CLASSES)
    )
    assert scores.confusion.dtype == np.int64
    assert scores.accuracy == pytest.approx(accuracy_score(truth, predicted), abs=1e-12)
    np.testing.assert_allclose(scores.precision, precision, atol=1e-12)
    np.testing.assert_allclose(scores.recall, recall, atol=1e-12)
    np.testing.assert_allclose(scores.f1, f1, atol=1e-12)
    np.testing.assert_array_equal(scores.support, support)
    occurring = sorted(set(truth))
    expected = f1_score(truth, predicted, labels=occurring, average="macro", zero_division=0)
    assert scores.macro_f1 == pytest.approx(expected, abs=1e-12)


def test_macro_f1_leaves_out_classes_without_true_cells() -> None:
    # a: precision 1, recall 1/2, F1 2/3; b: precision 1, recall 1, F1 1; c: never true.
    scores = score(["a", "a", "b"], ["a", "c", "b"], ["a", "b", "c"])
    assert scores.macro_f1 == pytest.approx((2 / 3 + 1) / 2)
    assert scores.f1.tolist() == pytest.approx([2 / 3, 1, 0])


def test_order_of_classes_is_kept() -> None:
    scores = score(["a", "b"], ["a", "a"], ["b", "a"])
    assert scores.classes == ("b", "a")
    assert scores.confusion.tolist() == [[0, 1], [0, 1]]


def test_numpy_text_is_accepted_and_json_is_plain() -> None:
    scores = score(np.array(["a", "b"]).tolist(), list(np.array(["a", "b"])), ["a", "b", "c"])
    record = json.loads(json.dumps(scores.as_json()))
    assert record["accuracy"] == 1
    assert record["macro_f1"] == 1
    assert record["num_cells"] == 2
    assert record["classes"] == ["a", "b", "c"]
    assert record["per_class"]["c"] == {"precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert record["confusion"] == [[1, 0, 0], [0, 1, 0], [0, 0, 0]]


@pytest.mark.parametrize(
    ("truth", "predicted", "classes", "message"),
    [
        pytest.param([], [], ["a"], "truth has no cells", id="no cells"),
        pytest.param(["a"], ["a", "a"], ["a"], "one label each per cell", id="lengths differ"),
        pytest.param(["x"], ["a"], ["a"], r"truth has labels outside classes: \['x'\]", id="truth"),
        pytest.param(["a"], ["x"], ["a"], "predicted has labels outside classes", id="predicted"),
        pytest.param(["a"], ["a"], ["a", "a"], "twice", id="class named twice"),
    ],
)
def test_refusals(truth: list[str], predicted: list[str], classes: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        score(truth, predicted, classes)
