"""Figures and tables of a fine-tuning report, written to files.

Builders return a Matplotlib ``Figure`` and leave the file to ``path``: ``.png`` at 150 dpi or
``.svg``. They use the object-oriented interface, so no figure is kept alive behind the caller's
back.
"""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from finetune.metrics import ClassificationScores
from finetune.numba_cache import keep_compiled

DPI = 150
SEQUENTIAL_COLOURS = "Blues"
OURS, OTHERS = "#0072B2", "#A6A6A6"
TRAINING, VALIDATION = "#0072B2", "#D55E00"

# The first ten are Okabe and Ito's (2008) without black and yellow, then Tol's muted ones:
# neighbours differ in lightness as well as in hue. No twenty colours are safe for colour-blind
# readers, so every ten types the marker changes as well.
TYPE_COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7"),
    *("#56B4E9", "#882255", "#999933", "#332288", "#DDCC77"),
    *("#AA4499", "#117733", "#EE8866", "#44AA99", "#661100"),
    *("#6699CC", "#BBCC33", "#AA0A3C", "#8C564B", "#99DDFF"),
)
TYPES_PER_MARKER = 10
TYPE_MARKERS = ("o", "^", "s", "D")
LEGEND_ROWS = 22


def plot_loss(history: Sequence[Mapping[str, float]], path: str | Path) -> Figure:
    """Draw loss, and masked accuracy beside the commonest-bin rule, over steps.

    Args:
        history: Records with ``step`` and any of ``loss``, ``masked_accuracy``,
            ``commonest_bin_accuracy`` and the same with ``validation_`` in front; records and keys
            may be missing anywhere.
        path: Where to write, ``.png`` or ``.svg``.

    Returns:
        The figure: loss on the left, accuracy on the right.

    Raises:
        ValueError: If no record has ``step`` and a loss or an accuracy.
    """
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    lines = (
        (loss, "loss", "Training", TRAINING, "-"),
        (loss, "validation_loss", "Validation", VALIDATION, "-"),
        (accuracy, "masked_accuracy", "Training", TRAINING, "-"),
        (accuracy, "validation_masked_accuracy", "Validation", VALIDATION, "-"),
        (accuracy, "commonest_bin_accuracy", "Commonest-bin rule, training", TRAINING, ":"),
        (accuracy, "validation_commonest_bin_accuracy", "Commonest-bin rule, validation",
        VALIDATION, ":"),
    )  # fmt: skip
    num_drawn = sum(_draw_line(*line, history=history) for line in lines)
    if num_drawn == 0:
        raise ValueError(
            "history has nothing to draw; give records with step and loss or masked_accuracy"
        )
    loss.set(title="Masked-gene loss", xlabel="Step", ylabel="Cross-entropy (nats per hidden gene)")
    accuracy.set(title="Masked accuracy", xlabel="Step", ylabel="Share of hidden genes, 0 to 1")
    for axes in (loss, accuracy):
        _strip(axes)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(frameon=False)
    save_figure(figure, path)
    return figure


def plot_confusion(scores: ClassificationScores, path: str | Path) -> Figure:
    """Draw the confusion matrix: shades are shares of the true class, numbers are cells.

    Args:
        scores: What to draw.
        path: Where to write, ``.png`` or ``.svg``.

    Returns:
        The figure.
    """
    figure = Figure(figsize=confusion_size(scores), layout="constrained")
    draw_confusion(figure.subplots(), scores)
    save_figure(figure, path)
    return figure


def confusion_size(scores: ClassificationScores) -> tuple[float, float]:
    """Width and height in inches that leave room for the names of types."""
    names = 0.075 * max(len(name) for name in scores.classes)
    side = 1.7 + names + 0.5 * max(len(scores.classes), 4)
    return side + 1.2, side


