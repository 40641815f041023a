"""What the referee says: one record per method and trial, and table, tests, verdict, figure."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from datastore.store import write_json
from finetune.benchmark_config import BenchmarkConfig
from finetune.comparison import compare, in_words, interval
from finetune.metrics import ClassificationScores
from finetune.published import references


@dataclass(frozen=True)
class Record:
    """One method on one trial."""

    method: str
    trial: str
    seed: int
    scores: ClassificationScores
    is_right: NDArray[np.bool_]
    seconds: float
    megabytes: float
    novelty: dict[str, float] | None


@dataclass(frozen=True)
class BenchmarkReport:
    """All records, and what they come to."""

    records: tuple[Record, ...]
    summary: dict[str, Any]
    table: str
    verdict: str


def summarise(records: Sequence[Record], config: BenchmarkConfig) -> BenchmarkReport:
    """Mean and interval of each method, tests of ours against each other one, and a verdict."""
    methods: dict[str, Any] = {}
    of = {name: [r for r in records if r.method == name] for name in config.methods}
    for name, found in of.items():
        methods[name] = {
            "accuracy": interval([r.scores.accuracy for r in found]),
            "macro_f1": interval([r.scores.macro_f1 for r in found]),
            "seconds": float(np.mean([r.seconds for r in found])),
            "peak_megabytes": float(max(r.megabytes for r in found)),
        }
        if all(r.novelty for r in found):
            keys = found[0].novelty or {}
            methods[name]["novelty"] = {
                key: interval([(r.novelty or {})[key] for r in found]) for key in keys
            }
    sentences, tests = [], {}
    if "ours" in of:
        for name in (name for name in of if name not in ("ours", "majority")):
            test = compare([r.is_right for r in of["ours"]], [r.is_right for r in of[name]])
            tests[name] = test
            sentences.append(in_words("ours", name, test))
    sentences += references(config.name)
    table = _table(methods) + _novelty_table(records)
    summary = {"methods": methods, "tests": tests, "published": references(config.name)}
    return BenchmarkReport(tuple(records), summary, table, "\n".join(sentences))


def _table(methods: dict[str, Any]) -> str:
    """Markdown table of the methods."""
    lines = ["| method | accuracy | macro-F1 | seconds | peak MB |", "|---|---|---|---|---|"]
    novel = any("novelty" in facts for facts in methods.values())
    if novel:
        lines = [lines[0] + " AUROC | novel found | known kept |", lines[1] + "---|---|---|"]
    for name, facts in methods.items():
        line = f"| {name} | {facts['accuracy']} | {facts['macro_f1']} | {facts['seconds']:.1f} | "
        line += f"{facts['peak_megabytes']:,.0f} |"
        if novel:
            found = facts.get("novelty", {})
            keys = ("auroc", "novel_found", "known_kept")
            line += "".join(f" {found.get(key, '–')} |" for key in keys)
        lines.append(line)
    return "\n".join(lines)


def _novelty_table(records: Sequence[Record]) -> str:
    """Markdown table of each unknown type, means over seeds; empty of other protocols."""
    lines = [
        "",
        "",
        "| trial | method | AUROC | novel found | known kept |",
        "|---|---|---|---|---|",
    ]
    keys = ("auroc", "novel_found", "known_kept")
    for trial, method in dict.fromkeys((r.trial, r.method) for r in records if r.novelty):
        found = [r.novelty or {} for r in records if (r.trial, r.method) == (trial, method)]
        means = (f"{100 * np.mean([facts[key] for facts in found]):.1f}" for key in keys)
        lines.append(f"| {trial} | {method} | {' | '.join(means)} |")
    return "\n".join(lines) if len(lines) > 4 else ""


def write_report(report: BenchmarkReport, folder: Path) -> None:
    """Write JSON, table and figure."""
    from finetune.figures import plot_scores

    folder.mkdir(parents=True, exist_ok=True)
    records = [
        {
            "method": r.method,
            "trial": r.trial,
            "seed": r.seed,
            "seconds": r.seconds,
            "peak_megabytes": r.megabytes,
            "novelty": r.novelty,
            **r.scores.as_json(),
        }
        for r in report.records
    ]
    plain = json.loads(json.dumps(report.summary, default=lambda value: vars(value)))
    whole = {"summary": plain, "verdict": report.verdict, "records": records}
    write_json(folder / "benchmark.json", whole)
    text = f"{report.table}\n\n{report.verdict}\n"
    beside = folder / "benchmark.md.part"
    beside.write_text(text, encoding="utf-8")
    beside.replace(folder / "benchmark.md")
    pooled = {}
    for name in dict.fromkeys(r.method for r in report.records):
        found = [r.scores for r in report.records if r.method == name]
        classes = sorted({c for scores in found for c in scores.classes})
        confusion = np.zeros((len(classes), len(classes)), np.int64)
        for scores in found:
            places = np.searchsorted(classes, scores.classes)
            confusion[np.ix_(places, places)] += scores.confusion
        pooled[name] = ClassificationScores(tuple(classes), confusion)
    plot_scores(pooled, folder / "benchmark.png", ours="ours")
