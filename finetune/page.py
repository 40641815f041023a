"""One HTML page for a person: what was trained on what, how good it is, and why.

The page is made of what a fine-tuning leaves in its folder: `scores.json`, and where they are
`heldout.npz`, `reasons.json` and `export/config.json`. It is one file, needs no network, and its
figures are also written to `figures/` as PNG and SVG.
"""

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from finetune import pl
from finetune.calibration import risk_coverage
from finetune.figures import plot_umap, umap_embedding
from finetune.labelled_files import write_beside
from finetune.metrics import ClassificationScores
from finetune.page_parts import Section, document, facts, figure, paragraph, table

log = logging.getLogger(__name__)

PAGE = "report.html"
REASONS = "reasons.json"
_MOST_UMAP_CELLS = 20_000


@dataclass(frozen=True)
class HeldOut:
    """Held-out cells as the model saw them."""

    truth: NDArray[np.str_]
    labels: NDArray[np.str_]
    probabilities: NDArray[np.float32]
    embedding: NDArray[np.float32]
    is_novel: NDArray[np.bool_]

    @property
    def confidence(self) -> NDArray[np.float32]:
        """Probability of the likeliest type, (N,)."""
        return np.asarray(self.probabilities.max(axis=1))

    @property
    def given(self) -> NDArray[np.str_]:
        """Likeliest type, (N,)."""
        return np.asarray(self.labels[self.probabilities.argmax(axis=1)])

    @property
    def is_right(self) -> NDArray[np.bool_]:
        """Whether the likeliest type is the true one, (N,)."""
        return np.asarray(self.given == self.truth)


def report(run: str | Path) -> Path:
    """Write the page of a fine-tuning run, and its figures.

    Args:
        run: The folder that the fine-tuning wrote.

    Returns:
        `report.html` in that folder.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If it is not that of a finished fine-tuning, or a file in it is damaged.
    """
    folder = Path(run)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run folder at {folder}")
    scores = _read_json(folder / "scores.json")
    if scores is None:
        raise ValueError(
            f"{folder} is not a finished fine-tuning: scores.json is missing; name the --output "
            "of `scbert finetune`"
        )
    try:
        sections = list(_sections(folder, scores))
    except (KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{folder} holds records of another version ({type(error).__name__}: {error}); "
            "fine-tune again"
        ) from error
    page = document(f"Cell types: {folder.resolve().name}", str(scores["verdict"]), sections)
    write_beside(folder / PAGE, lambda path: path.write_text(page, encoding="utf-8"))
    log.info("%s", folder / PAGE)
    return folder / PAGE


