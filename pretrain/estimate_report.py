"""The estimate as facts for a table: this placement, and what the other ZeRO stages would need."""

from dataclasses import replace
from typing import Any

from pretrain.config import PretrainConfig
from pretrain.estimate import (
    DEVICES,
    activation_bytes,
    bytes_per_step,
    calibrate,
    largest_micro_batch,
    measure_size,
    memory,
    seconds_per_cell,
)
from pretrain.memory_moments import Memory, ModelSize, Placement


def report(
    config: PretrainConfig, placement: Placement, gpu: str, num_genes: int, num_cells: int
) -> dict[str, Any]:
    """Estimate a training.

    Args:
        config: The training; its store and output are not looked at.
        placement: Ranks, ZeRO stage, precision.
        gpu: Key of `DEVICES`, or `cpu` to measure on this machine.
        num_genes: Length of the panel, G.
        num_cells: Training cells of an epoch.

    Returns:
        Facts by name, for `launchers.cli.table`.

    Raises:
        ValueError: If the global batch cannot be dealt to the ranks.
    """
    config.batch.accumulation_steps(placement.world_size)
    if gpu in DEVICES and config.encoder.kernel == "auto":  # what a GPU runs keeps more than C++
        config = replace(config, encoder=replace(config.encoder, kernel="torch"))
    size = measure_size(config.encoder, num_genes, masking=config.masking)
    kept = activation_bytes(config, size.tokens, placement.precision)
    need = memory(config, size, placement, kept)
    facts: dict[str, Any] = {
        "ranks": placement.world_size,
        "parameters": size.trained + size.frozen,
        "tokens_per_cell": int(size.tokens),
        "precision": placement.precision,
        "memory per rank, GB": _gigabytes(need),
    }
    if gpu in DEVICES:
        limit = DEVICES[gpu].memory
        micro = largest_micro_batch(config, size, placement, kept, 0.9 * limit)
        facts["largest micro-batch"] = f"{micro} (in 90 % of {limit / 1e9:.0f} GB)"
    facts["other ZeRO stages, GB per rank"] = {
        f"stage {stage}": f"{memory(config, size, other, kept).total / 1e9:.2f}"
        for stage in range(4)
        if (other := replace(placement, stage=stage, offload=False)) != placement
    }
    facts |= _speed(config, size, placement, gpu, kept, num_genes, num_cells)
    return facts


def _speed(
    config: PretrainConfig,
    size: ModelSize,
    placement: Placement,
    gpu: str,
    kept: float,
    num_genes: int,
    num_cells: int,
) -> dict[str, Any]:
    sent = bytes_per_step(config, size, placement)
    per_rank = config.batch.global_size / placement.world_size
    if gpu == "cpu":
        cells = config.batch.micro_size
        seconds = per_rank * calibrate(config, num_genes, cells)
        source = "measured here, one rank, without communication"
        wire = 0.0
    else:
        device = DEVICES[gpu]
        seconds = per_rank * seconds_per_cell(config, size, kept, device, placement.precision)
        wire = sent / (device.network if placement.nodes > 1 else device.link)
        source = f"roofline, {device.reached:.0%} of the peak assumed"
    step = seconds + wire  # nothing overlaps: the cautious sum
    rate = config.batch.global_size / step
    hours = num_cells * config.epochs / rate / 3600
    return {
        "sent per rank and step, MB": f"{sent / 1e6:.1f}",
        "seconds per step": f"{step:.4g} ({wire:.2g} of them on the wire, none hidden)",
        "cells per second": f"{rate:.4g}",
        f"hours for {config.epochs} epochs of {num_cells:,} cells": f"{hours:.4g}",
        "speed by": source,
    }


def _gigabytes(need: Memory) -> dict[str, str]:
    parts = ("parameters", "gradients", "optimizer", "activations", "buffers", "total")
    shown = {part: f"{getattr(need, part) / 1e9:.3f}" for part in parts}
    return shown | ({"host": f"{need.host / 1e9:.3f}"} if need.host else {})
