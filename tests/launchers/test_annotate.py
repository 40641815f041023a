"""What `scbert annotate` says to a script."""

import json
from pathlib import Path

import anndata
import pandas as pd
import pytest

from launchers import annotate
from tests.support.labelled import write_classifier, write_labelled


def test_counts_can_be_read_by_a_script(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_classifier(tmp_path / "model")
    cells = write_labelled(tmp_path / "cells.h5ad", 20)
    output = tmp_path / "labelled.h5ad"
    assert (
        annotate.main([str(cells), "--model", str(model), "--output", str(output), "--json"]) == 0
    )
    (line,) = capsys.readouterr().out.splitlines()
    said = json.loads(line)
    table = pd.read_csv(said["table"])
    assert said["cells_of"] == table["scbert_label"].value_counts().to_dict()
    assert said["num_novel"] == int(table["scbert_novel"].sum())
    assert said["num_cells"] == anndata.read_h5ad(said["output"]).n_obs == 20