def read_heldout(path: Path) -> HeldOut | None:
    """Read the held-out predictions of a run, if it has them.

    Raises:
        ValueError: If the file is damaged.
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            probabilities = stored["probabilities"]
            is_novel = np.zeros(len(probabilities), np.bool_)
            return HeldOut(
                stored["truth"],
                stored["labels"],
                probabilities,
                stored["embedding"],
                stored.get("is_novel", is_novel),
            )
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} is damaged ({error}); fine-tune again") from error


def _sections(folder: Path, scores: dict[str, Any]) -> Iterator[Section]:
    figures = folder / "figures"
    figures.mkdir(exist_ok=True)
    ours = ClassificationScores(
        tuple(scores["ours"]["classes"]), np.asarray(scores["ours"]["confusion"])
    )
    held_out = read_heldout(folder / "heldout.npz")
    reasons = _read_json(folder / REASONS)
    top = None if reasons is None else pd.DataFrame(reasons["top_genes"]["logit"])
    yield _provenance(folder, ours)
    yield _methods(scores, figures)
    yield _classes(scores, ours, figures)
    if held_out is not None:
        yield _trust(held_out, scores, figures)
        yield _map(held_out, figures)
    if reasons is not None and top is not None:
        yield _reasons(reasons, top, figures)


def _provenance(folder: Path, ours: ClassificationScores) -> Section:
    export = _read_json(folder / "export" / "config.json") or {}
    provenance, encoder = export.get("provenance", {}), export.get("encoder", {})
    known = {
        "Encoder": provenance.get("pretrained"),
        "Shape": f"{encoder['depth']} blocks of width {encoder['dim']}" if encoder else None,
        "Cells to learn from": _number(provenance.get("cells_trained_on")),
        "Held-out cells": _number(ours.num_cells),
        "Cell types": _number(len(ours.classes)),
        "Seed": provenance.get("seed"),
        "MLflow run": provenance.get("run_id"),
        "Code": provenance.get("git_commit"),
    }
    content = facts({name: str(value) for name, value in known.items() if value is not None})
    return Section("What was trained", content)


def _methods(scores: dict[str, Any], figures: Path) -> Section:
    methods = scores.get("methods") or [
        {"name": "scBERT", **{key: scores["ours"][key] for key in ("accuracy", "macro_f1")}}
    ]
    rows = [
        [
            method["name"],
            f"{method['accuracy']:.3f}",
            f"{method['macro_f1']:.3f}",
            "" if method.get("seconds") is None else f"{method['seconds']:,.1f}",
            str(method.get("setting") or ""),
        ]
        for method in methods
    ]
    heads = ["Method", "Accuracy", "Macro-F1", "Seconds", "Setting"]
    axes = _bars(methods)
    spoken = "; ".join(f"{row[0]}: accuracy {row[1]}, macro-F1 {row[2]}" for row in rows)
    return Section(
        "Scores beside the baselines",
        table("All methods on the same held-out cells", heads, rows)
        + _drawn(axes, figures / "methods", f"Bars of accuracy and macro-F1. {spoken}."),
    )


def _classes(scores: dict[str, Any], ours: ClassificationScores, figures: Path) -> Section:
    rows = [
        [
            name,
            *(f"{found[key]:.3f}" for key in ("precision", "recall", "f1")),
            str(found["support"]),
        ]
        for name, found in scores["ours"]["per_class"].items()
    ]
    heads = ["Cell type", "Precision", "Recall", "F1", "Cells"]
    wrong = int(ours.num_cells - np.trace(ours.confusion))
    spoken = f"Confusion matrix: {wrong:,} of {ours.num_cells:,} cells off the diagonal."
    return Section(
        "Each cell type",
        table("Scores of each type on the held-out cells", heads, rows)
        + _drawn(pl.confusion(ours), figures / "confusion", spoken),
    )


def _trust(held_out: HeldOut, scores: dict[str, Any], figures: Path) -> Section:
    confidence, is_right = held_out.confidence, held_out.is_right
    coverage, risk = risk_coverage(np.clip(confidence, 0, 1), is_right)
    half = float(risk[np.searchsorted(coverage, 0.5)])
    curve = (
        f"Errors over coverage: {float(risk[-1]):.1%} of all labels are wrong, {half:.1%} of those "
        "of the more confident half."
    )
    metrics = scores.get("metrics", {})
    text = paragraph(
        f"{int(held_out.is_novel.sum()):,} of {len(confidence):,} held-out cells are called novel."
    )
    if "calibration_error" in metrics:
        text += paragraph(
            f"Expected calibration error {metrics['calibration_error']:.3f}, "
            f"{metrics['calibration_error_uncalibrated']:.3f} before calibration."
        )
    mean, share, _ = pl.reliability(confidence, is_right)
    points = ", ".join(f"{a:.2f}: {b:.2f}" for a, b in zip(mean, share, strict=True))
    return Section(
        "How far to trust a label",
        text
        + _drawn(pl.risk_coverage(confidence, is_right), figures / "risk_coverage", curve)
        + _drawn(
            pl.calibration(confidence, is_right),
            figures / "calibration",
            f"Mean confidence and share of right labels: {points}.",
        ),
    )


def _map(held_out: HeldOut, figures: Path) -> Section:
    rows = np.arange(len(held_out.truth))
    if len(rows) > _MOST_UMAP_CELLS:
        rows = np.sort(np.random.default_rng(0).permutation(rows)[:_MOST_UMAP_CELLS])
    points = umap_embedding(held_out.embedding[rows], seed=0)
    labels, novel = list(map(str, held_out.given[rows])), held_out.is_novel[rows]
    for suffix in ("svg", "png"):
        plot_umap(points, labels, figures / f"umap.{suffix}", "Held-out cells by label", novel)
    spoken = f"UMAP of the embeddings of {len(rows):,} held-out cells, coloured by their label."
    # Thousands of points are smaller as pixels than as paths.
    return Section("Map of the held-out cells", figure(figures / "umap.png", spoken))


def _reasons(reasons: dict[str, Any], top: pd.DataFrame, figures: Path) -> Section:
    content = ""
    if len(top):
        rows = [
            [str(name), ", ".join(part.sort_values("rank")["gene"][:10])]
            for name, part in top.groupby("cell_type", sort=False)
        ]
        spoken = "; ".join(f"{name}: {genes.split(', ')[0]}" for name, genes in rows)
        content += table("Genes that add most to the logit of a type", ["Cell type", "Genes"], rows)
        content += _drawn(
            pl.top_genes(top, num_top=5),
            figures / "top_genes",
            f"Heat map of top genes by type; the first of each: {spoken}.",
        )
    rows = [
        [
            found["removed"],
            f"{found['drop']:.3f}",
            f"{found['changed']:.1%}",
            "" if found["p_value"] is None else f"{found['p_value']:.2g}",
        ]
        for found in reasons["deletion"]
    ]
    heads = ["Removed", "Fall of probability", "Labels changed", "Sign test, against random"]
    caption = f"Deletion test: {reasons['genes_removed']} expressed genes removed from each cell"
    content += paragraph(reasons["sentence"]) + table(caption, heads, rows)
    return Section("Genes that decided", content)


def _bars(methods: list[dict[str, Any]]) -> Axes:
    """Accuracy and macro-F1 as pairs of bars."""
    height = 1.4 + 0.5 * len(methods)
    axes: Axes = Figure(figsize=(7, height), layout="constrained").subplots()
    places = np.arange(len(methods))
    for shift, key, colour, label in (
        (-0.2, "accuracy", "#0072B2", "Accuracy"),
        (0.2, "macro_f1", "#E69F00", "Macro-F1"),
    ):
        values = [method[key] for method in methods]
        bars = axes.barh(places + shift, values, height=0.36, color=colour, label=label)
        axes.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
    axes.set_yticks(places, [method["name"] for method in methods])
    axes.set(xlim=(0, 1.18), xlabel="0 to 1")
    axes.invert_yaxis()
    axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    return axes


def _drawn(axes: Axes, place: Path, spoken: str) -> str:
    """Write a figure as PNG and SVG, and return it for the page."""
    for suffix in (".png", ".svg"):
        pl.save(axes, place.with_suffix(suffix))
    return figure(place.with_suffix(".svg"), spoken)


def _number(value: int | None) -> str | None:
    return None if value is None else f"{value:,}"


def _read_json(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); fine-tune again") from error
    return found
