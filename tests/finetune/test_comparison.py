"""Intervals and paired tests beside SciPy's own."""

import numpy as np
import pytest
from scipy import stats

from finetune.comparison import compare, in_words, interval


def test_interval_is_students() -> None:
    values = [0.9, 0.8, 0.95, 0.85]
    found = interval(values)
    low, high = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert (found.mean, found.low, found.high) == pytest.approx((0.875, low, high))
    assert str(found) == f"87.5 ± {50 * (high - low):.1f}"
    assert interval([0.5]).low == 0.5
    with pytest.raises(ValueError, match="one trial or more"):
        interval([])


def test_paired_test_by_hand() -> None:
    ours = [np.array([True] * 8 + [False] * 2), np.array([True] * 10)]
    theirs = [np.array([True] * 6 + [False] * 3 + [True]), np.array([True] * 7 + [False] * 3)]
    found = compare(ours, theirs)
    # trial 1: cells 6 and 7 ours alone, cell 9 theirs alone; trial 2: three ours alone
    assert (found.only_ours, found.only_theirs) == (5, 1)
    assert found.p_cells == pytest.approx(2 * 7 / 64)
    assert found.difference.mean == pytest.approx((0.1 + 0.3) / 2)
    assert "ours is ahead of them by 20.0 points" in in_words("ours", "them", found)
    assert "this may be chance" in in_words("ours", "them", found)
    turned = in_words("ours", "them", compare(theirs, ours))
    assert turned.startswith("them is ahead of ours")
    level = compare(ours, ours)
    assert level.p_cells == 1
    assert "level" in in_words("ours", "them", level)
    with pytest.raises(ValueError, match="same trials"):
        compare(ours, theirs[:1])
