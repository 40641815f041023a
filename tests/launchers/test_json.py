"""`--json`: what a command came to, as one line that a script reads."""

import json
from pathlib import Path
from typing import Any

import pytest

from datastore.store import open_store
from launchers import scbert
from tests.support.labelled import write_encoder, write_labelled
from tests.support.tiny import tiny_store


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Any:
    """Runs a command that is to succeed, and returns what its one line says."""

    def run(words: list[object]) -> Any:
        assert scbert.main([*map(str, words), "--json"]) == 0
        (line,) = capsys.readouterr().out.splitlines()
        return json.loads(line)

    return run


def test_a_store_that_was_built(said: Any, tmp_path: Path) -> None:
    cells = write_labelled(tmp_path / "cells.h5ad", 40)
    output = tmp_path / "cells.zarr"
    facts = said(["store", "build", "--sources", cells, "--output", output, "--min_genes", 1])
    assert facts["cells"] == open_store(output).num_cells == 40


def test_gene_vectors(said: Any, tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store").path
    output = tmp_path / "vectors"
    words = ["--store", store, "--output", output, "--dim", 4, "--epochs", 1, "--group_by", "side"]
    facts = said(["genes", "embed", *words])
    assert (facts["output"], facts["genes"], facts["dim"]) == (str(output), 32, 4)


def test_a_fine_tuning_and_its_page(
    said: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # UMAP compiles for half a minute, and says nothing to a script.
    monkeypatch.setattr("finetune.page.umap_embedding", lambda x, seed: x[:, :2])
    encoder = write_encoder(tmp_path / "encoder")
    cells = write_labelled(tmp_path / "cells.h5ad", 90)
    output = tmp_path / "run"
    words = ["--encoder", encoder, "--data.path", cells, "--output", output, "--epochs", 1]
    facts = said(["finetune", *words, "--tracking.uri", f"sqlite:///{tmp_path}/mlflow.db"])
    scores = json.loads((output / "scores.json").read_text())
    assert facts["verdict"] == scores["verdict"]
    assert set(facts["scores"]) > {"scBERT", "logistic regression"}
    assert facts["scores"]["scBERT"]["accuracy"] == scores["metrics"]["accuracy"]
    assert Path(facts["export"], "labels.txt").is_file()
    assert said(["report", output])["page"] == facts["page"]
    assert Path(facts["page"]).is_file()


def test_a_benchmark(said: Any, tmp_path: Path) -> None:
    cells = write_labelled(tmp_path / "cells.h5ad", 60)
    output = tmp_path / "benchmark"
    words = ["--data", cells, "--output", output, "--protocol.name", "k-fold"]
    facts = said(["benchmark", *words, "--methods", "majority", "nearest mean"])
    trials = json.loads(Path(facts["trials"]).read_text())
    assert set(facts["methods"]) == {"majority", "nearest mean"}
    assert facts["methods"] == trials["summary"]["methods"]
    assert facts["verdict"] == trials["verdict"]
