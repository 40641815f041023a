"""How far a confidence can be trusted: calibration error, risk by coverage, novel against known."""

import numpy as np
from numpy.typing import NDArray
from scipy.stats import rankdata

Values = NDArray[np.floating]


def calibration_error(confidence: Values, is_right: NDArray[np.bool_], num_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017): mean gap of confidence and accuracy.

    Args:
        confidence: Probability of the given label, (N,), in [0, 1].
        is_right: Whether the label is right, (N,).
        num_bins: Bins of equal width.

    Returns:
        The gap, each bin weighted by its cells, in [0, 1].

    Raises:
        ValueError: If there are no cells, the lengths differ, or a confidence is no probability.
    """
    confidence = _checked(confidence, is_right)
    bins = np.minimum((confidence * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, confidence - np.asarray(is_right, float), minlength=num_bins)
    return float(np.abs(gaps).sum() / len(confidence))


def risk_coverage(
    confidence: Values, is_right: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Share of wrong labels among the most confident cells, for every share of cells kept.

    Cells of equal confidence are kept or rejected together.

    Returns:
        Coverage, rising to 1, and risk at each.

    Raises:
        ValueError: As `calibration_error`.
    """
    confidence = _checked(confidence, is_right)
    order = np.argsort(-confidence, kind="stable")
    num_wrong = np.cumsum(~np.asarray(is_right, bool)[order])
    num_kept = np.arange(1, len(order) + 1)
    is_last = np.append(np.diff(confidence[order]) != 0, True)
    return num_kept[is_last] / len(order), num_wrong[is_last] / num_kept[is_last]


def area_under_risk(confidence: Values, is_right: NDArray[np.bool_]) -> float:
    """Mean risk over all coverages, in [0, 1]; less is better."""
    coverage, risk = risk_coverage(confidence, is_right)
    return float(np.sum(np.diff(coverage, prepend=0) * risk))


def auroc(scores: Values, is_novel: NDArray[np.bool_]) -> float:
    """Chance that a novel cell scores higher than a known one, equal scores counting half.

    Raises:
        ValueError: If either kind is missing.
    """
    num_novel = int(is_novel.sum())
    num_known = len(is_novel) - num_novel
    if not num_novel or not num_known:
        raise ValueError("is_novel has one kind of cell only; AUROC compares novel with known ones")
    ranks = rankdata(scores)
    return float((ranks[is_novel].sum() - num_novel * (num_novel + 1) / 2) / num_novel / num_known)


def _checked(confidence: Values, is_right: NDArray[np.bool_]) -> NDArray[np.float64]:
    values = np.asarray(confidence, np.float64)
    if values.ndim != 1 or not len(values) or len(values) != len(is_right):
        raise ValueError(
            f"confidence has shape {values.shape} and is_right {np.shape(is_right)}; "
            "give one of each for one or more cells"
        )
    if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
        raise ValueError("confidence has values outside 0 to 1; give probabilities")
    return values
