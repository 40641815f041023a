"""`scbert sweep` on tiny cells: a row trains like `scbert finetune`, a wrong row harms none."""

import csv
import json
from pathlib import Path

import pytest

from launchers import sweep
from tests.support.labelled import write_encoder, write_labelled
from tests.support.mlflow_store import fresh_store

SMALL = ["--epochs", "1", "--head.hidden", "8", "--head.bottleneck", "4", "--train", "head"]


@pytest.fixture
def table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fresh_store(tmp_path))
    write_labelled(tmp_path / "a.h5ad", 60)
    write_encoder(tmp_path / "encoder")
    path = tmp_path / "table.csv"
    path.write_text("data,fold,seed\na.h5ad,0/2,0\na.h5ad,1/2,0\ngone.h5ad,0/2,0\na.h5ad,1/2,0\n")
    return path


def test_rows_run_alone_and_are_collected(table: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: object, code: int = 0) -> str:
        assert sweep.main([str(word) for word in words]) == code, capsys.readouterr().err
        captured = capsys.readouterr()
        return captured.out if code != 2 else captured.err

    where = (table, "--output", "sweep")
    base = ("--encoder", "encoder", *SMALL)
    assert "there is no sweep in sweep" in said("collect", *where, code=2)
    assert "row 1 is done: accuracy" in said("run", *where, "--row", 1, *base)
    assert "row 2 is done" in said("run", *where, "--row", 2, *base)
    assert "gone.h5ad" in said("run", *where, "--row", 3, *base, code=2)
    assert "row 4 repeats row 2" in said("run", *where, "--row", 4, *base, code=2)
    assert "--array=1-4" in said("run", *where, "--row", 5, *base, code=2)
    assert "other settings" in said("run", *where, "--row", 1, "--encoder", "other", code=2)

    status = said("status", *where)
    assert status.splitlines()[-1] == "2 done, 1 failed, 1 repeated"
    assert "row    3  failed: " in status
    assert said("status", *where, "--rows", "failed") == "3\n"
    assert json.loads(said("status", *where, "--json"))["rows"][2]["state"] == "failed"

    collected = said("collect", *where, code=1)  # not complete
    assert "data a.h5ad" in collected
    assert "2 rows  accuracy" in collected
    with (table.parent / "sweep" / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    scores = [
        json.loads(path.read_text())["metrics"]["accuracy"]
        for path in sorted((table.parent / "sweep").glob("rows/*/run/scores.json"))
    ]
    assert sorted(float(line["accuracy"]) for line in lines[:2]) == sorted(scores)
    facts = json.loads(said("collect", *where, "--json", code=1))
    assert facts["mlflow_runs"] >= 2
    assert facts["mlflow_waiting"] == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param("check table.csv", "row 3: there is no file 'gone.h5ad'", id="file"),
        pytest.param("check none.csv", "none.csv: No such file", id="table"),
        pytest.param("run table.csv --output o --row 1 --lrr 1", "no setting --lrr", id="flag"),
        pytest.param("run table.csv --output o", "required: --row", id="row"),
    ],
)
def test_wrong_words_are_one_sentence(
    table: Path, words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_check_prints_what_submits_the_table(
    table: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table.write_text("data,seed\na.h5ad,0\na.h5ad,1\n")
    assert sweep.main(["check", "table.csv"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first == "2 rows in 1 groups"
    template = next(Path(word) for word in second.split() if word.endswith(".sbatch"))
    assert second.startswith("sbatch --array=1-2%20 ")
    assert template.is_file()


@pytest.mark.parametrize("name", sweep.EXAMPLES)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        sweep.main([name, "--help"])
    assert f"Example: scbert sweep {name}" in " ".join(capsys.readouterr().out.split())
