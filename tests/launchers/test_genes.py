"""`scbert genes embed`: vectors in a folder that pretraining takes as it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from datastore.genes import GenePanel, write_panel
from launchers import genes, scbert
from tests.support.tiny import tiny_panel, tiny_store


@pytest.fixture
def panel(tmp_path: Path) -> str:
    write_panel(GenePanel(("A", "B", "C")), tmp_path / "panel.txt")
    return str(tmp_path / "panel.txt")


@pytest.fixture
def vectors(tmp_path: Path) -> str:
    (tmp_path / "gene2vec.txt").write_text("2 4\nC 1 2 3 4\nA 5 6 7 8\n")
    return str(tmp_path / "gene2vec.txt")


@pytest.mark.parametrize("called", ["scbert", "script"])
def test_import(
    called: str, tmp_path: Path, panel: str, vectors: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    words = ["embed", "--vectors", vectors, "--panel", panel, "--output", str(out)]
    assert (scbert.main(["genes", *words]) if called == "scbert" else genes.main(words)) == 0
    printed = capsys.readouterr().out
    assert "1 of 3 genes have no vector (B); theirs are random" in printed
    assert f"--gene2vec.vectors {out}/genes.npy" in printed
    assert np.load(out / "genes.npy")[[0, 2]].tolist() == [[5, 6, 7, 8], [1, 2, 3, 4]]
    assert json.loads((out / "provenance.json").read_text())["imported"]["file"] == "gene2vec.txt"


def test_train_from_a_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    store = tiny_store(tmp_path / "s.zarr")
    out = tmp_path / "out"
    words = ["--store", str(store.path), "--output", str(out), "--group_by", "side"]
    assert scbert.main(["genes", "embed", *words, "--dim", "8", "--epochs", "3"]) == 0
    assert "32 genes × 8, gene2vec: skip-gram" in capsys.readouterr().out
    assert np.load(out / "genes.npy").shape == (32, 8)
    assert tuple((out / "genes.txt").read_text().split()) == tiny_panel().names


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["embed", "--output", "o"], "give vectors to import"),
        (["embed", "--store", "s", "--output", "o", "--dimm", "8"], "dimm"),
        (["embed", "--store", "nowhere", "--output", "o"], "no cell store at nowhere"),
        (["train"], "there is no command 'train'; there is `genes embed`"),
    ],
)
def test_refusals_are_one_sentence(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert genes.main(words) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.startswith("error: ")
    assert printed.count("\n") == 1


@pytest.mark.parametrize("words", [[], ["--help"], ["embed", "--help"]])
def test_help_teaches_by_example(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        genes.main(words)
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Example: scbert genes embed --vectors" in text
