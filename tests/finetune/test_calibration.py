"""Calibration, risk and AUROC beside hand arithmetic and scikit-learn."""

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from finetune.calibration import area_under_risk, auroc, calibration_error, risk_coverage


def test_calibration_error_by_hand() -> None:
    confidence = np.array([0.95, 0.95, 0.55, 0.55])
    is_right = np.array([True, True, True, False])
    # two bins: |0.95 - 1| and |0.55 - 0.5|, half of the cells each
    assert calibration_error(confidence, is_right) == pytest.approx(0.05)
    assert calibration_error(np.ones(3), np.ones(3, bool)) == 0


def test_risk_coverage_by_hand() -> None:
    confidence = np.array([0.9, 0.8, 0.8, 0.1])
    coverage, risk = risk_coverage(confidence, np.array([True, False, True, False]))
    np.testing.assert_allclose(coverage, [0.25, 0.75, 1])
    np.testing.assert_allclose(risk, [0, 1 / 3, 1 / 2])
    area = 0.25 * 0 + 0.5 / 3 + 0.25 / 2
    assert area_under_risk(confidence, np.array([True, False, True, False])) == pytest.approx(area)


def test_auroc_is_scikit_learns() -> None:
    rng = np.random.default_rng(0)
    scores = rng.integers(0, 10, 300).astype(float)  # many are equal
    is_novel = rng.random(300) < scores / 20
    assert auroc(scores, is_novel) == pytest.approx(roc_auc_score(is_novel, scores))


def test_refusals() -> None:
    with pytest.raises(ValueError, match="one kind of cell only"):
        auroc(np.arange(3.0), np.zeros(3, bool))
    with pytest.raises(ValueError, match="outside 0 to 1"):
        calibration_error(np.array([1.5]), np.array([True]))
    with pytest.raises(ValueError, match="one of each"):
        risk_coverage(np.array([0.5]), np.array([True, False]))
