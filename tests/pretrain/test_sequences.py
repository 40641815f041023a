"""Training on expressed genes only: the same losses however it is cut, spread and sharded."""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from pretrain.config import BatchConfig, MaskingConfig, PretrainConfig
from pretrain.distributed import Ranks
from pretrain.export import read_export
from pretrain.train import pretrain
from tests.support.ranks import run_ranks
from tests.support.tiny import ENCODER, NUM_GENES, tiny_config, tiny_store

EXPRESSED = replace(ENCODER, sequence="expressed", num_zeros=2)
CONTINUOUS = replace(ENCODER, expression="continuous")
BY_CELLS = BatchConfig(global_size=16, micro_size=4)
BY_TOKENS = BatchConfig(global_size=16, micro_size=3, tokens=60)
"""A tiny cell has about 20 tokens; 16 do not divide by 3."""
ZEROS = MaskingConfig(zeros=1.5)

pytestmark = pytest.mark.multiprocess


@dataclass
class Runs:
    """Where the trainings are and what they returned, an error as text."""

    folder: Path
    results: dict[str, Any]

    def losses(self, name: str, metric: str = "loss") -> NDArray[np.float64]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        parsed = [json.loads(line) for line in lines]
        return np.array([line[metric] for line in parsed if metric in line])


def train_all(ranks: Ranks, configs: dict[str, PretrainConfig]) -> dict[str, Any]:
    outcomes: dict[str, Any] = {}
    for name, config in configs.items():
        try:
            outcomes[name] = pretrain(config, ranks)
        except ValueError as error:
            outcomes[name] = str(error)
    return outcomes


def settings(
    folder: Path, name: str, stage: int = 1, offload: bool = False, **changes: Any
) -> PretrainConfig:
    zero: dict[str, Any] = {"stage": stage}
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
    path = folder / f"zero{stage}{offload}.json"
    path.write_text(json.dumps({"zero_optimization": zero}))
    fields = {"encoder": EXPRESSED, "batch": BY_TOKENS, "deepspeed": str(path)} | changes
    return tiny_config(folder / "store", folder / name, **fields)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("sequences")
    tiny_store(folder / "store", empty=5)
    configs = {
        "cells": settings(folder, "cells", batch=BY_CELLS),
        "tokens": settings(folder, "tokens"),
        "mixed up": settings(folder, "tokens", encoder=ENCODER, batch=BY_CELLS),
        "both": settings(folder, "both", encoder=replace(CONTINUOUS, sequence="expressed")),
        "zeros": settings(folder, "zeros", masking=ZEROS),
        "zeros by cells": settings(folder, "zeros by cells", masking=ZEROS, batch=BY_CELLS),
        "cell": settings(folder, "cell", cell_objective=2.0),
        "cell by cells": settings(folder, "cell by cells", cell_objective=2.0, batch=BY_CELLS),
        "zeros of whole cells": settings(
            folder, "zeros of whole cells", masking=ZEROS, encoder=ENCODER, batch=BY_CELLS
        ),
    }
    return Runs(folder, run_ranks(train_all, 1, folder, configs)[0])


@pytest.fixture(scope="module")
def spread(runs: Runs) -> Runs:
    folder, kept = runs.folder, replace(EXPRESSED, checkpointing=True)
    one = {
        "continuous": settings(folder, "continuous", encoder=CONTINUOUS, batch=BY_CELLS),
        "stopped": settings(folder, "stopped", stop_after=3),
        "offload": settings(folder, "offload", 2, offload=True),
    }
    two = {
        "continued": settings(folder, "stopped"),
        "on two": settings(folder, "on two"),
        "zeros on two": settings(folder, "zeros on two", 3, masking=ZEROS),
        "cell on two": settings(folder, "cell on two", 3, cell_objective=2.0),
        "on two, zero 0": settings(folder, "on two, zero 0", 0),
        "on two, zero 2": settings(folder, "on two, zero 2", 2, encoder=kept),
        "on two, zero 3": settings(folder, "on two, zero 3", 3, encoder=kept),
    }
    results = runs.results | run_ranks(train_all, 1, folder, one)[0]
    return Runs(folder, results | run_ranks(train_all, 2, folder, two)[0])


def test_losses_by_tokens_are_those_by_cells(runs: Runs) -> None:
    check_same(runs, "tokens")
    assert runs.losses("cells")[-1] < runs.losses("cells")[0]


def check_same(runs: Runs, name: str, other: str = "cells") -> None:
    assert runs.results[name]["step"] == 8
    for metric in ("loss", "gradient_norm", "validation_loss"):
        ours, expected = runs.losses(name, metric), runs.losses(other, metric)
        np.testing.assert_allclose(ours, expected, rtol=1e-6)  # worst 1.5e-7


def test_hidden_zeros_are_those_of_the_cell_however_it_is_cut(runs: Runs) -> None:
    check_same(runs, "zeros", "zeros by cells")
    for name in ("zeros", "zeros of whole cells"):
        losses = runs.losses(name)
        assert losses[-1] < losses[0]
    # Of five targets two are expressed: 0 is the commonest bin.
    rule = runs.losses("zeros", "validation_commonest_bin_accuracy")
    assert rule[-1] == pytest.approx(0.6, abs=0.05)


def test_cells_are_summed_up_however_they_are_cut(runs: Runs) -> None:
    check_same(runs, "cell", "cell by cells")
    nats = runs.losses("cell", "validation_cell_loss")
    assert nats[-1] < nats[0]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["zeros", "cell"])
def test_zeros_and_sums_do_not_depend_on_ranks(spread: Runs, kind: str) -> None:
    check_same(spread, f"{kind} on two", kind)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["offload", "on two", "on two, zero 0", "on two, zero 2", "on two, zero 3"]
)
def test_losses_do_not_depend_on_ranks_and_stage(spread: Runs, name: str) -> None:
    check_same(spread, name)


@pytest.mark.slow
def test_a_stopped_training_continues_on_another_number_of_ranks(spread: Runs) -> None:
    ours, expected = spread.losses("stopped"), spread.losses("tokens")
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


def test_continuous_values_train_packed(runs: Runs) -> None:
    check_learned(runs, "both")


@pytest.mark.slow
def test_continuous_values_train_whole(spread: Runs) -> None:
    check_learned(spread, "continuous")


def check_learned(runs: Runs, name: str) -> None:
    assert runs.results[name]["step"] == 8
    losses = runs.losses(name)
    assert losses[-1] < losses[0]
    export = read_export(runs.folder / name / "export", "encoder")
    assert export.encoder_config.expression == "continuous"
    assert not torch.equal(export.weights["encoder.expression.centres"][1:], torch.arange(1.5, 6))


def test_the_checkpoint_knows_its_sequence(runs: Runs) -> None:
    assert "encoder.sequence = expressed, now it is full" in runs.results["mixed up"]


def test_the_export_knows_its_sequence(runs: Runs) -> None:
    export = read_export(runs.folder / "tokens" / "export", "encoder")

    assert (export.encoder_config.sequence, export.encoder_config.num_zeros) == ("expressed", 2)
    states = export.encoder()(torch.zeros(1, NUM_GENES, dtype=torch.uint8))
    assert not states[:, :-1].any(), "nothing is expressed"
    assert states[:, -1].any()
