"""Fine-tuning on two ranks with real DeepSpeed, beside the same training in one process.

Starting processes costs seconds: one start trains all there is to compare.
"""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.special import softmax

from finetune.classifier import CellClassifier
from finetune.config import FinetuneConfig, HeadConfig, LabelledConfig, LossConfig
from finetune.fitting import Cells, Inputs, fit_network, seeded
from finetune.resume import begin
from finetune.updates import require_trainable
from pretrain.distributed import Ranks, alone
from pretrain.export import read_export
from tests.support.labelled import TYPES, labelled_cells, write_encoder
from tests.support.ranks import run_ranks

CPU = alone(torch.device("cpu"))
NUM_CELLS = 60
CONV = HeadConfig(hidden=16, bottleneck=8, expression=False)
POOLED = replace(CONV, kind="pooled")


@dataclass(frozen=True)
class Training:
    """A fine-tuning of the first cells, validated on the last ones."""

    folder: Path
    settings: FinetuneConfig
    num_train: int = 43  # batches of 8 and 7 cells: on two ranks the parts are unequal
    num_validation: int = 17
    stop_at: int | None = None
    is_shared: bool = True
    """Whether the second rank sees the folder of the first."""


@dataclass
class Outcome:
    """What one rank saw; plain values that travel between processes."""

    losses: dict[int, float] = field(default_factory=dict)
    weights: dict[str, NDArray[Any]] = field(default_factory=dict)
    probabilities: NDArray[Any] | None = None
    error: str = ""


class Stopped(Exception):
    pass


def train(ranks: Ranks, training: Training) -> Outcome:
    """Fine-tune, or continue what is in the folder."""
    outcome, settings = Outcome(), training.settings

    def log_metrics(metrics: dict[str, float], step: int) -> None:
        outcome.losses[step] = metrics["loss"]
        if step == training.stop_at:
            raise Stopped

    adata = labelled_cells(NUM_CELLS, seed=0)
    codes = np.searchsorted(TYPES, adata.obs["cell_type"].to_numpy(str))
    cells = Cells(adata.X.tocsr(), codes, np.zeros((NUM_CELLS, 3), np.float32))
    with seeded(0, "head"):
        model = CellClassifier(read_export(settings.encoder).encoder(), TYPES, settings.head)
    folder = training.folder
    if ranks.is_first:
        folder.mkdir(exist_ok=True)
        begin(folder, "same")
    elif not training.is_shared:
        folder = folder / "elsewhere"
    ranks.barrier()
    learn = cells.take(np.arange(training.num_train))
    validation = cells.take(np.arange(NUM_CELLS - training.num_validation, NUM_CELLS))
    tracker: Any = SimpleNamespace(log_metrics=log_metrics)
    try:
        fit_network(model, learn, validation, settings, tracker, folder, ranks)
    except (Stopped, ValueError, SystemExit) as error:
        outcome.error = f"{type(error).__name__}: {error}"
        return outcome
    outcome.weights = {name: value.numpy() for name, value in model.state_dict().items()}
    outcome.probabilities = softmax(Inputs(model, validation, settings).logits(), axis=1)
    return outcome


def train_each(ranks: Ranks, trainings: dict[str, Training]) -> dict[str, Outcome]:
    return {name: train(ranks, each) for name, each in trainings.items()}


@dataclass
class Runs:
    """All trainings, on one process and on both ranks of two."""

    trainings: dict[str, Training]
    one: dict[str, Outcome]
    two: list[dict[str, Outcome]]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("ranks")
    base = FinetuneConfig(
        encoder=str(write_encoder(folder / "encoder")),
        output="o",
        data=LabelledConfig(path="p"),
        head=CONV,
        epochs=4,
        epoch_steps=1,
        batch_size=8,
        lr=5e-3,
        encoder_lr=1e-3,
    )

    def zero(stage: int) -> FinetuneConfig:
        path = folder / f"zero{stage}.json"
        path.write_text(json.dumps({"zero_optimization": {"stage": stage}}))
        return replace(base, head=POOLED, train="all", deepspeed=str(path))

    settings = {
        "head": base,
        "uncached": replace(base, cache_gigabytes=0.0),
        "published": replace(base, head=replace(CONV, normalize=False), train="last_block"),
        "last block": replace(base, train="last_block"),
        "drawn": replace(base, head=POOLED, loss=LossConfig(balance="sampling", focal=1.0)),
        "all": replace(base, head=POOLED, train="all"),
        "all, ZeRO 0": zero(0),
        "all, ZeRO 2": zero(2),
    }
    trainings = {name: Training(folder / name, each) for name, each in settings.items()}
    trainings["early"] = Training(folder / "early", replace(base, head=POOLED, patience=1, lr=0.02))
    trainings["one validates"] = Training(folder / "one validates", base, num_validation=1)
    two = trainings | {
        "stopped": Training(folder / "two", settings["all"], stop_at=3),
        "continued": Training(folder / "two", settings["all"]),
        "begun by one": Training(folder / "begun", settings["all"]),
        "left for one": Training(folder / "left", settings["all"], stop_at=3),
        "apart": Training(folder / "two", settings["all"], is_shared=False),
        "too small": Training(folder / "small", replace(base, batch_size=2), num_train=3),
    }
    ones = {name: replace(each, folder=folder / f"one {name}") for name, each in trainings.items()}
    ones["begun"] = Training(folder / "begun", settings["all"], stop_at=3)
    one = train_each(CPU, ones)
    both = run_ranks(train_each, 2, folder, two)
    one |= train_each(CPU, {"left": Training(folder / "left", settings["all"])})
    return Runs(trainings, one, both)


