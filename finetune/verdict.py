"""Who won, in one sentence: the network against the best of its baselines."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from finetune.baselines import BaselineResult
from finetune.metrics import ClassificationScores

LEVEL_POINTS: Final = 0.05
"""Leads below this many points are called level."""


def verdict(ours: ClassificationScores, baselines: Sequence[BaselineResult]) -> str:
    """Say in one sentence who won by accuracy and by macro-F1, and by how many points.

    The network is compared with the best baseline under each measure. A point is a hundredth; a
    lead under 0.05 points counts as none.

    Raises:
        ValueError: If there are no baselines, or one was scored on another number of cells.
    """
    if not baselines:
        raise ValueError("baselines is empty; run at least one to compare with")
    for baseline in baselines:
        if baseline.scores.num_cells != ours.num_cells:
            raise ValueError(
                f"{baseline.name} was scored on {baseline.scores.num_cells} cells "
                f"and the network on {ours.num_cells}; compare them on the same split"
            )
    by_accuracy = max(baselines, key=lambda baseline: baseline.scores.accuracy)
    by_macro_f1 = max(baselines, key=lambda baseline: baseline.scores.macro_f1)
    leads = [
        _Lead("accuracy", ours.accuracy, by_accuracy.scores.accuracy, by_accuracy.name),
        _Lead("macro-F1", ours.macro_f1, by_macro_f1.scores.macro_f1, by_macro_f1.name),
    ]
    first, second = leads
    if (first.side, first.rival) == (second.side, second.rival):
        body = f"{first.opening} {first.amount} and {second.amount}"
    else:
        joint = "and" if first.side == second.side else "but"
        body = f"{first.opening} {first.amount}, {joint} {second.opening} {second.amount}"
    return f"On {ours.num_cells:,} test cells {body}."


@dataclass(frozen=True)
class _Lead:
    """The network against its best rival under one measure."""

    measure: str
    ours: float
    theirs: float
    rival: str

    @property
    def points(self) -> float:
        """Lead of the network in hundredths; negative when it lost."""
        return 100 * (self.ours - self.theirs)

    @property
    def side(self) -> int:
        """1 when the network won, -1 when it lost, 0 when they are level."""
        return 0 if abs(self.points) < LEVEL_POINTS else int(np.sign(self.points))

    @property
    def opening(self) -> str:
        """Who did what, up to the amount."""
        return {
            1: f"the network beats {self.rival} by",
            0: f"the network and {self.rival} are level by",
            -1: f"{self.rival} beats the network by",
        }[self.side]

    @property
    def amount(self) -> str:
        """By how much, with both values, the winner's first."""
        if self.side == 0:
            return f"{self.measure} ({100 * self.ours:.1f})"
        size = f"{abs(self.points):.1f}"
        unit = "point" if size == "1.0" else "points"
        better, worse = sorted((100 * self.ours, 100 * self.theirs), reverse=True)
        return f"{size} {unit} of {self.measure} ({better:.1f} against {worse:.1f})"
