"""Where memory is measured beside the estimate: shapes, ZeRO stages, precisions, sequences."""

from dataclasses import dataclass
from typing import Any, Final

from pretrain.config import BatchConfig, EncoderConfig, PretrainConfig
from pretrain.estimate import activation_bytes, measure_size, memory
from pretrain.memory_moments import Placement, Precision

MALLOC: Final = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Makes glibc give back at once what is freed, so that resident memory is what is in use."""

STATE: Final[dict[str, Any]] = {"dim": 512, "depth": 4, "heads": 8, "dim_head": 64}
"""Mostly weights: 13 million."""
WIDE: Final[dict[str, Any]] = {"dim": 1024, "depth": 3, "heads": 16, "dim_head": 64}
"""38 million, few and large parameters."""
DEEP: Final[dict[str, Any]] = {"dim": 256, "depth": 12, "heads": 4, "dim_head": 64}
"""10 million in many small ones, and long on activations."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """A training whose memory is measured."""

    name: str
    encoder: dict[str, Any]
    zero: dict[str, Any]
    precision: Precision = "fp32"
    ranks: int = 2
    micro: int = 1
    accumulation: int = 2


OFFLOAD: Final[dict[str, Any]] = {"offload_optimizer": {"device": "cpu"}}
SHORT: Final[dict[str, Any]] = {"sequence": "expressed", "num_zeros": 100}

POINTS: Final = (
    Point(name="13 M, ZeRO 1", encoder=STATE, zero={"stage": 1}, micro=2),
    Point(name="38 M, ZeRO 3", encoder=WIDE, zero={"stage": 3}),
    Point(name="38 M, ZeRO 0", encoder=WIDE, zero={"stage": 0}),
    Point(name="38 M, ZeRO 1", encoder=WIDE, zero={"stage": 1}),
    Point(name="38 M, ZeRO 2", encoder=WIDE, zero={"stage": 2}),
    Point(name="38 M, ZeRO 1, one rank", encoder=WIDE, zero={"stage": 1}, ranks=1),
    Point(name="38 M, ZeRO 2, offloaded", encoder=WIDE, zero={"stage": 2, **OFFLOAD}),
    Point(name="38 M, ZeRO 3, offloaded", encoder=WIDE, zero={"stage": 3, **OFFLOAD}),
    Point(name="38 M, ZeRO 0, bf16", encoder=WIDE, zero={"stage": 0}, precision="bf16"),
    Point(name="38 M, ZeRO 1, bf16", encoder=WIDE, zero={"stage": 1}, precision="bf16"),
    Point(name="38 M, ZeRO 3, bf16", encoder=WIDE, zero={"stage": 3}, precision="bf16"),
    Point(name="38 M, ZeRO 1, expressed genes", encoder={**WIDE, **SHORT}, zero={"stage": 1}),
    Point(name="10 M deep, ZeRO 1, 16 cells", encoder=DEEP, zero={"stage": 1}, micro=16),
    Point(
        name="10 M deep, ZeRO 1, 16 cells, checkpointing",
        encoder={**DEEP, "checkpointing": True},
        zero={"stage": 1},
        micro=16,
    ),
    Point(name="10 M deep, ZeRO 3, 24 cells", encoder=DEEP, zero={"stage": 3}, micro=24),
)


def estimated_bytes(point: Point, num_genes: int) -> float:
    """Bytes of a rank by the estimate; what is offloaded counts, too, as the host is a rank's."""
    total = point.micro * point.accumulation * point.ranks
    config = PretrainConfig(
        store="",
        output="",
        encoder=EncoderConfig(**point.encoder),
        batch=BatchConfig(global_size=total, micro_size=point.micro),
    )
    size = measure_size(config.encoder, num_genes)
    placement = Placement(
        ranks_per_node=point.ranks,
        stage=point.zero["stage"],
        offload="offload_optimizer" in point.zero,
        precision=point.precision,
        gloo=True,
    )
    kept = activation_bytes(config, size.tokens, point.precision)
    need = memory(config, size, placement, kept)
    return need.total + need.host
