"""The served classifier: the labels of `predict`, and one sentence for what is no cell."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from mlflow.exceptions import MlflowException
from scipy import sparse

from finetune import pyfunc
from finetune.classifier import load_classifier, predict
from finetune.export_files import MLMODEL
from finetune.pyfunc import MAX_CELLS, CellLabeller
from finetune.serving_contract import mlmodel
from tests.support.labelled import GENES, labelled_cells, write_classifier

# Of MLflow's own types, when mlflow.pyfunc is imported.
pytestmark = pytest.mark.filterwarnings("ignore:.*type hint is inferred as AnyType:UserWarning")


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_classifier(tmp_path_factory.mktemp("entry") / "export")
    (folder / MLMODEL).write_text(mlmodel())
    return folder


@pytest.fixture(scope="module")
def labeller(entry: Path) -> CellLabeller:
    return pyfunc._load_pyfunc(str(entry))


def sparse_records(counts: Any) -> list[dict[str, Any]]:
    """Expressed genes only, in any order."""
    return [
        {"genes": [GENES[place] for place in expressed[::-1]], "counts": row[expressed[::-1]]}
        for row, expressed in ((row, np.flatnonzero(row)) for row in counts)
    ]


def test_mlflow_loads_it_and_both_forms_give_the_labels_of_predict(entry: Path) -> None:
    import mlflow.pyfunc

    counts = labelled_cells(12, 5).X.toarray()
    model, _ = load_classifier(entry)
    expected = predict(model, sparse.csr_matrix(counts), 5, progress=False)
    started = time.process_time()
    served = mlflow.pyfunc.load_model(str(entry))
    assert time.process_time() - started < 10
    dense = served.predict(pd.DataFrame({"counts": list(counts.tolist())}))
    some = served.predict(pd.DataFrame(sparse_records(counts)), params={"probabilities": True})
    for record, other, label, row in zip(
        dense, some, expected.best, expected.probabilities, strict=True
    ):
        assert record["label"] == other["label"] == label
        assert record["confidence"] == pytest.approx(row.max(), abs=1e-6)
        assert list(other["probabilities"].values()) == pytest.approx(row.tolist(), abs=1e-6)
        assert record["novel"] == (row.max() < 0.5)
        assert "probabilities" not in record


def test_unknown_genes_are_left_out(labeller: CellLabeller) -> None:
    with_unknown = {"genes": ["GENE1", "MT-XYZ", "GENE0"], "counts": [3, 99, 1]}
    without = {"genes": ["GENE0", "GENE1"], "counts": [1, 3]}
    first, second = labeller.predict(pd.DataFrame([with_unknown, without]))
    # Sums of the two rows of a batch may be rounded in another order.
    assert first == {**second, "confidence": pytest.approx(second["confidence"], rel=1e-6)}


ONE = {"genes": ["GENE0"], "counts": [1]}


@pytest.mark.parametrize(
    ("records", "message"),
    [
        pytest.param([{"genes": ["GENE0"]}], "give a record with 'counts'", id="no counts"),
        pytest.param([ONE] * (MAX_CELLS + 1), "there are 1001 cells; send 1 to 1000", id="many"),
        pytest.param([{"counts": [1, 2]}], "has 2 counts; .* each of the 32 genes", id="short"),
        pytest.param([{"counts": "12"}], "must be a list of 1 to 100000 numbers", id="text"),
        pytest.param([{"counts": {"GENE0": 1}}], "must be a list of", id="mapping"),
        pytest.param([{"counts": [[1], [2, 3]]}], "must be a list of", id="ragged"),
        pytest.param([{"counts": [0] * 100_001}], "must be a list of 1 to 100000", id="long"),
        pytest.param([ONE, {"genes": ["GENE0"], "counts": [-1]}], "cell 1: .* 0 to", id="negative"),
        pytest.param([{"genes": ["GENE0"], "counts": [float("nan")]}], "numbers from 0", id="nan"),
        pytest.param([{"genes": ["GENE0"], "counts": [1e300]}], "numbers from 0 to", id="huge"),
        pytest.param([{"genes": ["GENE0"], "counts": [0.5]}], "send raw counts", id="normalised"),
        pytest.param([{"genes": ["GENE0"], "counts": [1, 2]}], "as long as 'counts'", id="uneven"),
        pytest.param([{"genes": "GENE0", "counts": [1]}], "as long as 'counts'", id="no list"),
        pytest.param(
            [{"genes": ["ENSG1"], "counts": [1]}], "no gene of the panel; .* GENE0", id="foreign"
        ),
        pytest.param(
            [{"genes": ["GENE0", "GENE0"], "counts": [1, 2]}], "names a gene twice", id="twice"
        ),
    ],
)
def test_what_is_no_cell_is_a_bad_request(
    labeller: CellLabeller, records: list[dict[str, Any]], message: str
) -> None:
    with pytest.raises(MlflowException, match=message) as refused:
        labeller.predict(pd.DataFrame(records))
    assert refused.value.get_http_status_code() == 400


def test_an_entry_with_a_pickle_is_not_loaded(entry: Path, tmp_path: Path) -> None:
    folder = tmp_path / "entry"
    folder.mkdir()
    for path in entry.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "python_model.pkl").write_bytes(b"cos\nsystem\n")
    with pytest.raises(ValueError, match=r"'python_model\.pkl' .* is refused"):
        pyfunc._load_pyfunc(str(folder))
