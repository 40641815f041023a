"""What `pretraining_worth.py` measured, as tables for a page and as a figure."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.page_tables import write_tables

Facts = dict[str, Any]
FROZEN: Final = ("logistic regression", "probe, fresh", "probe, vectors", "probe, pretrained")
FROZEN_PAIRS: Final = (
    "probe, pretrained − probe, fresh",
    "probe, pretrained − probe, vectors",
    "probe, pretrained − logistic regression",
    "with probe, pretrained − logistic regression",
    "with probe, vectors − logistic regression",
)
TUNED: Final = ("fine-tuned, fresh", "fine-tuned, pretrained", "experts alone")
TUNED_PAIRS: Final = (
    "fine-tuned, pretrained − fine-tuned, fresh",
    "product, pretrained − product, fresh",
    "product, pretrained − experts alone",
)


def write_document(result: Facts, path: Path) -> None:
    """Replace the tables of a page; errors as `page_tables.split_page`."""
    frozen, trained = (grouped(result["figures"][kind]) for kind in ("frozen", "trained"))
    parts = []
    for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
        parts.append(f"### Frozen network, {name}\n\n{table(frozen, FROZEN, FROZEN_PAIRS, key)}")
        if trained:
            parts.append(
                f"### Trained further, {name}\n\n{table(trained, TUNED, TUNED_PAIRS, key)}"
            )
    counted = [words(frozen, FROZEN_PAIRS), words(trained, TUNED_PAIRS)]
    parts.append("### In words\n\n" + "\n".join(line for line in counted if line))
    write_tables(path, parts)


def grouped(settings: Facts) -> Facts:
    """Rows of one data set together, few cells first."""
    titles = list(dict.fromkeys(name.rsplit(", ", 1)[0] for name in settings))

    def place(name: str) -> tuple[int, int]:
        data, budget = name.rsplit(", ", 1)
        return titles.index(data), int(budget) if budget.isdigit() else 10**9

    order = sorted(settings, key=place)
    return {name: settings[name] for name in order}


def table(settings: Facts, methods: Sequence[str], pairs: Sequence[str], key: str) -> str:
    """Means of methods in percent, and differences in points with half widths of 95 % intervals.

    Of the methods and pairs those that were measured.
    """
    methods = [name for name in methods if all(name in of["methods"] for of in settings.values())]
    pairs = [pair for pair in pairs if all(pair in of["differences"] for of in settings.values())]
    titles = ["learn → label, cells of each type", *methods, *pairs]
    lines = ["| " + " | ".join(titles) + " |", "|" + "---|" * len(titles)]
    for name, facts in settings.items():
        means = [f"{100 * facts['methods'][of][key][0]:.1f}" for of in methods]
        apart = [points(facts["differences"][pair][key]) for pair in pairs]
        lines.append("| " + " | ".join([name, *means, *apart]) + " |")
    return "\n".join(lines)


def points(bounds: Sequence[float]) -> str:
    """Mean and half width in points; bold where the interval is on one side of zero."""
    mean, low, high = bounds
    text = f"{100 * mean:+.1f} ± {50 * (high - low):.1f}"
    return f"**{text}**" if low > 0 or high < 0 else text


def words(settings: Facts, pairs: Sequence[str]) -> str:
    """Count for each pair where it is ahead, behind and undecided."""
    lines = []
    for pair in pairs:
        for key, name in (("accuracy", "accuracy"), ("macro_f1", "macro-F1")):
            found = [
                of["differences"][pair][key]
                for of in settings.values()
                if pair in of["differences"]
            ]
            if not found:
                continue
            ahead = sum(low > 0 for _, low, _ in found)
            behind = sum(high < 0 for _, _, high in found)
            mean = 100 * sum(of[0] for of in found) / len(found)
            lines.append(
                f"- {pair}, {name}: ahead in {ahead} of {len(found)} rows, behind in {behind}, "
                f"undecided in {len(found) - ahead - behind}; {mean:+.1f} points in the mean."
            )
    return "\n".join(lines)


def write_figure(result: Facts, path: Path) -> None:
    """Draw the pretraining beside the commonest-bin rule, and the differences of accuracy."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    settings = grouped(result["figures"]["frozen"])
    widths = {"width_ratios": [1.3, *[1] * len(FROZEN_PAIRS)]}
    figure, (first, *others) = plt.subplots(
        *(1, 1 + len(FROZEN_PAIRS)),
        figsize=(13, 1.2 + 0.24 * max(10, len(settings))),
        layout="constrained",
        gridspec_kw=widths,
    )
    draw_curve(first, result["figures"]["pretraining"])
    for number, (axes, pair) in enumerate(zip(others, FROZEN_PAIRS, strict=True)):
        draw_differences(axes, settings, pair)
        axes.set_yticks(range(len(settings)), [] if number else list(settings), fontsize=7)
    for axes in (first, *others):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_curve(axes: Any, curve: Facts) -> None:
    """Masked accuracy over the steps, of training and held-out cells."""
    for side, style in (("training", "-"), ("held_out", "o")):
        rows = curve.get(side, [])
        steps = [row[0] for row in rows]
        name = side.replace("_", " ")
        axes.plot(steps, [row[1] for row in rows], style, color="tab:blue", label=name)
        rule = f"commonest bin, {name}"
        axes.plot(steps, [row[2] for row in rows], style, color="tab:gray", label=rule)
    axes.set(xlabel="step", ylabel="masked accuracy")
    axes.legend(frameon=False, fontsize=7)


def draw_differences(axes: Any, settings: Facts, pair: str) -> None:
    """A line for each setting: difference of accuracy and interval, in points."""
    for place, facts in enumerate(settings.values()):
        if pair in facts["differences"]:
            mean, low, high = (100 * value for value in facts["differences"][pair]["accuracy"])
            axes.plot([low, high], [place, place], color="tab:blue", linewidth=1)
            axes.plot([mean], [place], "o", color="tab:blue", markersize=3)
    axes.axvline(0, color="black", linewidth=0.6)
    axes.set_ylim(len(settings) - 0.5, -0.5)
    axes.set_title(pair.replace(" − ", "\n− "), fontsize=7)
    axes.set_xlabel("points of accuracy", fontsize=8)
