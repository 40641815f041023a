"""Protocols of the referee: which cells are learnt from and which are labelled, trial by trial.

A protocol is a function from labels and settings to trials. The same labels, settings and seed give
the same trials, so all methods see the same cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray

from finetune.dataset import stratified_folds, stratified_split
from finetune.protocol_config import ProtocolConfig

Rows = NDArray[np.int64]

IMBALANCE: Final = (1.0, 0.01, 1.0, 0.01)
"""Cells of four types in the paper's trial, 10,000 / 100 / 10,000 / 100, as shares."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One split.

    Attributes:
        name: What is special about it, such as `donor 1015`.
        train: Rows to learn from.
        test: Rows to label; empty if another file is labelled.
        deleted: Columns whose counts are removed everywhere.
        novel: The type that is unknown to the methods.
    """

    name: str
    train: Rows
    test: Rows
    deleted: Rows = field(default_factory=lambda: np.empty(0, np.int64))
    novel: str | None = None


def k_fold(labels: NDArray[np.str_], config: ProtocolConfig, seed: int) -> list[Trial]:
    """Label each cell once, by methods that learnt from the other folds."""
    folds = stratified_folds(labels, config.num_folds, seed)
    return [
        Trial(
            name=f"fold {fold}",
            train=np.flatnonzero(folds != fold),
            test=np.flatnonzero(folds == fold),
        )
        for fold in range(config.num_folds)
        if (folds == fold).any()
    ]


def leave_group_out(labels: NDArray[np.str_], groups: NDArray[np.str_]) -> list[Trial]:
    """Label each group by methods that learnt from the others.

    Cells of types that no other group has are left out of the test: nothing could name them.

    Raises:
        ValueError: If there are fewer than two groups.
    """
    names = np.unique(groups)
    if len(names) < 2:
        raise ValueError(f"all cells are of group {str(names[0])!r}; leave-group-out needs two")
    trials = []
    for name in names:
        train = np.flatnonzero(groups != name)
        is_test = (groups == name) & np.isin(labels, labels[train])
        if is_test.any() and len(np.unique(labels[train])) > 1:
            trials.append(Trial(name=str(name), train=train, test=np.flatnonzero(is_test)))
    return trials


def few_shot(labels: NDArray[np.str_], config: ProtocolConfig, seed: int) -> list[Trial]:
    """Learn from few cells of each type, at most half of them, and label all others."""
    rng = np.random.default_rng([seed, 1])
    orders = [rng.permutation(np.flatnonzero(labels == name)) for name in np.unique(labels)]
    trials = []
    for number in config.per_class:
        train = np.sort(np.concatenate([rows[: min(number, len(rows) // 2)] for rows in orders]))
        is_test = np.isin(labels, labels[train])
        is_test[train] = False
        trials.append(Trial(name=f"{number} cells", train=train, test=np.flatnonzero(is_test)))
    return trials


def imbalance(labels: NDArray[np.str_], config: ProtocolConfig, seed: int) -> list[Trial]:
    """Learn from four types in the numbers 100 : 1 : 100 : 1 (scBERT, Fig. 3), at least two cells.

    The commonest types take part, so that the paper's 10,000 are scaled to the fourth commonest.

    Raises:
        ValueError: If there are fewer than four types.
    """
    names, sizes = np.unique(labels, return_counts=True)
    if len(names) < 4:
        raise ValueError(f"imbalance needs four types, there are {len(names)}")
    chosen = names[np.argsort(-sizes, kind="stable")[:4]]
    among = np.flatnonzero(np.isin(labels, chosen))
    train, test = (among[rows] for rows in stratified_split(labels[among], config.test_share, seed))
    rng = np.random.default_rng([seed, 2])
    order = rng.permutation(chosen)
    most = min(int((labels[train] == name).sum()) for name in chosen)
    kept = [
        rng.permutation(train[labels[train] == name])[: max(2, round(share * most))]
        for name, share in zip(order, IMBALANCE, strict=True)
    ]
    return [Trial(name="100:1:100:1", train=np.sort(np.concatenate(kept)), test=test)]


def marker_deletion(
    labels: NDArray[np.str_], markers: Sequence[int], config: ProtocolConfig, seed: int
) -> list[Trial]:
    """Label without a growing share of the marker genes.

    Raises:
        ValueError: If there are no markers.
    """
    if not len(markers):
        raise ValueError("no marker of these types is among the genes; give another --markers")
    train, test = stratified_split(labels, config.test_share, seed)
    order = np.random.default_rng([seed, 3]).permutation(np.unique(markers))
    return [
        Trial(
            name=f"{share:.0%} deleted",
            train=train,
            test=test,
            deleted=order[: round(share * len(order))],
        )
        for share in config.deleted
    ]


def leave_type_out(labels: NDArray[np.str_], config: ProtocolConfig, seed: int) -> list[Trial]:
    """Learn without one type, then label cells of all types.

    Raises:
        ValueError: If a type is not there, or fewer than two would be left.
    """
    names, sizes = np.unique(labels, return_counts=True)
    if len(names) < 3:
        raise ValueError(f"leave-type-out needs three types, there are {len(names)}")
    chosen = config.types or tuple(str(name) for name in names[sizes >= 20])
    if unknown := sorted(set(chosen) - {str(name) for name in names}):
        raise ValueError(f"protocol.types has {unknown[0]!r}; there are {', '.join(names)}")
    train, test = stratified_split(labels, config.test_share, seed)
    return [
        Trial(name=f"without {name}", train=train[labels[train] != name], test=test, novel=name)
        for name in chosen
    ]


PROTOCOLS: dict[str, Callable[[NDArray[np.str_], ProtocolConfig, int], list[Trial]]] = {
    "k-fold": k_fold,
    "few-shot": few_shot,
    "imbalance": imbalance,
    "leave-type-out": leave_type_out,
}
"""Protocols that need nothing but labels; the others take groups, markers or a second file."""
