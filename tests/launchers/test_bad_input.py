"""What a user may get wrong: one sentence with the remedy, exit code 2, nothing half-written."""

import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import anndata
import h5py
import numpy as np
import pytest
import torch
from scipy import sparse

from datastore.genes import GenePanel
from datastore.store import open_store
from datastore.verification import verify_store
from finetune.classifier import CellClassifier, save_classifier
from finetune.config import HeadConfig
from launchers import annotate, build_store, finetune, pretrain
from launchers import store as store_launcher
from pretrain.export import read_export
from tests.support.cells import RawCells, file_bytes, random_cells, write_h5ad
from tests.support.labelled import GENES, TYPES, labelled_cells, write_encoder, write_labelled
from tests.support.raw_files import (
    adata_of,
    write_10x_h5,
    write_10x_mtx,
    write_loom,
    write_rdata,
    write_table,
    write_zarr,
)


def _save(change: Callable[[anndata.AnnData], anndata.AnnData | None]) -> Callable[[Path], None]:
    """Write cells after a change that spoils them."""

    def write(path: Path) -> None:
        cells = labelled_cells(20, seed=3)
        changed = change(cells)
        (cells if changed is None else changed).write_h5ad(path)

    return write


def _value(cells: anndata.AnnData, value: float) -> None:
    cells.X.data[5] = value


def _rename(cells: anndata.AnnData, pattern: str) -> None:
    cells.var_names = [pattern.format(place) for place in range(cells.n_vars)]


def _log(cells: anndata.AnnData) -> None:
    cells.X = sparse.csr_matrix(np.log1p(cells.X.toarray() / 7))


def _truncated(path: Path) -> None:
    write_labelled(path)
    path.write_bytes(path.read_bytes()[:3000])


FILES = [
    pytest.param(lambda path: path.write_text("not a matrix"), "another kind of file", id="text"),
    pytest.param(_truncated, "another kind of file, or cut short", id="cut short"),
    pytest.param(lambda path: path.mkdir(), "folder", id="folder"),
    pytest.param(lambda path: None, "no such file", id="missing"),
    pytest.param(_save(lambda c: _value(c, -1.0)), "negative value (-1, row 0", id="negative"),
    pytest.param(_save(lambda c: _value(c, np.nan)), "not finite (nan, row 0", id="nan"),
    pytest.param(_save(lambda c: _value(c, np.inf)), "not finite (inf, row 0", id="infinite"),
    pytest.param(_save(_log), "layers['counts'] (--layer counts)", id="log-normalised"),
    pytest.param(_save(lambda c: c[:0].copy()), "holds no cells", id="no cells"),
]
GENE_NAMES = [
    pytest.param(
        _save(lambda c: _rename(c, "ENSG{:011d}")), "look like Ensembl ids", id="Ensembl ids"
    ),
    pytest.param(_save(lambda c: _rename(c, "OTHER{}")), "0 of 32 panel genes", id="no overlap"),
    pytest.param(_save(lambda c: _rename(c, "Gene{}")), "letter case", id="mouse-like names"),
]


def _refused(code: int, capsys: pytest.CaptureFixture[str], message: str) -> None:
    printed = capsys.readouterr()
    assert code == 2
    errors = [line for line in printed.err.splitlines() if line.startswith("error")]
    assert len(errors) == 1
    assert message in errors[0]
    assert "Traceback" not in printed.err


