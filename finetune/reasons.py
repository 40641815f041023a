"""Reasons by cell type: top genes, the markers among them, and whether removing them hurts."""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from scipy import sparse
from scipy.stats import binomtest

from datastore.genes import GenePanel
from datastore.randomness import derive_key
from finetune.attribution import VIEWS, attribute
from finetune.classifier import CellClassifier, predict
from finetune.markers import marker_overlap

log = logging.getLogger(__name__)

NUM_TOP: Final = 20
CELLS_PER_TYPE: Final = 50
BATCH_SIZE: Final = 8
_RANDOM_DRAWS: Final = 3
_DELETION_CELLS: Final = 200


@dataclass(frozen=True, kw_only=True)
class Deletion:
    """What happened when some expressed genes of each cell were set to zero.

    Attributes:
        removed: Which: the top genes of a view, `most expressed`, or `random`.
        drop: Mean fall of the probability of the cell's type.
        changed: Share of cells that got another type.
        worse_than_random: Share of cells, of those with a difference, whose probability fell more
            than with random genes removed.
        p_value: Of that share, two-sided sign test.
    """

    removed: str
    drop: float
    changed: float
    worse_than_random: float | None = None
    p_value: float | None = None


@dataclass(frozen=True, kw_only=True)
class TypeReasons:
    """What genes did for each type, over some of its cells.

    Attributes:
        labels: Cell types, C.
        genes: The panel, G.
        num_cells: Cells looked at of each type, (C,).
        views: Mean of each view over the type's cells, (C, G), by name.
        deletions: The deletion test.
        num_removed: Genes removed from each cell in that test.
    """

    labels: tuple[str, ...]
    genes: tuple[str, ...]
    num_cells: NDArray[np.int64]
    views: Mapping[str, NDArray[np.float32]]
    deletions: tuple[Deletion, ...]
    num_removed: int

    def specific(self, view: str = "logit") -> NDArray[np.float32]:
        """Mean of a view less its mean over the other types that have cells, (C, G)."""
        values, there = self.views[view], self.num_cells > 0
        if there.sum() < 2:
            return values
        total = values[there].sum(axis=0)
        others = (total - values) / (there.sum() - 1)
        return np.asarray(np.where(there[:, None], values - others, 0), np.float32)

    def top_genes(
        self,
        view: str = "logit",
        num_top: int = NUM_TOP,
        markers: Mapping[str, Collection[str]] | None = None,
    ) -> pd.DataFrame:
        """Rank the genes of each type by how much more they do for it than for the others.

        Args:
            view: One of `VIEWS`.
            num_top: Genes of a type.
            markers: Marker genes by type, to say whose markers a gene is among the overlaps.

        Returns:
            A row per type and gene: `cell_type`, `rank`, `gene`, `specific`, `mean`, and with
            markers `marker_of`, `overlap_p` (of the type whose markers the top genes hold most).
        """
        rows = []
        specific = self.specific(view)
        for code in np.flatnonzero(self.num_cells > 0):
            best = np.argsort(-specific[code], kind="stable")[:num_top]
            best = best[specific[code, best] > 0]
            names = [self.genes[place] for place in best]
            overlaps = marker_overlap(names, markers or {}, self.genes)
            for rank, place in enumerate(best, 1):
                row = {
                    "cell_type": self.labels[code],
                    "rank": rank,
                    "gene": self.genes[place],
                    "specific": float(specific[code, place]),
                    "mean": float(self.views[view][code, place]),
                }
                if markers is not None:
                    of = [o.cell_type for o in overlaps if self.genes[place] in o.genes]
                    row["marker_of"] = "; ".join(of)
                    row["overlap_type"] = overlaps[0].cell_type if overlaps else ""
                    row["overlap_p"] = overlaps[0].p_value if overlaps else 1.0
                rows.append(row)
        return pd.DataFrame(rows)

    def as_json(self, markers: Mapping[str, Collection[str]] | None = None) -> dict[str, Any]:
        """Top genes by view and the deletion test, as JSON holds them."""
        return {
            "cells": {
                name: int(number) for name, number in zip(self.labels, self.num_cells, strict=True)
            },
            "top_genes": {
                view: self.top_genes(view, markers=markers).to_dict("records")
                for view in self.views
            },
            "deletion": [vars(deletion) for deletion in self.deletions],
            "genes_removed": self.num_removed,
        }


