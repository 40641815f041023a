"""Checkpoints: what is kept, what is refused. (Resuming exactly: test_train.py.)"""

import json
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from datastore.config import BinningConfig, OrderConfig
from datastore.store import CellStore
from pretrain.checkpoint import (
    CheckpointMismatchError,
    TrainingState,
    identity,
    resume,
    save_checkpoint,
)
from pretrain.config import BatchConfig, EncoderConfig, MaskingConfig, OptimConfig, PretrainConfig
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine
from tests.support.tiny import ENCODER, tiny_config, tiny_store

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class PlainEngine:
    """Keeps its state in a file, as DeepSpeed does."""

    def save(self, folder: Path, tag: str, state: Mapping[str, Any]) -> None:
        (folder / tag).mkdir(parents=True, exist_ok=True)
        (folder / tag / "state.json").write_text(json.dumps(state))

    def load(self, folder: Path, tag: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads((folder / tag / "state.json").read_text())
        return state


ENGINE = cast(TrainingEngine, PlainEngine())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    return tiny_store(tmp_path_factory.mktemp("store") / "cells.zarr")


def save(folder: Path, step: int, who: Mapping[str, Any], keep: int = 2) -> None:
    save_checkpoint(folder, ENGINE, TrainingState(step, 16 * step, "run"), who, ALONE, keep)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert resume(tmp_path / "checkpoints", ENGINE, {}) is None


def test_newest_is_resumed_and_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step, {"seed": 0})

    assert resume(tmp_path, ENGINE, {"seed": 0}) == TrainingState(12, 192, "run")
    assert steps(tmp_path) == ["step_00000008", "step_00000012"]


def test_half_written_later_step_does_not_push_out_the_whole_one(tmp_path: Path) -> None:
    save(tmp_path, 4, {"seed": 0}, keep=1)
    ENGINE.save(tmp_path, "step_00000008", {})  # killed before it was published

    save(tmp_path, 6, {"seed": 0}, keep=1)

    state = resume(tmp_path, ENGINE, {"seed": 0})
    assert state is not None
    assert state.step == 6
    assert "step_00000004" not in steps(tmp_path)


def test_half_written_step_is_not_resumed(tmp_path: Path) -> None:
    save(tmp_path, 4, {"seed": 0})
    ENGINE.save(tmp_path, "step_00000008", {})

    state = resume(tmp_path, ENGINE, {"seed": 0})

    assert state is not None
    assert state.step == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"seed": 1}, "seed = 0, now it is 1", id="seed"),
        pytest.param({"encoder": replace(ENCODER, depth=3)}, "encoder.depth = 2, now it is 3"),
        pytest.param({"binning": BinningConfig(top_bin=4)}, "binning.", id="binning"),
        pytest.param({"masking": MaskingConfig(ratio=0.4)}, "masking.ratio = 0.3, now", id="mask"),
        pytest.param({"order": OrderConfig(lanes=8)}, "order.lanes = 4, now it is 8", id="order"),
        pytest.param({"batch": BatchConfig(global_size=32)}, "batch.global_size = 16", id="batch"),
        pytest.param({"optim": OptimConfig(lr=1.0)}, "optim.lr = 0.003, now it is 1.0", id="optim"),
        pytest.param({"redraw_every": 0}, "redraw_every = 2, now it is 0", id="redraws"),
        pytest.param({"validation_share": 0.5}, "validation_share = 0.2", id="held-out cells"),
    ],
)
def test_another_training_is_refused(
    changes: dict[str, Any], message: str, store: CellStore, tmp_path: Path
) -> None:
    config = tiny_config(store.path, tmp_path)
    save(tmp_path, 4, identity(config, store, 1))

    assert resume(tmp_path, ENGINE, identity(config, store, 1)) is not None
    with pytest.raises(CheckpointMismatchError, match=f"step_00000004 was trained with {message}"):
        resume(tmp_path, ENGINE, identity(replace(config, **changes), store, 1))


@pytest.mark.parametrize(
    ("now", "message"),
    [
        pytest.param({"num_cells": 48}, "store_id = [0-9a-f]+, now it is", id="store"),
        pytest.param({"world_size": 2}, "world_size = 1, now it is 2", id="number of ranks"),
    ],
)
def test_another_store_or_world_size_is_refused(
    now: dict[str, int], message: str, store: CellStore, tmp_path: Path
) -> None:
    config = tiny_config(store.path, tmp_path)
    save(tmp_path / "checkpoints", 4, identity(config, store, 1))
    other = tiny_store(tmp_path / "other", now.get("num_cells", 64))

    with pytest.raises(CheckpointMismatchError, match=message):
        resume(tmp_path / "checkpoints", ENGINE, identity(config, other, now.get("world_size", 1)))


def test_what_only_says_how_long_or_where_may_change(store: CellStore, tmp_path: Path) -> None:
    config = tiny_config(store.path, tmp_path)
    longer = replace(config, epochs=9, output="elsewhere", save_every=1, stop_after=3, log_every=7)

    assert identity(longer, store, 1) == identity(config, store, 1)


def test_identity_survives_json(store: CellStore, tmp_path: Path) -> None:
    who = identity(tiny_config(store.path, tmp_path), store, 1)

    assert json.loads(json.dumps(who)) == who
    assert who["encoder"] == asdict(ENCODER)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param({"max_steps": 0}, "max_steps is 0", id="no steps"),
        pytest.param({"stop_after": -1}, "stop_after is -1", id="stop before the start"),
        pytest.param({"validation_cells": -1}, "validation_cells is -1", id="cells"),
        pytest.param({"validation_share": 1.0}, "validation_share is 1.0", id="all held out"),
        pytest.param({"save_every": 0}, "save_every is 0", id="never save"),
        pytest.param({"redraw_every": -1}, "redraw_every is -1", id="redraw"),
        pytest.param(
            {"encoder": EncoderConfig(gene_embedding="gene2vec")}, "--gene2vec.vectors", id="files"
        ),
    ],
)
def test_impossible_configuration_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainConfig(store="s", output="o", **changes)