def _spoiled_exports(good: Path, folder: Path) -> None:
    """Copies of an export, each with one fault."""
    for name, file, spoil in (
        ("torn", "model.safetensors", lambda text: text[: len(text) // 2]),
        ("panel", "genes.txt", lambda text: text.replace(b"GENE1\n", b"GENE1x\n")),
        ("newer", "config.json", lambda text: text.replace(b"scbert-export/1", b"scbert-export/9")),
        ("config", "config.json", lambda text: text[:-20]),
    ):
        shutil.copytree(good, folder / name)
        path = folder / name / file
        path.write_bytes(spoil(path.read_bytes()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A good panel, encoder and classifier."""
    folder = tmp_path_factory.mktemp("good")
    (folder / "panel.txt").write_text("\n".join(GENES) + "\n")
    write_encoder(folder / "encoder")
    torch.manual_seed(0)
    head = HeadConfig(hidden=8, bottleneck=4)
    model = CellClassifier(read_export(folder / "encoder").encoder(), TYPES, head)
    metadata = {"novelty": {"score": "max_probability", "threshold": 0.5}}
    save_classifier(folder / "classifier", model, GenePanel(GENES), metadata)
    write_labelled(folder / "good.h5ad")
    return folder


@pytest.mark.parametrize(("write", "message"), FILES + GENE_NAMES)
def test_build_store_refuses(
    write: Callable[[Path], None],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "bad.h5ad")
    code = build_store.main(
        [
            *("--sources", f"[{folder}/good.h5ad,{tmp_path}/bad.h5ad]", "--min_genes", "1"),
            *("--output", f"{tmp_path}/cells.zarr", "--panel.file", f"{folder}/panel.txt"),
        ]
    )
    _refused(code, capsys, message)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.h5ad"}


def _cells() -> RawCells:
    return random_cells("raw", 5, 23, GENES)


def _write_all_kinds_of_bad(folder: Path) -> dict[str, str]:
    """A source of each format with a fault of its own; a word of the reason by name."""

    def cut(path: Path) -> None:
        path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])

    cut(write_rdata(folder / "cut.sparse.RData", _cells()))
    cut(write_10x_h5(folder / "cut.h5", _cells(), 3))
    cut(write_loom(folder / "cut.loom", _cells()))
    cut(write_table(folder / "cut.csv.gz", _cells(), True))
    cut(write_10x_mtx(folder / "cut_mtx", _cells(), 3) / "matrix.mtx.gz")
    (write_10x_mtx(folder / "short_mtx", _cells(), 2) / "barcodes.tsv").write_text("c0\nc1\n")
    (write_zarr(folder / "half.zarr", adata_of(_cells())) / "X" / "data" / "c" / "0").unlink()
    with h5py.File(write_h5ad(folder, replace(_cells(), name="pointers")), "r+") as file:
        file["X/indptr"][-1] = 3
    values = _cells().counts.astype(np.float64)
    values[3, 2] = 2.0**40
    write_h5ad(folder, replace(_cells(), name="huge"), values)
    foreign = [f"AT1G{place:05d}" for place in range(len(GENES))]
    write_h5ad(folder, random_cells("foreign", 6, 9, foreign))
    header = "," + ",".join(GENES)
    (folder / "word.csv").write_text(f"{header}\nc0,many{',1' * (len(GENES) - 1)}\n")
    (folder / "ragged.csv").write_text(f"{header}\nc0,1,2\n")
    (folder / "page.tsv").write_text("<!doctype html>\n<p>gone</p>\n")
    (folder / "empty.h5ad").touch()
    (folder / "folder.h5ad").mkdir()
    write_h5ad(folder, _cells()).rename(folder / os.fsdecode(b"caf\xe9.h5ad"))
    return {
        "cut.sparse.RData": "cut short",
        "cut.h5": "cut short",
        "cut.loom": "cut short",
        "cut.csv.gz": "cut short",
        "cut_mtx": "half-copied",
        "short_mtx": "2 cells",
        "half.zarr": "half-copied",
        "pointers.h5ad": "is damaged",
        "huge.h5ad": "above 4294967295",
        "foreign.h5ad": "0 of 32 panel genes",
        "word.csv": "'many' instead of a count",
        "ragged.csv": "line 2 has 3 fields",
        "page.tsv": "web page",
        "empty.h5ad": "is empty",
        "folder.h5ad": "is a folder",
        "caf\\udce9.h5ad": "not UTF-8",
    }


def test_every_kind_of_bad_source_is_named_and_the_rest_is_stored(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw, empty, store = tmp_path / "raw", tmp_path / "nothing", tmp_path / "cells.zarr"
    raw.mkdir()
    empty.mkdir()
    reasons = {**_write_all_kinds_of_bad(raw), "nothing": "is a folder"}
    flags = ["--min_genes", "1", "--output", str(store)]
    flags += ["--sources", f"{folder}/good.h5ad", str(raw), str(empty)]
    panel = ["--panel.file", f"{folder}/panel.txt"]
    code = build_store.main([*flags, *panel])
    _refused(code, capsys, "16 sources cannot be used")  # the genes are looked at after the files
    assert not list(tmp_path.glob("cells.zarr*"))
    for more in (panel, ["--append", "true"]):
        if "--append" in more:
            more_cells = write_h5ad(tmp_path, random_cells("more", 8, 11, GENES))
            flags[flags.index(f"{folder}/good.h5ad")] = str(more_cells)
        assert build_store.main([*flags, *more, "--skip_broken", "true"]) == 0
        lines = capsys.readouterr().out.splitlines()[-len(reasons) - 1 :]
        for name, reason in reasons.items():
            (line,) = [line for line in lines if f"/{name}" in line]
            assert line.startswith("left out: ")
            assert reason in line, line
        assert verify_store(store) == []
    assert [line["name"] for line in open_store(store).header.sources] == ["good", "more"]
    assert open_store(store).num_cells == 90 + 11


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        pytest.param('"schema_version": 1', '"schema_version": 2', "schema version 2", id="newer"),
        pytest.param('"files"', '"parts"', "manifest.json is damaged", id="other keys"),
        pytest.param("{", "", "manifest.json cannot be read: it is cut short", id="no JSON"),
    ],
)
def test_a_store_of_another_schema_is_refused_by_every_command(
    old: str,
    new: str,
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "cells.zarr"
    source = ["--sources", f"{folder}/good.h5ad", "--min_genes", "1", "--output", str(store)]
    assert build_store.main(source) == 0
    manifest = store / "manifest.json"
    manifest.write_text(manifest.read_text().replace(old, new, 1))
    before = file_bytes(tmp_path)
    capsys.readouterr()
    for command in (
        lambda: store_launcher.main(["info", str(store)]),
        lambda: build_store.main([*source, "--append", "true"]),
        lambda: pretrain.main(["--store", str(store), "--output", f"{tmp_path}/run"]),
    ):
        _refused(command(), capsys, message)
    assert store_launcher.main(["verify", str(store)]) in (1, 2)
    printed = capsys.readouterr()
    assert "manifest.json" in printed.out + printed.err or message in printed.err
    assert file_bytes(tmp_path) == before


def test_an_argument_that_is_not_utf8_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = os.fsdecode(b"caf\xe9.h5ad")
    code = build_store.main(["--sources", odd, "--output", f"{tmp_path}/cells.zarr"])
    _refused(code, capsys, "'caf\\udce9.h5ad' is not UTF-8; rename what it names")


@pytest.mark.parametrize(("write", "message"), FILES + GENE_NAMES)
def test_annotate_refuses(
    write: Callable[[Path], None],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write(tmp_path / "bad.h5ad")
    code = annotate.main(
        [
            *("--model", f"{folder}/classifier", "--input", f"{tmp_path}/bad.h5ad"),
            *("--output", f"{tmp_path}/out.h5ad"),
        ]
    )
    _refused(code, capsys, message)
    assert {path.name for path in tmp_path.iterdir()} <= {"bad.h5ad"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"--model": "{tmp}/none"}, "no model folder", id="no such model"),
        pytest.param({"--model": "{good}/encoder"}, "kind 'encoder'", id="an encoder's export"),
        pytest.param({"--output": "{good}/good.h5ad"}, "is the input file", id="onto itself"),
        pytest.param({"--output": "{tmp}/out.csv"}, "must end in .h5ad", id="not h5ad"),
        pytest.param({"--output": "{good}/good.h5ad/o.h5ad"}, "good.h5ad", id="no such folder"),
        pytest.param({"--layer": "counts"}, "no layer 'counts'", id="no such layer"),
        pytest.param({"--batch_size": "0"}, "batch_size is 0", id="no batch"),
        pytest.param({"--batch_size": "big"}, "--batch_size is 'big'; give a whole", id="batch"),
        pytest.param({"--novelty_threshold": "1.5"}, "novelty_threshold is 1.5", id="threshold"),
        pytest.param({"--min_share_found": "7"}, "min_share_found is 7", id="share"),
        pytest.param({"--key_added": "a/b"}, "key_added is 'a/b'", id="key"),
        pytest.param({"--reasons_cells": "0"}, "reasons_cells is 0", id="cells for reasons"),
        pytest.param({"--majority_over": "leiden"}, "no obs['leiden']", id="no such clustering"),
        pytest.param({"--markers": "{tmp}/m.tsv"}, "no such table of markers", id="no markers"),
        pytest.param({"--panel.hgnc": "{tmp}/t.tsv"}, "panel.hgnc: no such file", id="no table"),
        pytest.param({"--part": "1"}, "part is 1 but", id="a part of a file"),
        pytest.param({"--model": "{tmp}/torn"}, "model.safetensors is damaged", id="torn weights"),
        pytest.param({"--model": "{tmp}/panel"}, "genes.txt is not the panel", id="other panel"),
        pytest.param({"--model": "{tmp}/newer"}, "this program reads", id="other version"),
        pytest.param({"--model": "{tmp}/config"}, "config.json cannot be read", id="torn config"),
        pytest.param(
            {"--model": "models:/nobody@champion"}, "there is no registry", id="no registry"
        ),
    ],
)
def test_annotate_refuses_settings(
    changes: dict[str, str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _spoiled_exports(folder / "classifier", tmp_path)
    settings = {
        "--model": f"{folder}/classifier",
        "--input": f"{folder}/good.h5ad",
        "--output": f"{tmp_path}/out.h5ad",
        "--tracking_uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    settings |= {k: v.format(tmp=tmp_path, good=folder) for k, v in changes.items()}
    code = annotate.main([word for pair in settings.items() for word in pair])
    _refused(code, capsys, message)
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"--encoder": "{good}/classifier"}, "'encoder'", id="a classifier's export"),
        pytest.param({"--data.label_key": "type"}, "it has cell_type", id="no such label column"),
        pytest.param({"--data.path": "{tmp}/missing.h5ad"}, "no such file", id="no data"),
        pytest.param({"--data.test_share": "1.5"}, "data.test_share is 1.5", id="share"),
        pytest.param({"--data.path": "{tmp}/one.h5ad"}, "one cell type only", id="one type"),
        pytest.param({"--data.path": "{tmp}/split.h5ad"}, "line break", id="label of two lines"),
        pytest.param({"--data.path": "{tmp}/nan.h5ad"}, "lacks a label for 1 of", id="NaN label"),
    ],
)
def test_finetune_refuses(
    changes: dict[str, str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cells = labelled_cells(20, seed=4)
    cells.obs["cell_type"] = "alpha"
    cells.write_h5ad(tmp_path / "one.h5ad")
    cells.obs["cell_type"] = ["T/NK\ncell", "beta"] * 10
    cells.write_h5ad(tmp_path / "split.h5ad")
    cells = labelled_cells(20, seed=4)
    cells.obs["cell_type"] = cells.obs["cell_type"].astype("category")
    cells.obs.iloc[3, 0] = np.nan
    cells.write_h5ad(tmp_path / "nan.h5ad")
    settings = {
        "--encoder": f"{folder}/encoder",
        "--data.path": f"{folder}/good.h5ad",
        "--output": f"{tmp_path}/run",
        "--tracking.uri": f"sqlite:///{tmp_path}/mlflow.db",
    }
    settings |= {k: v.format(tmp=tmp_path, good=folder) for k, v in changes.items()}
    code = finetune.main([word for pair in settings.items() for word in pair])
    _refused(code, capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"--store": "{tmp}/none"}, "make one with launchers/build_store", id="none"),
        pytest.param({"--store": "{good}"}, "manifest.json is missing", id="not a store"),
        pytest.param({"--output": "{good}/good.h5ad/run"}, "good.h5ad", id="no output folder"),
        pytest.param({"--masking.ratio": "0"}, "masking.ratio is 0", id="ratio"),
        pytest.param({"--batch.global_size": "7"}, "not a multiple", id="uneven batch"),
        pytest.param({"--deepspeed": "{tmp}/ds.json"}, "optim.clip_norm", id="our key in JSON"),
    ],
)
def test_pretrain_refuses(
    changes: dict[str, str],
    message: str,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "ds.json").write_text('{"gradient_clipping": 1.0}')
    build_store.main(
        [
            *("--sources", f"[{folder}/good.h5ad]", "--output", f"{tmp_path}/cells.zarr"),
            *("--min_genes", "1"),
        ]
    )
    settings = {"--store": f"{tmp_path}/cells.zarr", "--output": f"{tmp_path}/run"}
    settings |= {k: v.format(tmp=tmp_path, good=folder) for k, v in changes.items()}
    code = pretrain.main(
        ["--preset", "quickstart", *[word for pair in settings.items() for word in pair]]
    )
    _refused(code, capsys, message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "spoil",
    [
        pytest.param(lambda file: file.write_bytes(file.read_bytes()[:-9]), id="cut short"),
        pytest.param(lambda file: file.unlink(), id="missing"),
    ],
)
def test_pretrain_refuses_a_damaged_store(
    spoil: Callable[[Path], None],
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = tmp_path / "cells.zarr"
    build_store.main(["--sources", f"[{folder}/good.h5ad]", "--output", str(store)])
    capsys.readouterr()
    build_store.main(
        ["--sources", f"[{folder}/good.h5ad]", "--output", str(store), "--min_genes", "1"]
    )
    spoil(store / "dataset_0" / "X" / "data" / "c" / "0")
    code = pretrain.main(["--store", str(store), "--output", f"{tmp_path}/run"])
    _refused(code, capsys, "dataset_0/X/data/c/0")
