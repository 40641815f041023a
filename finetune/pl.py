"""Plots for notebooks and reports; each draws into Axes and returns them.

    import finetune
    finetune.pl.confusion(scores)
    finetune.pl.top_genes(adata)

Nothing is shown or kept alive behind the caller's back: without `ax` a figure is made that lives as
long as its axes. `save` writes PNG or SVG.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from finetune import calibration as calibration_curves
from finetune.figures import (
    OTHERS,
    OURS,
    SEQUENTIAL_COLOURS,
    confusion_size,
    draw_confusion,
    draw_umap,
    save_figure,
    umap_embedding,
)
from finetune.metrics import ClassificationScores


def confusion(result: ClassificationScores, *, ax: Axes | None = None) -> Axes:
    """Draw a confusion matrix: shades are shares of the true class, numbers are cells."""
    axes = _axes(ax, confusion_size(result))
    draw_confusion(axes, result)
    return axes


def scores(
    methods: Mapping[str, ClassificationScores],
    *,
    measure: str = "accuracy",
    ours: str = "scBERT",
    ax: Axes | None = None,
) -> Axes:
    """Draw one measure of each method as horizontal bars, ours in colour.

    Args:
        methods: Scores on the same cells, top to bottom.
        measure: `accuracy` or `macro_f1`.
        ours: The name to draw in colour.
        ax: Where to draw.

    Raises:
        ValueError: If there are no methods, or no such measure.
    """
    if not methods:
        raise ValueError("methods is empty; give at least one")
    if measure not in ("accuracy", "macro_f1"):
        raise ValueError(f"measure is {measure!r}; give 'accuracy' or 'macro_f1'")
    axes = _axes(ax, (6, 1.2 + 0.42 * len(methods)))
    names = list(methods)
    values = [float(getattr(found, measure)) for found in methods.values()]
    bars = axes.barh(names, values, color=[OURS if name == ours else OTHERS for name in names])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(title=measure.replace("_", "-").capitalize(), xlim=(0, 1.15), xlabel="0 to 1")
    axes.invert_yaxis()
    _strip(axes)
    return axes


def umap(
    adata: Any,
    *,
    color: str = "scbert_label",
    basis: str = "X_scbert",
    seed: int = 0,
    ax: Axes | None = None,
) -> Axes:
    """Draw cells of an AnnData by UMAP of their embedding, coloured by a column of obs.

    A layout in `obsm["X_umap_scbert"]` is used, else made and kept there.

    Raises:
        ValueError: If the AnnData has no such column or embedding.
    """
    for place, name in ((adata.obs, color), (adata.obsm, basis)):
        if name not in place:
            raise ValueError(f"adata has no {name!r}; run finetune.annotate(adata, model) first")
    key = f"X_umap_{basis.removeprefix('X_')}"
    if key not in adata.obsm:
        adata.obsm[key] = umap_embedding(np.asarray(adata.obsm[basis]), seed)
    axes = _axes(ax, (8.5, 6))
    novel = adata.obs.get(color.replace("_label", "_novel")) if "_label" in color else None
    is_novel = None if novel is None else novel.to_numpy(bool)
    draw_umap(axes, adata.obsm[key], list(adata.obs[color].astype(str)), is_novel)
    axes.set_title(f"{adata.n_obs:,} cells")
    return axes


def top_genes(table: Any, *, num_top: int = 8, key: str = "scbert", ax: Axes | None = None) -> Axes:
    """Draw a heat map of the top genes of each type: rows are types, columns genes.

    Args:
        table: Table of top genes (`TypeReasons.top_genes`), or an AnnData that has it in `uns`.
        num_top: Genes of each type to show.
        key: What the AnnData's additions begin with.
        ax: Where to draw.

    Raises:
        ValueError: If there are no top genes.
    """
    if not isinstance(table, pd.DataFrame):
        found = table.uns.get(f"{key}_reasons") or table.uns.get(key, {})
        if "top_genes" not in found:
            raise ValueError("adata has no reasons; run finetune.gene_attention(adata, model)")
        table = found["top_genes"]
    if not len(table):
        raise ValueError("the table of top genes is empty; no type has a cell with reasons")
    shown = table[table["rank"] <= num_top]
    types = list(dict.fromkeys(shown["cell_type"]))
    genes = list(dict.fromkeys(shown["gene"]))
    values = np.zeros((len(types), len(genes)))
    known = table[table["gene"].isin(genes)]
    for row in known.itertuples():
        values[types.index(row.cell_type), genes.index(row.gene)] = row.specific
    longest = max(map(len, types)) * 0.09
    axes = _axes(ax, (3.2 + longest + 0.19 * len(genes), 2.2 + 0.32 * len(types)))
    image = axes.imshow(values, cmap=SEQUENTIAL_COLOURS, aspect="auto", vmin=0)
    axes.set_xticks(range(len(genes)), genes, rotation=90, fontsize=7)
    axes.set_yticks(range(len(types)), types)
    axes.tick_params(length=0)
    axes.set(xlabel="Gene", ylabel="Cell type", title="Genes that speak for a type")
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, label="Logits, more than for other types")
    return axes


def risk_coverage(
    probabilities: NDArray[np.floating], is_right: NDArray[np.bool_], *, ax: Axes | None = None
) -> Axes:
    """Draw the share of wrong labels among the most confident cells, over how many these are.

    Args:
        probabilities: Confidence of each cell, (N,).
        is_right: Whether its label is right, (N,).
        ax: Where to draw.
    """
    coverage, risk = calibration_curves.risk_coverage(np.clip(probabilities, 0, 1), is_right)
    axes = _axes(ax, (5.5, 4))
    axes.plot(coverage, risk, color=OURS)
    axes.set(
        title="Risk and coverage",
        xlabel="Share of cells that are labelled, most confident first",
        ylabel="Share of their labels that are wrong",
        xlim=(0, 1),
        ylim=(0, max(0.05, 1.1 * float(risk.max()))),
    )
    axes.grid(alpha=0.3)
    _strip(axes)
    return axes


def calibration(
    probabilities: NDArray[np.floating],
    is_right: NDArray[np.bool_],
    *,
    num_bins: int = 15,
    ax: Axes | None = None,
) -> Axes:
    """Draw how often cells of a confidence are right; on the diagonal it means what it says.

    Args:
        probabilities: Confidence of each cell, (N,).
        is_right: Whether its label is right, (N,).
        num_bins: Bins of equal width.
        ax: Where to draw.
    """
    mean, share, cells = reliability(probabilities, is_right, num_bins)
    axes = _axes(ax, (4.8, 4.4))
    axes.plot([0, 1], [0, 1], color=OTHERS, linestyle=":", label="Perfect")
    sizes = 20 + 180 * cells / max(1, cells.max())
    axes.plot(mean, share, color=OURS, linewidth=1)
    axes.scatter(mean, share, s=sizes, color=OURS, label="Cells (area: how many)")
    level = np.clip(probabilities, 0, 1)
    error = calibration_curves.calibration_error(level, is_right, num_bins)
    axes.set(
        title=f"Calibration, expected error {error:.3f}",
        xlabel="Mean confidence",
        ylabel="Share of right labels",
        xlim=(0, 1.02),
        ylim=(0, 1.02),
    )
    axes.legend(frameon=False, loc="upper left")
    _strip(axes)
    return axes


def reliability(
    probabilities: NDArray[np.floating], is_right: NDArray[np.bool_], num_bins: int = 15
) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
    """Mean confidence, share of right labels and number of cells of each bin that has cells.

    Raises:
        ValueError: If there are no cells, or the two differ in length.
    """
    _check_pair(probabilities, is_right)
    bins = np.minimum((probabilities * num_bins).astype(int), num_bins - 1)
    cells = np.bincount(bins, minlength=num_bins)
    filled = cells > 0
    mean = np.bincount(bins, weights=probabilities, minlength=num_bins)[filled] / cells[filled]
    share = np.bincount(bins, weights=is_right, minlength=num_bins)[filled] / cells[filled]
    return mean, share, cells[filled]


def save(axes: Axes, path: str | Path) -> None:
    """Write the figure that axes are part of, as `.png` or `.svg`; whole or not at all."""
    figure = axes.get_figure()
    assert isinstance(figure, Figure)
    save_figure(figure, path)


def _axes(ax: Axes | None, size: Sequence[float]) -> Axes:
    if ax is not None:
        return ax
    return Figure(figsize=(size[0], size[1]), layout="constrained").subplots()


def _check_pair(probabilities: NDArray[np.floating], is_right: NDArray[np.bool_]) -> None:
    if not len(probabilities) or len(probabilities) != len(is_right):
        raise ValueError(
            f"probabilities and is_right have {len(probabilities)} and {len(is_right)} cells; give "
            "the same cells to both, one or more"
        )


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
