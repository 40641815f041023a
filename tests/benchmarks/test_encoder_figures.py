"""The benchmarks of numerics run whole on a tiny store, and measure what they say."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.tiny import tiny_store

ROOT = Path(__file__).resolve().parents[2]


def run(script: str, folder: Path, *more: str) -> dict[str, Any]:
    store = tiny_store(folder / "store").path
    command = [sys.executable, "-W", "ignore", str(ROOT / "benchmarks" / script)]
    command += ["--store", str(store), "--steps", "3", "--batch_size", "2", *more]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
def test_loss_curves(tmp_path: Path) -> None:
    files = ("--plot", str(tmp_path / "curves.png"), "--json", str(tmp_path / "curves.json"))
    result = run("loss_curves.py", tmp_path, *files)

    worst = result["figures"]["worst_relative_difference"]
    assert worst["ours vs formula"] < 2e-6
    assert worst["ours_bf16 vs ours"] < 0.05
    assert worst["ours_redrawn vs ours"] > 1e-6, "other features are other numbers"
    losses = json.loads((tmp_path / "curves.json").read_text())["losses"]
    assert {len(of) for of in losses.values()} == {3}
    assert (tmp_path / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_attention_health(tmp_path: Path) -> None:
    figures = run("attention_health.py", tmp_path)["figures"]

    rows = [of for of in figures.values() if isinstance(of, dict)]
    assert len(rows) == 7
    for row in rows:
        assert 0 <= row["floor_share"] <= 1
        assert 0 < row["entropy"] <= 1.0001
        assert row["loss"] != row["loss_after_redraw"]