def difference(one: Outcome, other: Outcome, without: tuple[str, ...] = ()) -> float:
    """Largest difference of a weight."""
    assert set(one.weights) == set(other.weights)
    return max(
        float(np.abs(value - other.weights[name]).max())
        for name, value in one.weights.items()
        if name not in without
    )


@pytest.mark.multiprocess
@pytest.mark.parametrize(
    ("name", "weights", "probabilities"),
    [
        # Worst seen 5e-5 and 5e-6: Adam follows rounding errors where gradients are small.
        pytest.param("head", 1e-4, 1e-4, id="head"),
        pytest.param("uncached", 1e-4, 1e-4, id="head, encoded at each step"),
        pytest.param("published", 1e-4, 1e-4, id="last block, published head"),
        pytest.param("drawn", 1e-4, 1e-4, id="types drawn alike often, focal loss"),
        pytest.param("all", 1e-4, 1e-4, id="all"),
        pytest.param("all, ZeRO 0", 1e-4, 1e-4, id="ZeRO 0"),
        pytest.param("all, ZeRO 2", 1e-4, 1e-4, id="ZeRO 2"),
        pytest.param("early", 1e-4, 1e-4, id="stopped early"),
        pytest.param("one validates", 1e-4, 1e-4, id="a rank has nothing to validate"),
        # Normalization takes away what the final norm's bias adds: rounding errors move it (5e-3).
        pytest.param("last block", 2e-2, 1e-3, id="last block"),
    ],
)
def test_two_ranks_train_what_one_process_trains(
    runs: Runs, name: str, weights: float, probabilities: float
) -> None:
    one, two = runs.one[name], runs.two[0][name]
    assert list(two.losses) == list(one.losses)
    losses = [list(run.losses.values()) for run in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-4)  # 3e-6
    assert difference(one, two) < weights
    assert one.probabilities is not None
    assert two.probabilities is not None
    np.testing.assert_allclose(two.probabilities, one.probabilities, atol=probabilities)
    np.testing.assert_array_equal(two.probabilities.argmax(1), one.probabilities.argmax(1))


@pytest.mark.multiprocess
def test_both_ranks_have_the_same_weights(runs: Runs) -> None:
    first, second = runs.two
    assert len(first["early"].losses) < 4
    for name, outcome in first.items():
        assert difference(outcome, second[name]) == 0 if outcome.weights else name, name


@pytest.mark.multiprocess
def test_a_stopped_training_continues_on_any_number_of_ranks(runs: Runs) -> None:
    two = runs.two[0]
    assert two["stopped"].error == "Stopped: "
    assert list(two["continued"].losses) == [3, 4]
    assert difference(two["continued"], two["all"]) == 0
    for continued in (two["begun by one"], runs.one["left"]):
        assert list(continued.losses) == [3, 4]
        assert difference(continued, runs.one["all"]) < 1e-4


@pytest.mark.multiprocess
def test_batches_of_fewer_cells_than_ranks_are_refused_once(runs: Runs) -> None:
    first, second = (rank["too small"].error for rank in runs.two)
    assert first == (
        "ValueError: batch_size 2 cuts the 3 training cells into batches of 1, but each of 2 ranks "
        "needs a cell of every batch; raise batch_size, or start 1 at most"
    )
    assert second == "SystemExit: 2"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param({"zero_optimization": {"stage": 3}}, "every rank has the whole", id="ZeRO 3"),
        pytest.param({"bf16": {"enabled": True}}, "computes in float32; leave it", id="bf16"),
        pytest.param({"train_batch_size": 8}, "'train_batch_size'; remove it and set", id="ours"),
    ],
)
def test_what_fine_tuning_cannot_follow_is_refused(
    content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(content))
    config = FinetuneConfig(
        encoder="e", output="o", data=LabelledConfig(path="p"), deepspeed=str(path)
    )
    with pytest.raises(ValueError, match=message):
        require_trainable(config, replace(CPU, world_size=2))


def test_a_deepspeed_json_for_one_process_is_of_no_use(tmp_path: Path) -> None:
    path = tmp_path / "deepspeed.json"
    path.write_text("{}")
    config = FinetuneConfig(
        encoder="e", output="o", data=LabelledConfig(path="p"), deepspeed=str(path)
    )
    with pytest.warns(UserWarning, match="changes nothing for one process; start several"):
        require_trainable(config, CPU)


@pytest.mark.multiprocess
def test_progress_that_only_some_ranks_see_is_refused(runs: Runs) -> None:
    first, second = (rank["apart"].error for rank in runs.two)
    assert re.fullmatch(
        r"ValueError: the ranks read different progress in .*two \(epochs 4, 0\); put the output "
        "on a disk that all hosts share, or remove its folder `progress`",
        first,
    )
    assert second == "SystemExit: 2"