def draw_confusion(axes: Axes, scores: ClassificationScores) -> None:
    """Draw the confusion matrix into axes, as `plot_confusion`."""
    num_classes = len(scores.classes)
    support = scores.support[:, None]
    shares = np.divide(
        scores.confusion, support, out=np.zeros(scores.confusion.shape), where=support > 0
    )
    image = axes.imshow(shares, cmap=SEQUENTIAL_COLOURS, vmin=0, vmax=1)
    for row, column in zip(*np.nonzero(scores.confusion), strict=True):
        colour = "white" if shares[row, column] > 0.55 else "black"
        count = f"{scores.confusion[row, column]:,}"
        axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    axes.set_xticks(
        range(num_classes), scores.classes, rotation=45, ha="right", rotation_mode="anchor"
    )
    axes.set_yticks(range(num_classes), scores.classes)
    axes.set_xticks(np.arange(num_classes - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(num_classes - 1) + 0.5, minor=True)
    axes.grid(which="minor", color="0.9", linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.set(xlabel="Predicted cell type", ylabel="True cell type")
    axes.set_title(
        f"Accuracy {scores.accuracy:.3f}, macro-F1 {scores.macro_f1:.3f}, "
        f"{scores.num_cells:,} cells"
    )
    figure = axes.get_figure()
    if figure is not None:
        figure.colorbar(image, ax=axes, shrink=0.7, label="Share of the true type's cells")


def umap_embedding(x: np.ndarray, seed: int) -> np.ndarray:
    """Lay cells out in two dimensions with UMAP.

    Args:
        x: One vector per cell, (N, D).
        seed: The same seed gives the same layout, on one thread.

    Returns:
        Coordinates, float32 of shape (N, 2). Up to three cells, too few for UMAP, stand on a line.

    Raises:
        ValueError: If ``x`` is not two-dimensional, has no cells, or holds values that are not
            finite.
    """
    if x.ndim != 2 or len(x) == 0:
        raise ValueError(f"x has shape {x.shape}; give one vector for each of one or more cells")
    if not np.isfinite(x).all():
        raise ValueError("x holds NaN or infinity; UMAP needs finite embeddings")
    if len(x) <= 3:
        return np.stack([np.arange(len(x)), np.zeros(len(x))], axis=1).astype(np.float32)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Tensorflow not installed", category=ImportWarning
        )
        import umap  # here, because it compiles for seconds

        keep_compiled(umap.umap_, umap.utils)
        # It then begins from random positions by itself.
        warnings.filterwarnings(
            "ignore", message="Spectral initialisation failed", category=UserWarning
        )
        model = umap.UMAP(
            n_neighbors=min(15, len(x) - 1),
            init="spectral" if len(x) >= 15 else "random",
            random_state=seed,
            n_jobs=1,
        )
        return np.asarray(model.fit_transform(x), dtype=np.float32)


def plot_umap(
    points: np.ndarray,
    labels: Sequence[str],
    path: str | Path,
    title: str,
    novel: np.ndarray | None = None,
) -> Figure:
    """Draw cells coloured by type, commonest first, and novel cells as grey crosses.

    Args:
        points: Coordinates, (N, 2).
        labels: Cell type of each cell.
        path: Where to write, ``.png`` or ``.svg``.
        title: In sentence case.
        novel: Which cells were rejected as of no known type, bool of shape (N,).

    Returns:
        The figure.

    Raises:
        ValueError: If points, labels and novel differ in length.
    """
    names = np.asarray(labels, dtype=str)
    num_entries = len(set(names)) + 1
    num_columns = max(1, -(-num_entries // LEGEND_ROWS))
    figure = Figure(figsize=(5.6 + 2.9 * num_columns, 6), layout="constrained")
    axes = figure.subplots()
    draw_umap(axes, points, labels, novel)
    axes.set_title(title)
    save_figure(figure, path)
    return figure


def draw_umap(
    axes: Axes, points: np.ndarray, labels: Sequence[str], novel: np.ndarray | None = None
) -> None:
    """Draw cells into axes, with the legend beside them, as `plot_umap`."""
    is_novel = np.zeros(len(points), dtype=bool) if novel is None else np.asarray(novel, dtype=bool)
    if not len(points) == len(labels) == len(is_novel):
        raise ValueError(
            f"points, labels and novel have {len(points)}, {len(labels)} "
            f"and {len(is_novel)} cells; "
            "give the same cells to all"
        )
    names = np.asarray(labels, dtype=str)
    size = float(np.clip(30_000 / max(len(points), 1), 4, 30))
    types, num_cells = np.unique(names[~is_novel], return_counts=True)
    for i, name in enumerate(types[np.argsort(-num_cells, kind="stable")]):
        cells = points[(names == name) & ~is_novel]
        colour, marker = _type_style(i)
        label = f"{name} ({len(cells):,})"
        style: dict[str, Any] = {
            "s": size,
            "c": colour,
            "marker": marker,
            "linewidths": 0,
            "alpha": 0.85,
        }
        axes.scatter(cells[:, 0], cells[:, 1], label=label, **style)
    if is_novel.any():
        label = f"Novel ({is_novel.sum():,})"
        style = {"s": size * 2, "c": "0.45", "marker": "x", "linewidths": 0.8}
        axes.scatter(points[is_novel, 0], points[is_novel, 1], label=label, **style)
    axes.set(xlabel="UMAP 1", ylabel="UMAP 2", xticks=[], yticks=[])
    _strip(axes)
    num_columns = max(1, -(-(len(types) + int(is_novel.any())) // LEGEND_ROWS))
    figure = axes.get_figure()
    assert figure is not None
    legend = figure.legend(
        loc="outside right center", ncols=num_columns, frameon=False, title="Cell type (cells)"
    )
    for handle in legend.legend_handles:
        if handle is not None:
            handle.set(sizes=[40], alpha=1)


def plot_scores(
    named_scores: Mapping[str, ClassificationScores], path: str | Path, ours: str = "scBERT"
) -> Figure:
    """Draw accuracy and macro-F1 of each method as horizontal bars, ours in colour.

    Args:
        named_scores: Scores on the same cells by name of the method, in the order from top to
            bottom.
        path: Where to write, ``.png`` or ``.svg``.
        ours: The name to draw in colour; the others are grey.

    Returns:
        The figure: accuracy on the left, macro-F1 on the right.

    Raises:
        ValueError: If there are no scores.
    """
    if not named_scores:
        raise ValueError("named_scores is empty; give at least one method")
    names = list(named_scores)
    colours = [OURS if name == ours else OTHERS for name in names]
    figure = Figure(figsize=(9, 1.2 + 0.42 * len(names)), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    accuracies = [scores.accuracy for scores in named_scores.values()]
    macro_f1s = [scores.macro_f1 for scores in named_scores.values()]
    for axes, title, values in zip(
        panels, ("Accuracy", "Macro-F1"), (accuracies, macro_f1s), strict=True
    ):
        bars = axes.barh(names, values, color=colours, height=0.65)
        axes.bar_label(bars, fmt="%.3f", padding=3)
        axes.set(title=title, xlim=(0, 1.2), xticks=np.linspace(0, 1, 6))
        axes.tick_params(axis="y", length=0)
        _strip(axes)
    panels[0].set_xlabel("Share of cells, 0 to 1")
    panels[1].set_xlabel("Mean F1 over true types, 0 to 1")
    panels[0].invert_yaxis()
    save_figure(figure, path)
    return figure


def score_table(rows: Sequence[tuple[str, ClassificationScores, float | None]]) -> str:
    """Format methods and their scores as aligned plain text.

    Args:
        rows: Name, scores and seconds of each method, in order; None for a time that is not known.

    Returns:
        A heading and a line per method, without a newline at the end.
    """
    cells = [("method", "accuracy", "macro-F1", "seconds")]
    for name, scores, seconds in rows:
        time = "-" if seconds is None else f"{seconds:,.1f}"
        cells.append((name, f"{scores.accuracy:.3f}", f"{scores.macro_f1:.3f}", time))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in (1, 2, 3))])
        for row in cells
    )


def _draw_line(
    axes: Axes,
    key: str,
    label: str,
    colour: str,
    style: str,
    history: Sequence[Mapping[str, float]],
) -> bool:
    """Draw one quantity over steps if any record has it, and say whether."""
    points = [
        (record["step"], record[key]) for record in history if "step" in record and key in record
    ]
    if not points:
        return False
    steps, values = zip(*points, strict=True)
    # A lone value, such as a single validation, would be invisible as a line.
    marker = "o" if len(points) < 10 else None
    axes.plot(steps, values, style, color=colour, label=label, marker=marker, markersize=4)
    return True


def _type_style(i: int) -> tuple[str, str]:
    """Return colour and marker of the i-th commonest type."""
    marker = TYPE_MARKERS[i // TYPES_PER_MARKER % len(TYPE_MARKERS)]
    return TYPE_COLOURS[i % len(TYPE_COLOURS)], marker


def _strip(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Write the figure in the format of the path; whole or not at all, same figure, same bytes."""
    target = Path(path)
    if target.suffix.lower() not in (".png", ".svg"):
        raise ValueError(f"path is {str(path)!r}; let it end in .png or .svg")
    is_svg = target.suffix.lower() == ".svg"
    partial = target.with_name(f".{target.stem}.partial{target.suffix}")
    with matplotlib.rc_context({"svg.hashsalt": "scbert"}):
        figure.savefig(partial, dpi=DPI, metadata={"Date": None} if is_svg else None)
    partial.replace(target)
