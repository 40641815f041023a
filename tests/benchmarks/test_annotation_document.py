"""Tables of the annotation suite: bars, differences, and who is best."""

from pathlib import Path
from typing import Any

import pytest

from benchmarks.annotation_document import auroc, bars, overview, together, write_document
from benchmarks.page_tables import BEGIN, END

TRIALS = """
| trial | method | AUROC | novel found | known kept |
|---|---|---|---|---|
| without alpha | ours | 96.1 | 90.0 | 95.0 |
| without alpha | logistic regression | 80.0 | 10.0 | 95.0 |
| without ductal | ours | 90.2 | 50.0 | 95.0 |
"""


COUNTS = {"only_ours": 9, "only_theirs": 2}


def entry(
    ours: tuple[float, float], other: tuple[float, float], table: str = "| t |"
) -> dict[str, Any]:
    def method(scores: tuple[float, float]) -> dict[str, Any]:
        keys = ("accuracy", "macro_f1")
        return {key: {"mean": value} for key, value in zip(keys, scores, strict=True)}

    apart = {"mean": ours[0] - other[0], "low": -0.01, "high": 0.03}
    return {
        "methods": {"ours": method(ours), "logistic regression": method(other)},
        "tests": {"logistic regression": {"difference": apart, "p_cells": 0.02, **COUNTS}},
        "table": table,
        "verdict": "said",
        "cells": 2_000,
    }


FIGURES = {
    "baron, few-shot, 10 cells of each type": entry((0.92, 0.81), (0.91, 0.80)),
    "pbmc3k, 5 folds": entry((0.945, 0.92), (0.95, 0.93)),
    "baron, one type unknown": entry((0.9, 0.9), (0.9, 0.9), TRIALS),
}


def test_bars_say_what_was_met() -> None:
    lines = bars(FIGURES).splitlines()
    assert "| baron, few-shot, 10 cells of each type: better | +1.0 | +1.0 | met |" in lines
    # Half a point behind is within the bar, a whole one is not.
    assert "| pbmc3k, 5 folds: within 0.5 | -0.5 | -1.0 | met in one |" in lines
    assert "| baron without alpha: ≥ 0.95 | 0.961 | 0.800 | met |" in lines
    assert "| baron without ductal: ≥ 0.95 | 0.902 | – | missed |" in lines
    assert auroc(TRIALS, "beta", "ours") is None


def test_overview_has_differences_and_the_best() -> None:
    text = overview(FIGURES)
    assert "| 92.0 | 91.0 | +1.0 ± 2.0 (p = 0.02) | +1.0 | ours 92.0 |" in text
    assert "| 94.5 | 95.0 | -0.5 ± 2.0 (p = 0.02) | -1.0 | logistic regression 95.0 |" in text
    assert "unknown" not in text


def test_few_shot_entries_are_tested_together() -> None:
    second = {"kang, few-shot, 10 cells of each type": entry((0.90, 0.80), (0.90, 0.82))}
    found = together(FIGURES | second)
    assert found is not None
    assert "The 2 data sets" in found
    assert "+0.5 points of accuracy and -0.5 of macro-F1" in found
    assert "18 cells are right by ours alone, 4 by" in found
    assert "(p = 0.004)" in found  # binomial, 18 of 22
    assert together({}) is None


def test_a_page_keeps_what_stands_around_the_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"# Title\n\n{BEGIN}\nformer tables\n{END}\n\nThe end.\n")
    write_document(FIGURES, page)
    text = page.read_text()
    assert text.startswith("# Title\n\n" + BEGIN)
    assert text.endswith(END + "\n\nThe end.\n")
    assert "former tables" not in text
    assert "## pbmc3k, 5 folds\n\nAt most 2,000 cells.\n\n| t |\n\nsaid" in text
    page.write_text("# No marks\n")
    with pytest.raises(ValueError, match="add them where tables belong"):
        write_document(FIGURES, page)
