"""The loop: losses by hand, balanced orders, corrections that are refused, resuming to the bit."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

import finetune.fitting
from finetune.classifier import CellClassifier
from finetune.config import FinetuneConfig, HeadConfig, LabelledConfig, LossConfig
from finetune.expert_pool import fit_pool
from finetune.fitting import (
    Cells,
    Inputs,
    _order,
    cell_loss,
    chosen_correction,
    fit_network,
    seeded,
)
from finetune.resume import FOLDER, begin, finish
from pretrain.export import read_export
from tests.support.labelled import TYPES, labelled_cells, write_encoder


class Stopped(Exception):
    pass


def tracker(stop_at: int | None = None) -> Any:
    """Stands in for MLflow's; stops the training where asked to."""

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        if step == stop_at:
            raise Stopped

    return SimpleNamespace(log_metrics=log_metrics)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_encoder(tmp_path_factory.mktemp("encoder") / "export")


def config(**changes: Any) -> FinetuneConfig:
    settings: dict[str, Any] = {
        "encoder": "e",
        "output": "o",
        "data": LabelledConfig(path="p"),
        "head": HeadConfig(hidden=16, bottleneck=8),
        "epochs": 4,
        "epoch_steps": 1,
        "patience": 9,
        "batch_size": 8,
        "lr": 5e-3,
    }
    return FinetuneConfig(**(settings | changes))


def cells() -> Cells:
    adata = labelled_cells(60, seed=0)
    codes = np.searchsorted(TYPES, adata.obs["cell_type"].to_numpy(str))
    return Cells(adata.X.tocsr(), codes, np.zeros((60, 3), np.float32))


def classifier(encoder: Path, head: HeadConfig) -> CellClassifier:
    with seeded(0, "head"):
        return CellClassifier(read_export(encoder).encoder(), TYPES, head)


@pytest.mark.parametrize("train", ["head", "all"])
@pytest.mark.parametrize("kind", ["conv1d", "pooled"])
def test_a_stopped_training_continues_to_the_same_weights(
    encoder: Path, tmp_path: Path, kind: str, train: str
) -> None:
    head = HeadConfig(kind=kind, hidden=16, bottleneck=8, expression=False)  # type: ignore[arg-type]
    settings = config(head=head, train=train)
    sides = cells().take(np.arange(40)), cells().take(np.arange(40, 60))
    weights = []
    for name, stop_at in (("whole", None), ("stopped", 3)):
        folder = tmp_path / name
        folder.mkdir()
        begin(folder, "same")
        model = classifier(encoder, head)
        if stop_at is not None:
            with pytest.raises(Stopped):
                fit_network(model, *sides, settings, tracker(stop_at), folder)
            begin(folder, "same")
            model = classifier(encoder, head)
        fit_network(model, *sides, settings, tracker(), folder)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())
    assert any(not torch.equal(weights[0][name], value) for name, value in
               classifier(encoder, head).state_dict().items())  # fmt: skip


def test_a_training_that_stopped_early_is_not_gone_on_with(encoder: Path, tmp_path: Path) -> None:
    sides = cells().take(np.arange(40)), cells().take(np.arange(40, 60))
    settings = config(lr=1e-2, patience=1, epochs=50)
    done: list[int] = []
    counting: Any = SimpleNamespace(log_metrics=lambda metrics, step: done.append(step))
    begin(tmp_path, "same")
    weights = []
    for _ in range(2):
        model = classifier(encoder, settings.head)
        fit_network(model, *sides, settings, counting, tmp_path)
        weights.append(model.state_dict())
    assert done == list(range(1, done[-1] + 1))
    assert done[-1] < 50
    assert all(torch.equal(weights[1][name], value) for name, value in weights[0].items())


