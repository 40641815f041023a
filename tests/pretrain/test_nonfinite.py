"""What is not finite stops all ranks before the update, or is left out by all of them."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.export import read_export
from pretrain.nonfinite import update_is_safe
from pretrain.objective import MaskedGeneModel
from pretrain.train import pretrain
from tests.support.plain import NUM_STEPS, largest_difference, plain_training
from tests.support.ranks import run_ranks
from tests.support.tiny import tiny_config, tiny_store

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
POISONED = 5
STAGES: dict[str, dict[str, Any]] = {
    "zero0": {"zero_optimization": {"stage": 0}},
    "zero1": {"zero_optimization": {"stage": 1}},
    "zero2_offload": {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
    "zero3": {"zero_optimization": {"stage": 3}},
    "zero0_bf16": {"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}},
    "zero2_bf16": {"zero_optimization": {"stage": 2}, "bf16": {"enabled": True}},
}


def config_that(on_nonfinite: Any, **changes: Any) -> PretrainConfig:
    return tiny_config("store", "run", on_nonfinite=on_nonfinite, **changes)


class TestDecision:
    def test_finite_steps_are_made(self) -> None:
        assert update_is_safe([], 3, 0, config_that("stop"), ALONE)

    def test_stop_names_rank_step_and_cells(self) -> None:
        with pytest.raises(
            ValueError, match=r"not finite at step 3 on rank 0 \(.+\), store positions \[7, 9\]; no"
        ):
            update_is_safe([7, 9], 3, 0, config_that("stop"), ALONE)

    def test_skip_is_told_and_bounded(self, caplog: pytest.LogCaptureFixture) -> None:
        config = config_that("skip", max_skipped_steps=2)
        assert not update_is_safe([7], 3, 0, config, ALONE)
        assert not update_is_safe(range(20), 4, 1, config, ALONE)
        assert (
            "store positions [7]; no weight was changed, the step is skipped (1 of at most 2)"
            in (caplog.text)
        )
        assert "14, 15] and 4 more; no weight" in caplog.text
        with pytest.raises(ValueError, match="max_skipped_steps is 2 and as many were skipped"):
            update_is_safe([7], 5, 2, config, ALONE)

    @pytest.mark.parametrize("name", ["max_skipped_steps", "check_ranks_every"])
    def test_negative_numbers_are_refused(self, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is -1; give 0 "):
            tiny_config("store", "run", **{name: -1})


def train_poisoned(
    ranks: Ranks, configs: dict[str, PretrainConfig]
) -> dict[str, dict[str, Any] | str]:
    """Train each; on the last rank a gradient becomes infinite in the second half of step 5."""
    return {name: _train_poisoned(ranks, config) for name, config in configs.items()}


def _train_poisoned(ranks: Ranks, config: PretrainConfig) -> dict[str, Any] | str:
    plain = MaskedGeneModel.forward
    calls: list[bool] = []

    def forward(model: MaskedGeneModel, *inputs: Any) -> Any:
        done = plain(model, *inputs)
        calls.append(model.training)
        if ranks.rank == ranks.world_size - 1 and sum(calls) == POISONED * 2 + 2:
            done.loss.register_hook(lambda gradient: gradient * torch.inf)
        return done

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedGeneModel, "forward", forward)
        try:
            return pretrain(config, ranks)
        except ValueError as error:
            return str(error)
        except SystemExit as leaving:
            return f"left with {leaving.code}"


@pytest.mark.multiprocess
@pytest.mark.slow
def test_all_ranks_stop_or_skip_together_under_every_stage(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store").path
    stop = replace(tiny_config(store, tmp_path / "stop"), save_every=2)
    configs = {"stop": stop}
    for name, content in STAGES.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(content))
        configs[name] = replace(stop, output=str(tmp_path / name), deepspeed=str(path))
        configs[name] = replace(configs[name], on_nonfinite="skip", check_ranks_every=1)
    bound = replace(configs["zero1"], output=str(tmp_path / "bound"), max_skipped_steps=0)
    first, second = run_ranks(train_poisoned, 2, tmp_path, configs | {"bound": bound})

    assert "not finite at step 5 on rank 1" in first["stop"]
    assert "store positions [" in first["stop"]
    assert second["stop"] == second["bound"] == "left with 2"
    assert "max_skipped_steps is 0" in first["bound"]
    found = sorted(path.name for path in (tmp_path / "stop" / "checkpoints").iterdir())
    assert found == ["genes.txt", "latest", "step_00000002", "step_00000004"]

    losses, _, weights = plain_training(stop, left_out={POISONED})
    del losses[POISONED]
    for name in STAGES:
        assert first[name]["step"] == second[name]["step"] == NUM_STEPS
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        steps = [line for line in map(json.loads, lines) if "loss" in line]
        assert steps.pop(POISONED)["loss"] == 0.0
        rtol, atol = (0.01, 0.03) if "bf16" in name else (1e-6, 2e-6)
        # Worst: fp32 1.4e-7 relative, weights 1.4e-7; bf16 1.2e-3 relative, weights 0.014.
        np.testing.assert_allclose([line["loss"] for line in steps], losses, rtol=rtol)
        assert largest_difference(read_export(tmp_path / name / "export").weights, weights) < atol
        manifest = json.loads(
            (tmp_path / name / "checkpoints/step_00000008/checkpoint.json").read_text()
        )
        assert manifest["state"]["skipped_steps"] == 1
        assert manifest["optimizer_step"] == NUM_STEPS - 1


def skip_the_first_and_go_on(ranks: Ranks, config: PretrainConfig) -> list[int]:
    plain = MaskedGeneModel.forward

    def forward(model: MaskedGeneModel, *inputs: Any) -> Any:
        done = plain(model, *inputs)
        return done._replace(loss=done.loss * torch.nan)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedGeneModel, "forward", forward)
        pretrain(replace(config, stop_after=1), ranks)
    return [pretrain(config, ranks)["step"]]


@pytest.mark.multiprocess
@pytest.mark.slow
def test_a_training_whose_first_step_was_skipped_can_be_saved_and_continued(tmp_path: Path) -> None:
    store = tiny_store(tmp_path / "store").path
    config = tiny_config(store, tmp_path / "run", on_nonfinite="skip", validation_share=0.0)
    config = replace(config, max_steps=3)
    assert run_ranks(skip_the_first_and_go_on, 1, tmp_path, config) == [[3]]
    state = json.loads((tmp_path / "run/checkpoints/step_00000003/checkpoint.json").read_text())
    assert state["optimizer_step"] == 2
