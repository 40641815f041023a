"""Are two methods different? Intervals over trials, and tests on the same cells and trials."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean and its 95 % interval by Student's t over trials; no width for a single trial.

    Folds share training cells, so the interval of a k-fold is somewhat too narrow.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        """Mean and half width in hundredths."""
        return f"{100 * self.mean:.1f} ± {50 * (self.high - self.low):.1f}"


def interval(values: Sequence[float]) -> Interval:
    """Mean over trials with its interval.

    Raises:
        ValueError: If there are no values.
    """
    if not len(values):
        raise ValueError("values is empty; an interval needs one trial or more")
    mean = float(np.mean(values))
    if len(values) == 1:
        return Interval(mean, mean, mean)
    half = stats.t.ppf(0.975, len(values) - 1) * stats.sem(values)
    return Interval(mean, mean - float(half), mean + float(half))


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """Our method against another on the same cells.

    Attributes:
        only_ours: Cells that ours alone labels rightly.
        only_theirs: Cells that the other alone does.
        p_cells: Exact McNemar test on these, two-sided.
        difference: Mean difference of accuracy over the trials, with its interval.
    """

    only_ours: int
    only_theirs: int
    p_cells: float
    difference: Interval


def compare(ours: Sequence[NDArray[np.bool_]], theirs: Sequence[NDArray[np.bool_]]) -> PairedTest:
    """Compare which cells two methods label rightly, trial by trial.

    Args:
        ours: For each trial, whether each cell is right, (N,).
        theirs: The same of the other method, on the same cells.

    Raises:
        ValueError: If the cells are not the same.
    """
    if [len(x) for x in ours] != [len(x) for x in theirs] or not ours:
        raise ValueError("ours and theirs are of different cells; compare them on the same trials")
    a, b = np.concatenate(list(ours)), np.concatenate(list(theirs))
    won, lost = int((a & ~b).sum()), int((b & ~a).sum())
    p_value = 1.0 if won + lost == 0 else float(stats.binomtest(won, won + lost).pvalue)
    differences = [float(x.mean() - y.mean()) for x, y in zip(ours, theirs, strict=True)]
    return PairedTest(
        only_ours=won, only_theirs=lost, p_cells=p_value, difference=interval(differences)
    )


def in_words(name: str, rival: str, test: PairedTest) -> str:
    """Say who is ahead and whether that may be chance."""
    points = 100 * test.difference.mean
    cells = f"{test.only_ours:,} cells against {test.only_theirs:,}, p = {test.p_cells:.2g}"
    if abs(points) < 0.05:
        return f"{name} and {rival} are level in accuracy ({cells})."
    ahead, behind = (name, rival) if points > 0 else (rival, name)
    sure = "" if test.p_cells < 0.05 else "; this may be chance"
    return f"{ahead} is ahead of {behind} by {abs(points):.1f} points of accuracy ({cells}{sure})."
