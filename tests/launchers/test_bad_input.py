"""What a user may get wrong: one sentence with the remedy, exit code 2, nothing half-written."""

import shutil
from collections.abc import Callable
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from scipy import sparse

from datastore.genes import GenePanel
from finetune.classifier import CellClassifier, save_classifier
from finetune.config import HeadConfig
from launchers import annotate, build_store, finetune, pretrain
from pretrain.export import read_export
from tests.support.labelled import GENES, TYPES, labelled_cells, write_encoder, write_labelled


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
