"""The notebook runs from its first cell to its last, on cells it fetches, and is kept as run."""

import json
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.support.documents import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "annotate.ipynb"


def test_it_is_kept_with_its_figures_and_small() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    outputs = [output for cell in code for output in cell["outputs"]]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 3
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    assert NOTEBOOK.stat().st_size < 1_000_000


@pytest.mark.slow
@pytest.mark.multiprocess
# Jupyter's own, about its event loop and sockets.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    folder = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=500, kernel_name="python3", resources=folder).execute()
    said = json.dumps([cell.get("outputs", []) for cell in notebook.cells])
    assert "logistic regression" in said
    right = float(said.split(" of 388 cells are right")[0].split('"')[-1].split("\\n")[-1])
    assert right > 0.9
    assert (tmp_path / "annotated.h5ad").stat().st_size > 0