def test_progress_of_another_training_or_in_ruins_is_not_continued(
    encoder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    sides = cells().take(np.arange(40)), cells().take(np.arange(40, 60))
    begin(tmp_path, "one")
    with pytest.raises(Stopped):
        fit_network(classifier(encoder, config().head), *sides, config(), tracker(2), tmp_path)
    (weights,) = (tmp_path / FOLDER).glob("*.safetensors")
    weights.write_bytes(b"torn")
    fit_network(classifier(encoder, config().head), *sides, config(), tracker(), tmp_path)
    assert "training begins anew" in caplog.text
    begin(tmp_path, "another")
    assert [path.name for path in (tmp_path / FOLDER).iterdir()] == ["identity.txt"]
    finish(tmp_path)
    assert not (tmp_path / FOLDER).exists()


def test_the_network_learns_by_itself_and_is_left_out_where_it_hurts(
    encoder: Path, tmp_path: Path
) -> None:
    some = cells()
    pool = fit_pool(some.counts, np.array(TYPES)[some.codes], seed=0)
    some = replace(some, start=pool.logits)
    model = classifier(encoder, config().head)
    train, validation = some.take(np.arange(40)), some.take(np.arange(40, 60))
    begin(tmp_path, "right")
    fit_network(model, train, validation, config(epochs=20, lr=0.05), tracker(), tmp_path)
    # By itself: without what the experts say, which would hide a network that learnt nothing.
    own = Inputs(model, validation, config()).logits()
    assert (own.argmax(axis=1) == validation.codes).mean() > 0.8
    # Labels of the training side are wrong, so what the network learns cannot help.
    wrong = replace(train, codes=(train.codes + 1) % 3)
    begin(tmp_path, "wrong")
    model = classifier(encoder, config().head)
    fit_network(model, wrong, validation, config(lr=0.05), tracker(), tmp_path)
    assert chosen_correction(Inputs(model, validation, config()).logits(), validation) == 0


def test_a_correction_is_taken_where_it_surely_helps() -> None:
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, 90)
    start = rng.normal(size=(90, 3)).astype(np.float32)
    some = Cells(cells().counts, codes, start)
    helpful = (2 * np.eye(3)[codes]).astype(np.float32)
    assert chosen_correction(helpful, some) == 1
    assert chosen_correction(-helpful, some) == 0
    assert chosen_correction(helpful * 0, some) == 0
    lucky = np.zeros((90, 3), np.float32)
    lucky[0] = helpful[0]  # one cell of ninety
    assert chosen_correction(lucky, some) == 0


def test_losses_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.8, 0.2], [0.4, 0.6]]))
    codes, weights = torch.tensor([0, 0]), torch.tensor([0.5, 2.0])
    plain = cell_loss(logits, codes, weights, LossConfig(balance="none"))
    assert float(plain) == pytest.approx(-(np.log(0.8) + np.log(0.4)) / 2)
    weighted = cell_loss(logits, codes, weights, LossConfig())
    assert float(weighted) == pytest.approx(float(plain) / 2)
    focal = cell_loss(logits, codes, weights, LossConfig(balance="none", focal=2.0))
    assert float(focal) == pytest.approx(-(0.04 * np.log(0.8) + 0.36 * np.log(0.4)) / 2)
    smooth = cell_loss(logits, codes, weights, LossConfig(balance="none", label_smoothing=0.2))
    expected = -(0.9 * np.log([0.8, 0.4]) + 0.1 * np.log([0.2, 0.6])).mean()
    assert float(smooth) == pytest.approx(expected)


def test_orders_are_seeded_and_balanced_if_asked_for() -> None:
    codes = np.repeat([0, 1], (900, 100))
    plain = np.concatenate(_order(codes, config(), 0))
    assert sorted(plain) == list(range(1000))
    balanced = np.concatenate(_order(codes, config(loss=LossConfig(balance="sampling")), 0))
    assert abs((codes[balanced] == 1).mean() - 0.5) < 0.06
    again = np.concatenate(_order(codes, config(), 0))
    np.testing.assert_array_equal(plain, again)
    assert (plain != np.concatenate(_order(codes, config(), 1))).any()


@pytest.mark.parametrize(
    ("num_cells", "passes", "sizes"),
    [(20, 33, {6, 7}), (400, 2, {8}), (401, 1, {7, 8}), (3, 100, {3})],
)
def test_few_cells_are_passed_several_times(num_cells: int, passes: int, sizes: set[int]) -> None:
    codes = np.zeros(num_cells, np.int64)
    batches = _order(codes, config(epoch_steps=100), 0)
    assert {len(batch) for batch in batches} == sizes
    rows = np.concatenate(batches)
    assert (np.bincount(rows) == passes).all()
    whole = rows.reshape(passes, num_cells)
    assert (np.sort(whole, axis=1) == np.arange(num_cells)).all()  # each pass has every cell
    assert passes == 1 or (whole[0] != whole[1]).any()


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({}, 20 * 5),  # 40 cells are 5 batches
        ({"cache_gigabytes": 0.0}, 5),
        ({"train": "all"}, 5),
        ({"train": "all", "epoch_steps": 12}, 10),
    ],
)
def test_passes_are_many_where_the_cells_are_encoded_once(
    encoder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    changes: dict[str, Any],
    steps: int,
) -> None:
    settings = config(**{"epochs": 1, "epoch_steps": None, **changes})
    sides = cells().take(np.arange(40)), cells().take(np.arange(40, 60))
    taken: list[int] = []
    rate = finetune.fitting._rate

    def counted(step: int, total: int) -> float:
        taken.append(total)
        return rate(step, total)

    monkeypatch.setattr("finetune.fitting._rate", counted)
    begin(tmp_path, "same")
    fit_network(classifier(encoder, settings.head), *sides, settings, tracker(), tmp_path)
    assert taken == [steps] * steps
