"""What a DeepSpeed JSON may say, and what is refused before DeepSpeed starts."""

import json
from pathlib import Path
from typing import Any

import pytest

from pretrain.deepspeed_settings import (
    OWNED,
    deepspeed_config,
    read_deepspeed_json,
    require_supported,
)
from tests.support.tiny import tiny_config


def write(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "deepspeed.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return str(path)


@pytest.mark.parametrize(
    "content",
    [
        pytest.param({}, id="empty"),
        pytest.param({"zero_optimization": {"stage": 3}}, id="a stage"),
        pytest.param({"bf16": {"enabled": True}, "wall_clock_breakdown": True}, id="precision"),
    ],
)
def test_json_is_handed_on(content: dict[str, Any], tmp_path: Path) -> None:
    assert read_deepspeed_json(write(tmp_path, content)) == content


def test_without_a_json_zero_1_is_taken() -> None:
    assert read_deepspeed_json(None) == {"zero_optimization": {"stage": 1}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        *(
            pytest.param(
                {key: 1}, rf"sets '{key}'; remove it and set {field.split('*')[0]}", id=key
            )
            for key, field in OWNED.items()
        ),
        pytest.param({"gradient_cliping": 1}, "unknown key 'gradient_cliping'", id="misspelt"),
        pytest.param({"zero_optimisation": {}}, "did you mean 'zero_optimization'", id="near"),
        pytest.param({"fp16": {}}, "did you mean 'bf16'", id="other precision"),
        pytest.param({"xyz": {}}, "allowed are .*'zero_optimization'", id="far"),
        pytest.param("{stage: 1}", "is not JSON", id="not JSON"),
        pytest.param("[1]", "one JSON object", id="a list"),
    ],
)
def test_json_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        read_deepspeed_json(write(tmp_path, content))


@pytest.mark.parametrize(
    ("zero", "device", "message"),
    [
        pytest.param({"stage": 4}, "cuda", r"stage is 4; give 0, 1, 2 or 3", id="stage"),
        pytest.param({"stage": "two"}, "cuda", r"stage is 'two'; give", id="no number"),
        pytest.param(
            {"stage": 0, "offload_optimizer": {"device": "cpu"}},
            "cpu",
            r"offload_optimizer needs stage 1 or more, it is 0",
            id="offload without ZeRO",
        ),
        pytest.param(
            {"stage": 2, "offload_param": {"device": "cpu"}},
            "cuda",
            r"offload_param needs stage 3 or more, it is 2",
            id="weights offloaded",
        ),
        pytest.param(
            {"stage": 3, "offload_optimizer": {"device": "nvme"}},
            "cuda",
            r"device is 'nvme', from which checkpoints cannot be taken; choose 'cpu'",
            id="nvme",
        ),
        pytest.param(
            {"stage": 3, "zero_quantized_weights": True},
            "cpu",
            "zero_quantized_weights is not implemented on CPU",
            id="quantised weights",
        ),
    ],
)
def test_what_cannot_run_is_refused(zero: dict[str, Any], device: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        require_supported({"zero_optimization": zero}, device)


@pytest.mark.parametrize(
    "zero",
    [
        {},
        {"stage": 2, "offload_optimizer": {"device": "cpu"}},
        {"stage": 3, "offload_param": {"device": "cpu"}},
        {"stage": 0, "offload_optimizer": {"device": "none"}},
    ],
)
def test_what_can_run_is_taken(zero: dict[str, Any]) -> None:
    require_supported({"zero_optimization": zero}, "cpu")
    require_supported({"zero_optimization": {"stage": 3, "zero_quantized_weights": True}}, "cuda")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weights.json").write_bytes(b"\x80\x05\xff")

    with pytest.raises(ValueError, match=r"weights\.json is not JSON"):
        read_deepspeed_json(str(tmp_path / "weights.json"))


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"zero\.json"):
        read_deepspeed_json(str(tmp_path / "zero.json"))


@pytest.mark.parametrize(("world_size", "accumulation"), [(1, 4), (2, 2), (4, 1)])
def test_batch_sizes_follow_from_our_configuration(world_size: int, accumulation: int) -> None:
    joined = deepspeed_config(tiny_config("s", "o"), world_size, {"bf16": {"enabled": True}})

    assert joined["train_micro_batch_size_per_gpu"] == 4
    assert joined["gradient_accumulation_steps"] == accumulation
    assert joined["gradient_clipping"] == 100.0
    assert joined["bf16"] == {"enabled": True}


def test_uneven_global_batch_is_refused_with_one_that_would_do() -> None:
    with pytest.raises(ValueError, match=r"multiple of batch\.micro_size 4 × 3 ranks; 12"):
        deepspeed_config(tiny_config("s", "o"), 3, {})
