"""What `annotation.py` measured, as the tables of a page: bars, an overview, every entry."""

from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any, Final

from scipy.stats import binomtest

from benchmarks.page_tables import write_tables

OURS: Final = "ours"
REGRESSION: Final = "logistic regression"
UNKNOWN: Final = "one type unknown"
KEYS: Final = {"accuracy": "accuracy", "macro_f1": "macro-F1"}
Facts = dict[str, Any]

WITHIN: Final = -0.5
"""Points behind tuned logistic regression that the bar of a data set's own cells allows."""
LEAST_AUROC: Final = {("baron", "alpha"): 0.95, ("baron", "ductal"): 0.95, ("pbmc3k", "NK"): 0.75}


def write_document(figures: Facts, path: Path) -> None:
    """Replace the tables of a page; errors as `page_tables.split_page`."""
    few = together(figures)
    summary = [overview(figures), *([few] if few else [])]
    parts = ["## Bars\n\n" + bars(figures), "## Overview\n\n" + "\n\n".join(summary)]
    for title, facts in figures.items():
        cells = f"At most {facts['cells']:,} cells.\n\n" if facts.get("cells") else ""
        parts.append(f"## {title}\n\n{cells}{facts['table']}\n\n{facts['verdict']}")
    write_tables(path, parts)


def points_ahead(facts: Facts, key: str) -> float:
    """Points by which ours is ahead of logistic regression."""
    ours, other = (facts["methods"][name][key]["mean"] for name in (OURS, REGRESSION))
    return float(100 * (ours - other))


def bars(figures: Facts) -> str:
    """What was asked for, and whether it was met; rows that were not run are left out."""
    rows: list[tuple[str, str, Callable[[float], bool]]] = []
    for title in figures:
        if "few-shot" in title or title == "pbmc3k → kang":
            rows.append((title, "better", lambda ahead: ahead > 0))
        elif title in ("baron, 5 folds", "pbmc3k, 5 folds", "kang, one donor out"):
            rows.append((title, "within 0.5", lambda ahead: ahead >= WITHIN))
    lines = [
        "| bar, points ahead of logistic regression | accuracy | macro-F1 | |",
        "|---|---|---|---|",
    ]
    for title, asked, is_met in rows:
        if {OURS, REGRESSION} <= set(figures[title]["methods"]):
            ahead = [points_ahead(figures[title], key) for key in KEYS]
            met = [is_met(round(value, 1)) for value in ahead]
            shown = " | ".join(f"{value:+.1f}" for value in ahead)
            word = "met" if all(met) else "missed" if not any(met) else "met in one"
            lines.append(f"| {title}: {asked} | {shown} | {word} |")
    lines += ["", "| bar, AUROC of an unknown type | ours | regression | |", "|---|---|---|---|"]
    for title, facts in figures.items():
        if UNKNOWN in title:
            for kind, least in ((k, v) for (data, k), v in LEAST_AUROC.items() if data in title):
                found = {name: auroc(facts["table"], kind, name) for name in (OURS, REGRESSION)}
                if found[OURS] is not None:
                    word = "met" if found[OURS] >= least else "missed"
                    values = " | ".join("–" if v is None else f"{v:.3f}" for v in found.values())
                    lines.append(
                        f"| {title.split(',')[0]} without {kind}: ≥ {least} | {values} | {word} |"
                    )
    return "\n".join(lines)


def together(figures: Facts) -> str | None:
    """A line for all entries with few cells: mean difference, and a test of all their cells."""
    few = [facts for title, facts in figures.items() if "few-shot" in title]
    few = [facts for facts in few if {OURS, REGRESSION} <= set(facts["methods"])]
    if not few:
        return None
    tests = [facts["tests"][REGRESSION] for facts in few]
    won, lost = (sum(test[name] for test in tests) for name in ("only_ours", "only_theirs"))
    p_value = binomtest(won, won + lost).pvalue if won + lost else 1.0
    ahead = [fmean(points_ahead(facts, key) for facts in few) for key in KEYS]
    return (
        f"The {len(few)} data sets with 10 cells of each type together: {ahead[0]:+.1f} points of "
        f"accuracy and {ahead[1]:+.1f} of macro-F1 in the mean; {won:,} cells are right by ours "
        f"alone, {lost:,} by logistic regression alone (p = {p_value:.1g})."
    )


def auroc(table: str, kind: str, method: str) -> float | None:
    """AUROC of an unknown type as the referee's table of trials has it."""
    for line in table.splitlines():
        words = [word.strip() for word in line.strip("| ").split("|")]
        if len(words) == 5 and kind in words[0] and words[1] == method:
            return float(words[2]) / 100
    return None


def overview(figures: Facts) -> str:
    """A line for each entry: ours, regression, their difference, and who is best of all."""
    lines = [
        "| | ours | logistic regression | difference, accuracy | macro-F1 | best accuracy of all |",
        "|---|---|---|---|---|---|",
    ]
    for title, facts in figures.items():
        methods = facts["methods"]
        if UNKNOWN in title or not {OURS, REGRESSION} <= set(methods):
            continue
        test = facts["tests"][REGRESSION]
        ours, other = (100 * methods[name]["accuracy"]["mean"] for name in (OURS, REGRESSION))
        apart = test["difference"]
        half = 50 * (apart["high"] - apart["low"])
        width = f" ± {half:.1f}" if half else ""
        best = max(methods, key=lambda name: methods[name]["accuracy"]["mean"])
        most = 100 * methods[best]["accuracy"]["mean"]
        lines.append(
            f"| {title} | {ours:.1f} | {other:.1f} | {100 * apart['mean']:+.1f}{width} "
            f"(p = {test['p_cells']:.1g}) | {points_ahead(facts, 'macro_f1'):+.1f} "
            f"| {best} {most:.1f} |"
        )
    return "\n".join(lines)
