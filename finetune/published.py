"""The paper's nine data sets, and figures that were published for them.

The cells are not ours to hand out: a user who has a file runs `scbert benchmark` with the name of
the data set and gets the published figures beside their own. Sources as named by Yang et al. 2022,
Data availability; figures of Boiarsky et al. 2023 are those of their reproduction.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, kw_only=True)
class PublishedDataset:
    """One data set of the paper.

    Attributes:
        tissue: Where the cells come from.
        source: Accession or address.
        protocol: Protocol of the referee that is nearest to the published one.
        label_map: Names that the authors of the cells use → names that the paper uses.
        figures: Published accuracy and macro-F1 by who and what.
    """

    tissue: str
    source: str
    protocol: str
    label_map: Mapping[str, str] = field(default_factory=dict)
    figures: Mapping[str, tuple[float, float | None]] = field(default_factory=dict)


PANCREAS_LABELS: Final = {
    "alpha cell": "alpha",
    "beta cell": "beta",
    "delta cell": "delta",
    "gamma cell": "gamma",
    "PP": "gamma",
    "pp": "gamma",
    "PP cell": "gamma",
}
_PANCREAS: Final = {"scBERT, leave one data set out": (0.992, None)}

DATASETS: Final[Mapping[str, PublishedDataset]] = {
    "Zheng68k": PublishedDataset(
        tissue="peripheral blood",
        source="10x Genomics, fresh 68k PBMCs donor A (SRP073767)",
        protocol="k-fold",
        figures={
            "scBERT (Yang et al. 2022)": (0.759, 0.691),
            "scBERT, reproduced (Boiarsky et al. 2023)": (0.766, 0.675),
            "scBERT without pretraining (Boiarsky et al. 2023)": (0.758, 0.672),
            "logistic regression L1 (Boiarsky et al. 2023)": (0.8115, 0.707),
        },
    ),
    "Baron": PublishedDataset(
        tissue="pancreas",
        source="GSE84133",
        protocol="leave-group-out",
        label_map=PANCREAS_LABELS,
        figures=_PANCREAS,
    ),
    "Muraro": PublishedDataset(
        tissue="pancreas",
        source="GSE85241",
        protocol="leave-group-out",
        label_map=PANCREAS_LABELS,
        figures=_PANCREAS,
    ),
    "Segerstolpe": PublishedDataset(
        tissue="pancreas",
        source="E-MTAB-5061",
        protocol="leave-group-out",
        label_map=PANCREAS_LABELS,
        figures=_PANCREAS,
    ),
    "Xin": PublishedDataset(
        tissue="pancreas",
        source="GSE81608",
        protocol="leave-group-out",
        label_map=PANCREAS_LABELS,
        figures=_PANCREAS,
    ),
    "MacParland": PublishedDataset(
        tissue="liver",
        source="GSE115469",
        protocol="leave-type-out",
        figures={"scBERT, known types": (0.942, None), "scBERT, novel types": (0.329, None)},
    ),
    "Tucker": PublishedDataset(tissue="heart", source="SCP498", protocol="k-fold"),
    "Lukassen": PublishedDataset(
        tissue="lung", source="EGAS00001004344 (counts on figshare)", protocol="k-fold"
    ),
    "HCA": PublishedDataset(tissue="15 organs", source="GSE159929", protocol="k-fold"),
}
"""Data sets by the name in `name`."""


def renamed(labels: NDArray[np.str_], name: str | None) -> NDArray[np.str_]:
    """Types by the paper's names, where a data set is one of the paper's; others stay, (N,)."""
    known = None if name is None else DATASETS.get(name)
    names = {} if known is None else known.label_map
    return np.array([names.get(str(label), str(label)) for label in labels])


def references(name: str | None) -> list[str]:
    """Sentences with the published figures of a data set; none for one that is not known."""
    if name is None or name not in DATASETS:
        return []
    lines = []
    for who, (accuracy, macro_f1) in DATASETS[name].figures.items():
        second = "" if macro_f1 is None else f", macro-F1 {100 * macro_f1:.1f}"
        lines.append(f"Published: {who}: accuracy {100 * accuracy:.1f}{second}.")
    return lines
