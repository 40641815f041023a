"""`scbert models`: what it prints, for people and for scripts."""

import json
from pathlib import Path

import pytest

from launchers.registry import EXAMPLES, main
from tests.support.disks import small_disk_at
from tests.support.entries import classifier_settings, write_entry
from tests.support.mlflow_store import fresh_store


def test_a_model_from_registration_to_promotion(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fresh_store(tmp_path))
    good = write_entry(tmp_path / "good", "good", **classifier_settings(0.9, 0.8))
    better = write_entry(tmp_path / "better", "better", **classifier_settings(0.95, 0.9))

    def said(*words: object, code: int = 0) -> str:
        assert main([str(word) for word in words]) == code
        captured = capsys.readouterr()
        return captured.err if code else captured.out

    register = ["register", good, "--name", "shell", "--licence", "CC0"]
    assert said(*register, "--alias", "champion") == "models:/shell/1\n"
    assert said("register", better, "--name", "shell", "--alias", "challenger").endswith("/2\n")
    assert "models:/shell/1 @champion\n" in said("list")
    (first, second) = json.loads(said("list", "--json"))
    assert (first["reference"], second["aliases"]) == ("models:/shell/1", ["challenger"])

    shown = said("show", "models:/shell@champion")
    assert "| this model | 0.9000 | 0.8000 |" in shown
    assert "CC0" in shown
    facts = json.loads(said("show", "models:/shell/2", "--json"))
    assert facts["files"]["genes.txt"]["bytes"] == (better / "genes.txt").stat().st_size

    done = said("promote", "models:/shell@challenger")
    assert "macro f1 0.9000, before 0.8000" in done
    assert done.endswith("@champion is models:/shell/2, before models:/shell/1\n")
    assert "is not promoted: its macro f1" in said("promote", "models:/shell/1", code=2)
    forced = json.loads(said("promote", "models:/shell/1", "--force", "--json"))
    assert forced["former"] == "models:/shell/2"
    assert "0.8000" in forced["objection"]

    target = tmp_path / "there" / "model"
    pull = ["pull", "models:/shell@champion", "--to", target]
    assert said(*pull) == f"{target}\n"
    facts = json.loads(said("pull", "models:/shell@champion", "--json"))
    assert facts["reference"] == "models:/shell/1"
    assert Path(facts["folder"], "genes.txt").is_file()
    assert (target / "model.safetensors").read_bytes() == (good / "model.safetensors").read_bytes()
    assert "exists; name a folder" in said(*pull, code=2)
    assert "5 files are as they were registered" in said("verify", "models:/shell/2")
    assert json.loads(said("verify", target, "--json"))["whole"] is True
    (tmp_path / "mlflow.db").rename(tmp_path / "gone.db")
    assert Path(said("pull", "models:/shell@champion", "--offline").strip()).is_dir()
    assert "without --offline" in said("pull", "models:/shell/9", "--offline", code=2)
    assert "there is no registry" in said("pull", "models:/shell/2", code=2)


def test_a_full_disk_at_the_folder_asked_for_is_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("MLFLOW_TRACKING_URI", fresh_store(tmp_path))
    export = write_entry(tmp_path / "export", "weights" * 10_000)
    assert main(["register", str(export), "--name", "large"]) == 0
    with small_disk_at(tmp_path / "disk", "64k") as disk:
        capsys.readouterr()
        assert main(["pull", "models:/large/1", "--to", str(disk / "model")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"the disk of --to {disk}/model is full; free some space" in line
        assert list(disk.iterdir()) == []


@pytest.mark.parametrize("name", EXAMPLES)
def test_help_has_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([name, "--help"])
    assert f"Example: scbert models {name}" in " ".join(capsys.readouterr().out.split())
