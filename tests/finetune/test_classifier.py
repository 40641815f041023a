"""Predictions compared with themselves in other batches; exports with what was written."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy import sparse

from datastore.genes import GenePanel
from finetune.classifier import (
    CellClassifier,
    load_classifier,
    predict,
    save_classifier,
    token_batches,
)
from finetune.config import HeadConfig
from pretrain.export import read_export
from tests.support.labelled import GENES, TYPES, labelled_cells, write_encoder


@pytest.fixture(scope="module", params=[True, False], ids=["normalized", "published head"])
def model(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> CellClassifier:
    folder = write_encoder(tmp_path_factory.mktemp("encoder") / "export")
    torch.manual_seed(0)
    head = HeadConfig(hidden=12, bottleneck=6, normalize=request.param)
    model = CellClassifier(read_export(folder).encoder(), TYPES, head)
    counts = sparse.csr_matrix(labelled_cells(40, seed=1).X)
    (tokens,) = token_batches(counts, 40, model.encoder)
    model.train()
    model(tokens)  # gives the normalization something to remember
    return model.eval()


@pytest.fixture(scope="module")
def counts() -> sparse.csr_matrix:
    return sparse.csr_matrix(labelled_cells(23, seed=2).X)


@pytest.mark.parametrize("batch_size", [1, 5, 23, 100])
def test_predictions_do_not_depend_on_the_batch(
    model: CellClassifier, counts: sparse.csr_matrix, batch_size: int
) -> None:
    whole = predict(model, counts, 7)
    other = predict(model, counts, batch_size)
    # float32 rounding of differently shaped matrix products; worst seen 2.4e-7
    np.testing.assert_allclose(other.probabilities, whole.probabilities, atol=2e-6)
    np.testing.assert_allclose(other.embedding, whole.embedding, atol=5e-6)


def test_predictions_do_not_depend_on_batch_mates(
    model: CellClassifier, counts: sparse.csr_matrix
) -> None:
    whole = predict(model, counts, 23).probabilities
    order = np.random.default_rng(0).permutation(23)
    shuffled = predict(model, counts[order], 23).probabilities
    np.testing.assert_allclose(shuffled, whole[order], atol=2e-6)
    loud = counts.copy().tolil()
    loud[1:] = 60_000  # mates of the first cell become extreme
    first = predict(model, loud.tocsr(), 23).probabilities[0]
    np.testing.assert_allclose(first, whole[0], atol=2e-6)


@pytest.mark.parametrize("narrow", [False, True], ids=["float32", "autocast"])
def test_batches_at_a_time_are_those_one_by_one(
    model: CellClassifier, counts: sparse.csr_matrix, narrow: bool
) -> None:
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 3):  # one after the other; then as many batches at a time
            torch.set_num_threads(number)
            with torch.autocast("cpu", torch.bfloat16, enabled=narrow):
                results.append(predict(model, counts, 4))
            assert torch.get_num_threads() == number
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        np.testing.assert_array_equal(other.probabilities, results[0].probabilities)
        np.testing.assert_array_equal(other.embedding, results[0].embedding)
    if narrow:  # the threads computed as they were told to
        assert (results[0].embedding != predict(model, counts, 4).embedding).any()


def test_a_batch_that_fails_ends_the_others(
    model: CellClassifier, counts: sparse.csr_matrix, monkeypatch: pytest.MonkeyPatch
) -> None:
    labelled = []

    def fail(tokens: torch.Tensor) -> torch.Tensor:
        labelled.append(tokens)
        raise RuntimeError("no memory")

    threads = torch.get_num_threads()
    monkeypatch.setattr(model.encoder, "forward", fail)
    torch.set_num_threads(2)
    try:
        with pytest.raises(RuntimeError, match="no memory"):
            predict(model, counts, 1)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert len(labelled) < counts.shape[0]


def test_a_cell_without_counts_is_predicted_without_nan(model: CellClassifier) -> None:
    empty = sparse.csr_matrix((2, len(GENES)), dtype=np.float32)
    assert np.isfinite(predict(model, empty, 2).probabilities).all()


def test_export_gives_back_the_same_predictions(
    model: CellClassifier, counts: sparse.csr_matrix, tmp_path: Path
) -> None:
    save_classifier(tmp_path / "export", model, GenePanel(GENES), {"novelty": {"threshold": 0.5}})
    again, export = load_classifier(tmp_path / "export")
    assert again.labels == TYPES
    assert export.panel.names == GENES
    np.testing.assert_array_equal(
        predict(again, counts, 7).probabilities, predict(model, counts, 7).probabilities
    )


def test_a_head_that_does_not_fit_its_labels_is_refused(
    model: CellClassifier, tmp_path: Path
) -> None:
    folder = tmp_path / "export"
    save_classifier(folder, model, GenePanel(GENES), {})
    (folder / "labels.txt").write_text("alpha\nbeta\n")
    with pytest.raises(ValueError, match="do not fit its 2 labels"):
        load_classifier(folder)
    (folder / "labels.txt").unlink()
    with pytest.raises(ValueError, match=r"labels\.txt is missing"):
        load_classifier(folder)


def test_weights_of_another_shape_are_refused(model: CellClassifier, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    save_classifier(folder, model, GenePanel(GENES), {})
    weights = load_file(folder / "model.safetensors")
    weights["encoder.norm.weight"] = torch.ones(3)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"norm\.weight is \(3,\)"):
        load_classifier(folder)
