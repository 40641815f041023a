"""Benchmarks that pages in docs/ show, whole, on as few cells as they take."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ROOT
from tests.support.labelled import write_encoder, write_labelled

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def run(script: str, *words: object) -> dict[str, Any]:
    """Run a script; return its line of JSON."""
    return run_python(ROOT / "benchmarks" / script, *words)


def run_python(*words: object) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_annotation(tmp_path: Path) -> None:
    data = f"baron={write_labelled(tmp_path / 'a.h5ad', 90)}"
    page = tmp_path / "page.md"
    page.write_text(
        "# Page\n\n<!-- tables -->\nformer tables\n<!-- end of tables -->\n\nThe end.\n"
    )
    methods = ("majority", "nearest mean", "logistic regression", "ours")
    words = ["--only", "baron, 5 folds", "--methods", ",".join(methods), "--data", data]
    kept = tmp_path / "results.json"
    result = run("annotation.py", *words, "--json", kept, "--document", page)
    facts = result["figures"]["baron, 5 folds"]
    assert set(facts["methods"]) == set(methods)
    text = page.read_text()
    assert "## baron, 5 folds" in text
    assert "former tables" not in text
    assert text.endswith("The end.\n")
    ahead = result["ratios"]["baron, 5 folds: ours − logistic regression"]
    assert f"| baron, 5 folds: within 0.5 | {ahead['accuracy']:+.1f} |" in text
    again = run("annotation.py", *words, "--json", kept, "--document", page)
    assert again["figures"]["baron, 5 folds"]["seconds"] == facts["seconds"]  # not run again
    assert page.read_text() == text


def test_finetune_ways(tmp_path: Path) -> None:
    data = write_labelled(tmp_path / "a.h5ad", 90)
    encoder = write_encoder(tmp_path / "encoder")
    page, kept = tmp_path / "page.md", tmp_path / "results.json"
    page.write_text("# Page\n\n<!-- tables -->\n<!-- end of tables -->\n")
    words = ["--encoder", encoder, "--data", data, "--seeds", 1, "--budgets", 4, "--json", kept]
    result = run("finetune_ways.py", *words, "--document", page)
    ways = result["figures"]["ways"]
    assert {"head", "all", "lora", "layer rates", "probe", "regression"} < set(ways["4"])
    assert json.loads(kept.read_text()) == result
    text = page.read_text()
    assert "## 4 cells of each type" in text
    assert text.count("| lora |") == 1


def test_ingest(tmp_path: Path) -> None:
    result = run("ingest.py", "--quick", "--json", "--cells", 2_000, "--rounds", 1)
    assert result["ratios"]["wall_two_workers_vs_one"] > 0
    assert result["figures"]["one_worker"]["disk_mb"] > 0


def test_encoder_step() -> None:
    shorter = (
        "import sys; sys.path.insert(0, 'benchmarks'); import encoder_step; "
        "encoder_step.LENGTHS = (64, 256, 1_024); encoder_step.SETTLING_ROUNDS = 1; "
        "encoder_step.main()"
    )
    result = run_python("-c", shorter, "--quick", "--json")
    assert result["figures"]["length"] == 256
    assert result["ratios"]["forward"] > 0


def test_pretraining_worth(tmp_path: Path) -> None:
    data = f"baron={write_labelled(tmp_path / 'a.h5ad', 90)}"
    encoder = write_encoder(tmp_path / "encoder", sequence="expressed")
    line = {"step": 1, "time": 0.0, "loss": 2.0, "masked_accuracy": 0.5}
    line |= {"commonest_bin_accuracy": 0.6, "cells_per_second": 20.0}
    history = tmp_path / "metrics.jsonl"
    history.write_text(json.dumps(line) + "\n")
    words = ["--encoder", encoder, "--history", history, "--data", data, "--seeds", 1]
    result = run("pretraining_worth.py", *words, "--kinds", "frozen")
    assert len(result["figures"]["frozen"]) == 4
