"""The command `scbert`: its words reach the launchers, and `store` says what is true."""

import contextlib
import json
import os
import pty
import re
import subprocess
import sys
import termios
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest

from datastore.store import CellStore, open_store
from launchers import registry, scbert
from tests.support.cells import (
    dense_store,
    file_bytes,
    gene_names,
    random_cells,
    stored_parts,
    write_h5ad,
)
from tests.support.documents import ROOT
from tests.support.http_server import serve_folder


@pytest.fixture
def store(tmp_path: Path) -> CellStore:
    """Two sources with species and tissue in a table, built by the command itself."""
    lines = ["path,species,tissue"]
    for place, (species, tissue) in enumerate([("human", "lung"), ("mouse", "")]):
        raw = random_cells(f"s{place}", place, 30 + 10 * place, gene_names(20))
        write_h5ad(tmp_path / "raw", raw)
        lines.append(f"{raw.name}.h5ad,{species},{tissue}")
    (tmp_path / "raw" / "table.csv").write_text("\n".join(lines) + "\n")
    words = ["store", "build", "--sources", str(tmp_path / "raw" / "table.csv")]
    sizes = ["--cells_per_partition", "25", "--cells_per_shard", "16", "--min_genes", "1"]
    assert scbert.main([*words, "--output", str(tmp_path / "s.zarr"), *sizes]) == 0
    return open_store(tmp_path / "s.zarr")


def test_the_command_is_installed() -> None:
    (command,) = [e for e in entry_points(group="console_scripts") if e.name == "scbert"]
    assert command.load() is scbert.main
    path = Path(sys.executable).with_name("scbert")
    done = subprocess.run([path, "--help"], capture_output=True, text=True, cwd="/", check=True)
    assert done.stdout == scbert.HELP


