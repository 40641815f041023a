"""Knobs of the referee's protocols."""

from dataclasses import dataclass
from typing import Literal

Protocol = Literal[
    "k-fold", "leave-group-out", "cross-data-set", "few-shot", "imbalance", "marker-deletion",
    "leave-type-out",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ProtocolConfig:
    """How cells are split."""

    name: Protocol = "k-fold"
    """Folds; one group out at a time (donor, technology); another file; few cells of each type;
    uneven types; markers removed; one type unknown."""
    num_folds: int = 5
    """Folds of `k-fold`."""
    group_key: str | None = None
    """Column of obs with the groups of `leave-group-out`."""
    per_class: tuple[int, ...] = (5, 10, 20, 50)
    """Cells of each type to learn from, in `few-shot`."""
    deleted: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    """Shares of the markers to remove, in `marker-deletion`."""
    types: tuple[str, ...] | None = None
    """Types to leave out, in `leave-type-out`; none takes each type of 20 cells or more."""
    test_share: float = 0.3
    """Share of each type that is labelled in `imbalance`, `marker-deletion`, `leave-type-out`."""

    def __post_init__(self) -> None:
        if self.num_folds < 2:
            raise ValueError(f"protocol.num_folds is {self.num_folds}; give 2 or more")
        if not 0 < self.test_share < 1:
            raise ValueError(
                f"protocol.test_share is {self.test_share}; give a share inside 0 to 1"
            )
        if not self.per_class or min(self.per_class) < 1:
            raise ValueError(f"protocol.per_class is {self.per_class}; give numbers of 1 or more")
        if not self.deleted or min(self.deleted) < 0 or max(self.deleted) > 1:
            raise ValueError(f"protocol.deleted is {self.deleted}; give shares from 0 to 1")
        if (self.name == "leave-group-out") != (self.group_key is not None):
            raise ValueError(
                "protocol.group_key names the groups of leave-group-out, and only of it"
            )
