"""Fine-tuning on easy cells: what learns, what stays, what is reported and tracked."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import anndata
import numpy as np
import pytest
import torch
from mlflow import MlflowClient

from finetune.cells import panel_counts
from finetune.classifier import load_classifier, predict
from finetune.config import FinetuneConfig, FreshConfig, HeadConfig, LabelledConfig
from finetune.export_files import read_config
from finetune.model_card import model_card
from finetune.query import adata_query
from finetune.train import FinetuneResult, finetune, fit, read_history
from pretrain.config import EncoderConfig, TrackingConfig
from pretrain.export import read_export
from tests.support.labelled import write_encoder, write_labelled

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finetune")
    write_encoder(folder / "encoder", provenance={"store_id": "a store"})
    write_labelled(folder / "train.h5ad", 120, seed=0)
    write_labelled(folder / "test.h5ad", 45, seed=1)
    return folder


@pytest.fixture(scope="module")
def config(folder: Path) -> FinetuneConfig:
    return FinetuneConfig(
        encoder=str(folder / "encoder"),
        data=LabelledConfig(path=str(folder / "train.h5ad"), test_path=str(folder / "test.h5ad")),
        output=str(folder / "run"),
        head=HeadConfig(hidden=32, bottleneck=8),
        epochs=12,
        epoch_steps=1,
        batch_size=8,
        lr=5e-3,
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="test"),
    )


@pytest.fixture(scope="module")
def result(config: FinetuneConfig) -> FinetuneResult:
    return finetune(config, CPU)


def test_easy_types_are_learnt_and_baselines_stand_beside(result: FinetuneResult) -> None:
    assert result.scores.accuracy > 0.9
    by_name = {baseline.name: baseline.scores for baseline in result.baselines}
    assert by_name["majority"].accuracy == pytest.approx(1 / 3)
    assert by_name["logistic regression"].accuracy > 0.9
    assert {baseline.scores.num_cells for baseline in result.baselines} == {45}
    assert result.scores.num_cells == 45
    for word in ("scBERT", "majority", "logistic regression"):
        assert word in result.table
    assert "45 test cells" in result.verdict


def test_run_export_and_figures_are_kept(config: FinetuneConfig, result: FinetuneResult) -> None:
    assert result.run_id is not None
    run = MlflowClient(config.tracking.uri).get_run(result.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.metrics["accuracy"] == pytest.approx(result.scores.accuracy)
    assert run.data.params["head.hidden"] == "32"
    assert run.data.tags["pretrained"] == config.encoder
    output = Path(config.output)
    assert (output / "figures" / "confusion.png").read_bytes()[:4] == b"\x89PNG"
    metadata = read_export(result.export, "classifier").metadata
    assert metadata["provenance"]["run_id"] == result.run_id
    assert metadata["metrics"]["accuracy"] == pytest.approx(result.scores.accuracy)
    assert json.loads((output / "scores.json").read_text())["verdict"] == result.verdict


def test_the_card_tells_all_of_a_training(config: FinetuneConfig, result: FinetuneResult) -> None:
    card = model_card("x", read_config(result.export), {})
    (data,) = [line for line in card.splitlines() if line.startswith("- data: ")]
    (held_out,) = [line for line in card.splitlines() if line.startswith("- held-out data: ")]
    for line, path in ((data, config.data.path), (held_out, config.data.test_path)):
        assert path is not None
        assert Path(path).name in line
        assert hashlib.sha256(Path(path).read_bytes()).hexdigest() in line
    for line in (
        "- cells trained on: 120",
        "- held-out cells: 45",
        f"| this model | {result.scores.accuracy:.4f} | {result.scores.macro_f1:.4f} |",
        "| majority | 0.3333 | ",
        "| logistic regression | ",
        "| alpha | 15 | ",
        f"- pretrained: {config.encoder}",
        "- on cell store: a store",
        f"- run: {result.run_id}",
        "| head.hidden | 32 |",
    ):
        assert line in card, line
    assert card.count("not recorded") == 0


def test_frozen_encoder_is_exported_as_it_was(
    config: FinetuneConfig, result: FinetuneResult
) -> None:
    before = read_export(config.encoder).weights
    after = read_export(result.export).weights
    assert all(torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize(
    ("train", "learns", "stays"),
    [
        pytest.param("last_block", "layers.1.", "layers.0.", id="last block"),
        pytest.param("all", "layers.0.", "projection_matrix", id="all"),
    ],
)
def test_what_trains_is_chosen_by_name(
    config: FinetuneConfig, folder: Path, train: str, learns: str, stays: str
) -> None:
    changed = replace(config, train=train, epochs=1, output=str(folder / train), encoder_lr=1e-2)  # type: ignore[arg-type]
    before = read_export(config.encoder).weights
    after = read_export(finetune(changed, CPU).export).weights
    moved = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert any(learns in name for name in moved)
    assert not any(stays in name for name in moved)


def test_cached_states_train_the_same_head(
    config: FinetuneConfig, result: FinetuneResult, folder: Path
) -> None:
    uncached = replace(config, cache_gigabytes=0.0, output=str(folder / "uncached"))
    again = finetune(uncached, CPU)
    np.testing.assert_array_equal(again.scores.confusion, result.scores.confusion)
    losses = [
        [line["loss"] for line in read_history(Path(run) / "metrics.jsonl") if "loss" in line]
        for run in (config.output, uncached.output)
    ]
    # the same products in other batch shapes; worst seen 1e-6 relative
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-4)


def with_counts_in_a_layer(path: Path) -> anndata.AnnData:
    """Cells whose `X` is no counts."""
    adata = anndata.read_h5ad(path)
    adata.layers["kept"] = adata.X.copy()
    adata.X = np.full(adata.shape, -0.5, dtype=np.float32)
    return adata


def test_cells_in_memory_and_a_fresh_encoder(folder: Path) -> None:
    done = fit(
        with_counts_in_a_layer(folder / "train.h5ad"),
        folder / "fresh",
        test=with_counts_in_a_layer(folder / "test.h5ad"),
        layer="kept",
        device="cpu",
        head=HeadConfig(kind="pooled", bottleneck=8),
        fresh=FreshConfig(encoder=EncoderConfig(dim=16, depth=1, heads=2, dim_head=8)),
        epochs=2,
        train="all",
        tracking=TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", experiment="test"),
    )
    assert done.scores.accuracy > 0.9
    export = read_export(done.export, "classifier")
    assert export.metadata["provenance"]["pretrained"] == "none"
    assert export.metadata["evaluation"]["num_cells"] == 45
    model, _ = load_classifier(done.export)
    counts = panel_counts(adata_query(anndata.read_h5ad(folder / "test.h5ad")), export.panel)
    again = predict(model, counts, 7)
    np.testing.assert_allclose(again.probabilities, done.predictions.probabilities, atol=2e-6)
    assert again.novelty is not None
    assert done.predictions.novelty is not None
    np.testing.assert_allclose(again.novelty, done.predictions.novelty, rtol=1e-4)
    kept = np.load(folder / "fresh" / "heldout.npz")
    assert (kept["labels"][kept["probabilities"].argmax(1)] == np.array(again.best)).all()
    assert not (folder / "fresh" / "progress").exists()


def test_the_same_seed_gives_the_same_result(
    config: FinetuneConfig, result: FinetuneResult, folder: Path
) -> None:
    again = finetune(replace(config, output=str(folder / "again")), CPU)
    np.testing.assert_array_equal(again.predictions.probabilities, result.predictions.probabilities)