def type_reasons(
    model: CellClassifier,
    panel: GenePanel,
    counts: sparse.csr_matrix,
    *,
    num_removed: int = NUM_TOP,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
) -> TypeReasons:
    """Find what genes did for the types that cells get, and test it by removing genes.

    Args:
        model: The classifier.
        panel: The model's genes.
        counts: Raw counts in panel order, (N, G); some cells of each type are enough.
        num_removed: Genes that the deletion test removes from each cell.
        seed: Of the random genes of the deletion test.
        batch_size: Cells at a time.
    """
    sums = {view: np.zeros((len(model.labels), len(panel))) for view in VIEWS}
    num_cells = np.zeros(len(model.labels), np.int64)
    few = np.sort(_sample(counts.shape[0], _DELETION_CELLS, seed))
    tested: dict[str, list[NDArray[np.float32]]] = {view: [] for view in VIEWS}
    start = 0
    for part in attribute(model, counts, batch_size):
        np.add.at(num_cells, part.codes, 1)
        rows = few[(few >= start) & (few < start + len(part.codes))] - start
        for view, values in part.views.items():
            np.add.at(sums[view], part.codes, values)
            tested[view].append(values[rows])
        start += len(part.codes)
    means = {
        view: (total / np.maximum(num_cells, 1)[:, None]).astype(np.float32)
        for view, total in sums.items()
    }
    scores = {view: np.concatenate(values) for view, values in tested.items()}
    deletions = deletion_test(model, counts[few], scores, num_removed, seed, batch_size)
    return TypeReasons(
        labels=model.labels,
        genes=panel.names,
        num_cells=num_cells,
        views=means,
        deletions=deletions,
        num_removed=num_removed,
    )


def deletion_test(
    model: CellClassifier,
    counts: sparse.csr_matrix,
    scores: Mapping[str, NDArray[np.float32]],
    num_removed: int,
    seed: int,
    batch_size: int = BATCH_SIZE,
) -> tuple[Deletion, ...]:
    """Remove each cell's top genes and see how far the probability of its type falls.

    Beside it: random expressed genes (three draws), and the most expressed genes, which any view
    has to beat to say more than expression does.

    Args:
        model: The classifier.
        counts: Raw counts in panel order, (N, G).
        scores: By name a number per cell and gene, (N, G); the highest are removed.
        num_removed: Expressed genes to remove from each cell.
        seed: Of the random genes.
        batch_size: Cells per forward pass.
    """
    dense = counts.toarray()
    before = predict(model, counts, batch_size, progress=False).probabilities
    codes = before.argmax(axis=1)
    rows = np.arange(len(codes))

    def drop(ranking: NDArray[Any]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        changed = dense.copy()
        ranking = np.where(dense > 0, ranking, -np.inf)
        top = np.argsort(-ranking, axis=1, kind="stable")[:, :num_removed]
        np.put_along_axis(changed, top, 0, axis=1)
        after = predict(model, sparse.csr_matrix(changed), batch_size, progress=False)
        fall = before[rows, codes].astype(np.float64) - after.probabilities[rows, codes]
        return fall, after.probabilities.argmax(axis=1) != codes

    rng = np.random.default_rng(derive_key(seed, "deletion"))
    drawn = [drop(rng.random(dense.shape)) for _ in range(_RANDOM_DRAWS)]
    random = np.mean([fall for fall, _ in drawn], axis=0)
    found = []
    for name, ranking in {**scores, "most expressed": dense}.items():
        fall, changed = drop(ranking)
        worse, unequal = int((fall > random).sum()), int((fall != random).sum())
        found.append(
            Deletion(
                removed=name,
                drop=float(fall.mean()),
                changed=float(changed.mean()),
                worse_than_random=worse / unequal if unequal else 0.5,
                p_value=float(binomtest(worse, unequal).pvalue) if unequal else 1.0,
            )
        )
    changed_by_chance = float(np.mean([changed.mean() for _, changed in drawn]))
    found.append(Deletion(removed="random", drop=float(random.mean()), changed=changed_by_chance))
    return tuple(found)


def rows_per_type(
    codes: NDArray[np.int32], num_types: int, most: int, seed: int = 0
) -> NDArray[np.int64]:
    """Choose up to `most` cells of each type at random, rows in rising order."""
    chosen = [np.empty(0, np.int64)]
    for code in range(num_types):
        rows = np.flatnonzero(codes == code)
        chosen.append(rows[_sample(len(rows), most, seed)])
    return np.sort(np.concatenate(chosen))


def describe_deletions(deletions: Sequence[Deletion], num_removed: int) -> str:
    """Say what the deletion test found, and of which views it found nothing."""
    by_name = {deletion.removed: deletion for deletion in deletions}
    random = by_name["random"]
    best = max(
        (deletion for deletion in deletions if deletion.removed in VIEWS),
        key=lambda deletion: deletion.drop,
    )
    verb = "hurts more than" if best.drop > random.drop else "does not hurt more than"
    said = (
        f"Removing each cell's top {num_removed} genes by {best.removed} {verb} removing random "
        f"expressed ones: the probability of its type falls by {best.drop:.3f} against "
        f"{random.drop:.3f} ({by_name['most expressed'].drop:.3f} for the most expressed genes)."
    )
    idle = [d for d in deletions if d.removed in VIEWS and d is not best and d.drop <= random.drop]
    if idle:
        words = " and ".join(f"{deletion.removed} ({deletion.drop:.3f})" for deletion in idle)
        said += f" Genes by {words} hurt no more than random ones: they do not explain the labels."
    return said


def _sample(number: int, most: int, seed: int) -> NDArray[np.int64]:
    rng = np.random.default_rng(derive_key(seed, "reasons", number))
    return rng.permutation(number)[:most]