@pytest.mark.parametrize("words", [[], ["--help"], ["store", "--help"]])
def test_help_teaches_in_one_screen(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert scbert.main(words) == 0
    printed = capsys.readouterr().out
    assert len(printed.splitlines()) <= 40
    assert max(map(len, printed.splitlines())) <= 100
    for name in scbert.COMMANDS:
        assert re.search(rf"^  scbert {name}\b", printed, re.MULTILINE)


@pytest.mark.parametrize("name", scbert.COMMANDS)
def test_every_command_has_its_own_help(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        scbert.main([*name.split(), "--help"])
    assert exit_info.value.code == 0
    assert f"usage: scbert {name}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param(
            "stroe verify x", "no command `scbert stroe verify`; there are store", id="typo"
        ),
        pytest.param("store", "there are store build, store append, store verify", id="no verb"),
        pytest.param("store verify", "required: store (scbert store verify", id="nothing"),
        pytest.param("store info none", "no cell store at none", id="no store"),
        pytest.param("store verify s3:/x", "no cell store at s3:/x", id="an address cut short"),
        pytest.param("store verify ftp://x/y", "no address of a store", id="another address"),
        pytest.param("store build --output o", "--sources is missing", id="no sources"),
        pytest.param("models lst", "invalid choice: 'lst'", id="models"),
        pytest.param("models pull", "required: reference (scbert models pull --help", id="pull"),
    ],
)
def test_wrong_words_are_one_sentence(
    words: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert scbert.main(words.split()) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.parametrize("flag", ["--tracking_uri", "--tracking-uri"])
def test_the_registry_spells_flags_as_all_do(
    flag: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    address = f"sqlite:///{tmp_path}/mlflow.db"
    assert registry.main(["list", flag, address]) == 2
    assert f"there is no registry at {address}" in capsys.readouterr().err


def test_append_adds_to_the_store(store: CellStore, tmp_path: Path) -> None:
    former = file_bytes(store.path)
    more = write_h5ad(tmp_path / "more", random_cells("s9", 9, 12, gene_names(20)))
    words = ["store", "append", "--sources", str(more), "--output", str(store.path)]
    assert scbert.main([*words, "--min_genes", "1"]) == 0
    grown = open_store(store.path)
    assert grown.header.generations == (70, 12)
    now = file_bytes(store.path)
    assert all(now[name] == content for name, content in former.items() if "dataset_" in name)


def test_verify_tells_and_returns_1_for_damage(
    store: CellStore, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert scbert.main(["store", "verify", str(store.path)]) == 0
    assert capsys.readouterr().out == f"{store.path} is whole, byte for byte\n"
    (store.path / "dataset_0" / "left").write_text("")
    assert scbert.main(["store", "verify", str(store.path)]) == 0
    stray, verdict = capsys.readouterr().out.splitlines()
    assert stray == "stray      dataset_0/left: is not part of the store"
    assert verdict == f"{store.path} is whole; 1 files do not belong to it"
    (store.path / "dataset_1/X/data/c/0").unlink()
    assert scbert.main(["store", "verify", str(store.path), "--threads", "1"]) == 1
    printed = capsys.readouterr().out
    assert "missing    dataset_1/X/data/c/0: is missing" in printed
    assert f"{store.path} is damaged: 1 files; copy these again or rebuild it" in printed
    assert scbert.main(["store", "verify", str(store.path), "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["whole"] is False
    assert "missing    dataset_1/X/data/c/0: is missing" in facts["findings"]


@pytest.mark.parametrize("command", [*scbert.COMMANDS, "store"])
def test_help_has_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with contextlib.suppress(SystemExit):
        assert scbert.main([*command.split(), "--help"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Example: " in said or " scbert store build --" in said


def test_an_estimate_can_be_read_by_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--preset", "quickstart", "--gpu", "cpu", "--num_genes", "2000"]
    assert scbert.main(["estimate", *words, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["tokens_per_cell"] == 2001


@pytest.mark.parametrize("watched", [True, False])
def test_bars_are_shown_to_people_only(store: CellStore, watched: bool) -> None:
    ours, theirs = pty.openpty() if watched else os.pipe()
    if watched:
        termios.tcsetwinsize(theirs, (24, 100))
    words = [sys.executable, "-m", "launchers.scbert", "store", "verify", str(store.path)]
    done = subprocess.run(words, cwd=ROOT, stderr=theirs, stdout=subprocess.PIPE, check=True)
    os.close(theirs)
    said = b""
    with contextlib.suppress(OSError):  # how a terminal says that nobody writes any more
        while piece := os.read(ours, 65536):
            said += piece
    os.close(ours)
    assert b"is whole, byte for byte" in done.stdout
    assert (b"verify: 100%" in said and b"B/s" in said) if watched else said == b"", said


def test_info_is_what_the_store_holds(store: CellStore, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert scbert.main(["store", "info", str(store.path), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    dense = dense_store(store)
    assert (facts["cells"], facts["genes"]) == dense.shape
    assert facts["counts"] == (dense > 0).sum()
    assert facts["generations"] == [70]
    assert facts["bytes"]["all"] == sum(map(len, file_bytes(store.path).values())) - len(
        (store.path / "manifest.json").read_bytes()
    )
    obs = [part.obs for part in stored_parts(store)]
    for column in ("species", "tissue"):
        values = np.concatenate([part[column].astype(object).fillna("(missing)") for part in obs])
        found = dict(zip(*np.unique(values.astype(str), return_counts=True), strict=True))
        assert facts[column] == found
    assert {line["name"]: line["cells_kept"] for line in facts["sources"]} == {"s0": 30, "s1": 40}
    assert facts["codec"] == "lz4 5"
    assert facts["cells_per_shard"] >= facts["cells_per_chunk"] > 0

    assert scbert.main(["store", "info", str(store.path)]) == 0
    table = capsys.readouterr().out
    assert re.search(r"^cells +70$", table, re.MULTILINE)
    assert re.search(r"^  human +30$", table, re.MULTILINE)
    assert re.search(r"^  name s1, generation 0, .*cells kept 40", table, re.MULTILINE)


@pytest.mark.parametrize("form", ["counts", "tokens"])
def test_bench_reads_every_cell_once(
    store: CellStore, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    words = ["store", "bench", str(store.path), "--form", form, "--batch_size", "16", "--json"]
    assert scbert.main(words) == 0
    speed = json.loads(capsys.readouterr().out)
    assert speed["cells"] == 70
    assert 0 < speed["seconds_to_first_batch"] <= speed["seconds"]
    assert speed["cells_per_second"] == pytest.approx(70 / speed["seconds"])
    assert scbert.main(["store", "bench", str(store.path), "--form", "rows"]) == 2


def test_a_store_on_a_server_is_a_store(
    store: CellStore, capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with serve_folder(store.path.parent) as server:
        address = f"{server.url}/{store.path.name}"
        for words in (["verify", address], ["info", address, "--json"], ["bench", address]):
            assert scbert.main(["store", *words]) == 0
        verdict, facts, *_ = capsys.readouterr().out.splitlines()
        assert verdict == f"{address} is whole, byte for byte"
        assert (json.loads(facts)["place"], json.loads(facts)["species"]["human"]) == (address, 30)
