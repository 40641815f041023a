"""What DeepSpeed is told: a JSON with what only it understands, joined with our configuration.

Batch sizes, clipping, optimizer and schedule belong to our configuration; a DeepSpeed JSON holds
ZeRO stage, precision, offload, communication.
"""

import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from pretrain.config import PretrainConfig

OWNED: Final = {
    "train_batch_size": "batch.global_size",
    "train_micro_batch_size_per_gpu": "batch.micro_size",
    "gradient_accumulation_steps": "batch.global_size and batch.micro_size",
    "gradient_clipping": "optim.clip_norm",
    "optimizer": "optim.*",
    "scheduler": "optim.schedule",
    "steps_per_print": "log_every",
}
"""DeepSpeed keys that follow from our fields, and which."""

ALLOWED: Final = frozenset(
    {
        "aio",
        "bf16",
        "comms_logger",
        "communication_data_type",
        "data_types",
        "flops_profiler",
        "memory_breakdown",
        "wall_clock_breakdown",
        "zero_allow_untested_optimizer",
        "zero_force_ds_cpu_optimizer",
        "zero_optimization",
    }
)
"""DeepSpeed keys that a JSON may set. DeepSpeed itself ignores unknown ones without a word."""


def read_deepspeed_json(path: str | None) -> dict[str, Any]:
    """Read and check a DeepSpeed JSON; without one, ZeRO stage 1.

    Raises:
        ValueError: If a key is ours or unknown; the message names our field or the nearest key.
    """
    if path is None:
        return {"zero_optimization": {"stage": 1}}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold one JSON object")
    for key in content:
        if key in OWNED:
            raise ValueError(f"{path} sets {key!r}; remove it and set {OWNED[key]} instead")
        if key not in ALLOWED:
            near = difflib.get_close_matches(key, ALLOWED, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"allowed are {sorted(ALLOWED)}"
            raise ValueError(f"{path} has the unknown key {key!r}; {hint}")
    return content


def require_supported(content: Mapping[str, Any], device: str) -> None:
    """Refuse what DeepSpeed cannot run on this device, or we cannot save, before anything starts.

    Args:
        content: A checked DeepSpeed JSON.
        device: `cpu` or `cuda`.

    Raises:
        ValueError: That names the setting and what to do.
    """
    zero = content.get("zero_optimization", {})
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage!r}; give 0, 1, 2 or 3")
    for name, least in (("offload_optimizer", 1), ("offload_param", 3)):
        where = zero.get(name, {}).get("device", "none")
        if where == "none":
            continue
        if where != "cpu":
            raise ValueError(
                f"zero_optimization.{name}.device is {where!r}, from which checkpoints cannot be "
                "taken; choose 'cpu'"
            )
        if stage < least:
            raise ValueError(
                f"zero_optimization.{name} needs stage {least} or more, it is {stage}; raise "
                "zero_optimization.stage or leave it out"
            )
    if device == "cpu" and zero.get("zero_quantized_weights"):
        raise ValueError(
            "zero_optimization.zero_quantized_weights is not implemented on CPU; leave it out"
        )


def deepspeed_config(
    config: PretrainConfig, world_size: int, extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Join a checked DeepSpeed JSON with what follows from a pretraining's configuration."""
    accumulation = declared_accumulation_steps(config, world_size)
    return joined(extra, config.batch.micro_size, accumulation, config.optim.clip_norm)


def joined(
    extra: Mapping[str, Any], micro_size: int, accumulation_steps: int, clip_norm: float
) -> dict[str, Any]:
    """Join a checked DeepSpeed JSON with what is ours to say.

    Args:
        extra: From `read_deepspeed_json`.
        micro_size: Cells in one forward pass on one rank; DeepSpeed only counts by it.
        accumulation_steps: Micro-batches per rank and step.
        clip_norm: Highest norm of the whole gradient.
    """
    return {
        # Offloading keeps our AdamW, so that it trains as every other stage does.
        "zero_force_ds_cpu_optimizer": False,
        **extra,
        "train_micro_batch_size_per_gpu": micro_size,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": clip_norm,
        "steps_per_print": 2**31,
    }


def declared_accumulation_steps(config: PretrainConfig, world_size: int) -> int:
    """Micro-batches of a step as DeepSpeed is told.

    Cut by tokens, they differ in number and `backward` is told the last one; all that DeepSpeed
    must know is that there may be several.
    """
    steps = config.batch.accumulation_steps(world_size)
    return steps if config.batch.tokens is None else 2
