"""The results of a sweep: a line per row, means with intervals per group, a figure."""

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from datastore.store import write_json
from finetune.sweep import RowReport

SHOWN: Final = ("accuracy", "macro_f1")
"""Metrics of the printed table and the figure; the CSV files have all."""
CONFIDENCE: Final = 0.95


@dataclass(frozen=True)
class Summary:
    """A metric over the repeats of one setting."""

    group: str
    metric: str
    num_rows: int
    mean: float
    low: float
    """Ends of the 95 % interval of the mean by Student's t; not a number for a single row."""
    high: float


def summarize(reports: Sequence[RowReport]) -> list[Summary]:
    """Average every metric over the done rows of each group, in the order of the table.

    Folds of one data set share cells, so that the interval is somewhat too narrow for them.
    """
    values: dict[tuple[str, str], list[float]] = {}
    for report in reports:
        if report.state == "done" and report.found is not None:
            for name, value in (report.found.metrics or {}).items():
                values.setdefault((report.row.group, name), []).append(value)
    return [
        Summary(group, metric, len(found), float(np.mean(found)), *interval(found))
        for (group, metric), found in values.items()
    ]


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the mean of values, by Student's t."""
    from scipy import stats

    if len(values) < 2:
        return float("nan"), float("nan")
    error = float(np.std(values, ddof=1)) / np.sqrt(len(values))
    reach = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * error
    return float(np.mean(values)) - reach, float(np.mean(values)) + reach


def write_results(reports: Sequence[RowReport], output: Path) -> list[Summary]:
    """Write `results.csv`, `summary.csv`, `results.json` and `results.png`; return the summary."""
    summaries = summarize(reports)
    rows = [_row(report) for report in reports]
    _write_csv(output / "results.csv", rows)
    lines = [summary.__dict__ for summary in summaries]
    _write_csv(output / "summary.csv", lines)
    write_json(output / "results.json", {"rows": rows, "summary": _without_nan(lines)})
    if summaries:
        _plot(summaries, output / "results.png")
    return summaries


def table(summaries: Sequence[Summary]) -> list[str]:
    """Show means and intervals, a line per group."""
    groups = list(dict.fromkeys(summary.group for summary in summaries))
    width = max(map(len, groups), default=0)
    lines = []
    for group in groups:
        own = {summary.metric: summary for summary in summaries if summary.group == group}
        shown = {name: own[name] for name in SHOWN if name in own}
        cells = [f"{name.replace('_', ' ')} {_shown(value)}" for name, value in shown.items()]
        num_rows = max(summary.num_rows for summary in shown.values()) if shown else 0
        lines.append(f"{group:{width}}  {num_rows:3d} rows  {'  '.join(cells)}")
    return lines


def _shown(summary: Summary) -> str:
    if np.isnan(summary.low):
        return f"{summary.mean:.4f}"
    return f"{summary.mean:.4f} ({summary.low:.4f} to {summary.high:.4f})"


def _row(report: RowReport) -> dict[str, Any]:
    found = report.found
    line: dict[str, Any] = {"row": report.row.number, "state": report.state, **report.row.settings}
    if found is not None:
        seconds = None if found.ended is None else round(found.ended - found.started, 1)
        line |= {"attempts": found.attempts, "seconds": seconds, "error": found.error}
        line |= found.metrics or {}
    return line


def _write_csv(path: Path, lines: Sequence[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(name for line in lines for name in line))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)
    beside = path.with_suffix(".part")
    beside.write_text(text.getvalue(), encoding="utf-8")
    beside.replace(path)


def _without_nan(lines: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """JSON has no word for it, and only it differs from itself."""
    return [
        {key: None if value != value else value for key, value in line.items()} for line in lines
    ]


def _plot(summaries: Sequence[Summary], path: Path) -> None:
    from matplotlib.figure import Figure

    groups = list(dict.fromkeys(summary.group for summary in summaries))
    figure = Figure(figsize=(7, 1.2 + 0.4 * len(groups)), layout="constrained")
    axes = figure.subplots()
    for place, metric in enumerate(SHOWN):
        found = [summary for summary in summaries if summary.metric == metric]
        heights = [groups.index(summary.group) + 0.2 * place - 0.1 for summary in found]
        means = np.array([summary.mean for summary in found])
        reach = np.nan_to_num(np.array([s.high for s in found]) - means)
        axes.errorbar(means, heights, xerr=reach, fmt="os"[place], label=metric.replace("_", " "))
    axes.set_yticks(range(len(groups)), groups)
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlabel("mean over rows, 95 % interval")
    axes.legend()
    beside = path.with_suffix(".part.png")
    figure.savefig(beside, dpi=150)
    beside.replace(path)
