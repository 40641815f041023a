"""Checkpoints: what is kept, what is refused. (Resuming exactly: test_train.py.)"""

import errno
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from datastore.config import BinningConfig, OrderConfig
from datastore.store import CellStore
from pretrain import checkpoint
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

PIECE = "state_00000.safetensors"
ALONE = Ranks(0, 1, 0, torch.device("cpu"))


class PlainEngine:
    """A few tensors in the place of a model."""

    optimizer_step = 7

    def __init__(self) -> None:
        self.tensors = {f"weight/{name}": torch.randn(3, 4) for name in "abc"}

    def state_sizes(self) -> dict[str, int]:
        return dict.fromkeys("abc", 48)

    def read_state(self, names: list[str]) -> dict[str, torch.Tensor]:
        return {f"weight/{name}": self.tensors[f"weight/{name}"] for name in names}

    def write_state(self, tensors: Mapping[str, torch.Tensor], optimizer_step: int) -> None:
        self.tensors = {key: tensors[key] for key in tensors}
        self.optimizer_step = optimizer_step


ENGINE = cast(TrainingEngine, PlainEngine())


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> CellStore:
    return tiny_store(tmp_path_factory.mktemp("store") / "cells.zarr")


def save(folder: Path, step: int, who: Mapping[str, Any], keep: int = 2) -> None:
    save_checkpoint(folder, ENGINE, TrainingState(step, 16 * step, "run"), who, ALONE, keep)


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("step_*"))


def test_nothing_to_resume(tmp_path: Path) -> None:
    assert resume(tmp_path / "checkpoints", ENGINE, {}, ALONE) is None


def test_newest_is_resumed_and_the_last_few_are_kept(tmp_path: Path) -> None:
    for step in (4, 8, 12):
        save(tmp_path, step, {"seed": 0})

    assert resume(tmp_path, ENGINE, {"seed": 0}, ALONE) == TrainingState(12, 192, "run")
    assert steps(tmp_path) == ["step_00000008", "step_00000012"]


def test_what_was_saved_is_restored(tmp_path: Path) -> None:
    saved, other = PlainEngine(), PlainEngine()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "PIECE_BYTES", 100)  # three tensors of 48 bytes in two files
        save_checkpoint(
            tmp_path, cast(TrainingEngine, saved), TrainingState(4, 64), {}, ALONE, keep=2
        )
    assert len(list((tmp_path / "step_00000004").glob("*.safetensors"))) == 2

    resume(tmp_path, cast(TrainingEngine, other), {}, ALONE)

    assert other.optimizer_step == 7
    assert all(torch.equal(value, saved.tensors[key]) for key, value in other.tensors.items())


def test_the_best_is_kept_besides_the_last(tmp_path: Path) -> None:
    for step in (4, 8, 12, 16):
        state = TrainingState(step, best_step=4, best_loss=0.5)
        save_checkpoint(tmp_path, ENGINE, state, {}, ALONE, keep=1)

    assert steps(tmp_path) == ["step_00000004", "step_00000016"]


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(lambda at: (at / "checkpoint.json").unlink(), "it was not finished"),
        pytest.param(lambda at: flip(at / "checkpoint.json"), r"checkpoint\.json"),
        pytest.param(lambda at: (at / PIECE).unlink(), f"{PIECE} is missing"),
        pytest.param(lambda at: (at / PIECE).write_bytes(b"x"), "has 1 bytes instead of"),
        pytest.param(lambda at: flip(at / PIECE), f"{PIECE} is damaged"),
    ],
    ids=["killed while saving", "manifest", "missing", "cut short", "flipped bit"],
)
def test_a_damaged_checkpoint_is_skipped_with_the_reason(
    damage: Callable[[Path], None],
    reason: str,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    save(tmp_path, 4, {"seed": 0})
    save(tmp_path, 8, {"seed": 0})
    damage(tmp_path / "step_00000008")

    state = resume(tmp_path, ENGINE, {"seed": 0}, ALONE)

    assert state is not None
    assert state.step == 4
    assert re.search(f"step_00000008 is skipped: .*{reason}", caplog.text)
    save(tmp_path, 6, {"seed": 0}, keep=1)  # the steps after it are gone over again
    assert (tmp_path / "step_00000006" / "checkpoint.json").is_file()
    state = resume(tmp_path, ENGINE, {"seed": 0}, ALONE)
    assert state is not None
    assert state.step == 6


def test_a_disk_that_is_full_keeps_the_former(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 4, {})

    def full(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match=r"step_00000008: .*No space left.*are kept"):
        save(tmp_path, 8, {})
    state = resume(tmp_path, ENGINE, {}, ALONE)
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
    save(tmp_path, 4, identity(config, store))

    assert resume(tmp_path, ENGINE, identity(config, store), ALONE) is not None
    with pytest.raises(CheckpointMismatchError, match=f"step_00000004 was trained with {message}"):
        resume(tmp_path, ENGINE, identity(replace(config, **changes), store), ALONE)


def test_another_store_is_refused(store: CellStore, tmp_path: Path) -> None:
    config = tiny_config(store.path, tmp_path)
    save(tmp_path / "checkpoints", 4, identity(config, store))
    other = tiny_store(tmp_path / "other", 48)

    with pytest.raises(CheckpointMismatchError, match=r"store_id = [0-9a-f]+, now it is"):
        resume(tmp_path / "checkpoints", ENGINE, identity(config, other), ALONE)


def test_what_only_says_how_long_or_where_may_change(store: CellStore, tmp_path: Path) -> None:
    config = tiny_config(store.path, tmp_path)
    longer = replace(config, epochs=9, output="elsewhere", save_every=1, stop_after=3, log_every=7)
    longer = replace(longer, batch=BatchConfig(global_size=16, micro_size=2))

    assert identity(longer, store) == identity(config, store)


def test_identity_survives_json(store: CellStore, tmp_path: Path) -> None:
    who = identity(tiny_config(store.path, tmp_path), store)

    assert json.loads(json.dumps(who)) == who
    assert who["encoder"] == ENCODER.architecture()


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
