"""What DeepSpeed holds in memory on a rank, moment by moment of a step, for each ZeRO stage.

Read in the sources of DeepSpeed 0.19 (zero/stage_1_and_2.py, zero/stage3.py, engine.py): a rank is
fullest when activations are there, or when gradients are reduced, or when weights are updated or
gathered again, and what each of these moments needs is freed before the next one.
"""

from dataclasses import dataclass
from typing import Final, Literal

Precision = Literal["fp32", "bf16"]
CPU_PROCESS_BYTES: Final = 150e6
"""What a CPU rank holds besides, above its first imports: some 1,400 modules that DeepSpeed imports
when it starts (118 MB), kernels, the loader's arenas. Measured once."""
BUCKET: Final = 500_000_000
"""DeepSpeed's default `reduce_bucket_size`, elements."""
PERSISTENT: Final = 100_000
"""Its default `stage3_param_persistence_threshold`, elements."""
LIVE: Final = 1_000_000_000
"""Its default `stage3_max_live_parameters`: that many gathered weights stay until backward."""
PREFETCH: Final = 50_000_000
"""Its default `stage3_prefetch_bucket_size`: weights gathered in one message, of which each weight
then takes a copy."""


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Over how many ranks and how the state is cut."""

    nodes: int = 1
    ranks_per_node: int = 1
    stage: int = 1
    offload: bool = False
    """Optimizer state and update on the host."""
    precision: Precision = "fp32"
    gloo: bool = False
    """CPU ranks: no reduce-scatter, and messages are staged in memory."""

    def __post_init__(self) -> None:
        if self.nodes < 1 or self.ranks_per_node < 1:
            raise ValueError(
                f"nodes is {self.nodes} and gpus_per_node {self.ranks_per_node}; give 1 or more"
            )

    @property
    def world_size(self) -> int:
        """Ranks in all."""
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Elements of a model, and what one cell costs."""

    trained: int
    frozen: int
    largest: int
    """Elements of the largest parameter, which ZeRO 3 has whole for a moment."""
    small: int
    """Elements of parameters up to `PERSISTENT`, which ZeRO 3 keeps whole."""
    buffer_bytes: int
    tokens: float
    """Positions per cell."""
    flops: float
    """Of a forward pass of one cell."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one rank at the fullest moment of a step."""

    parameters: float
    gradients: float
    optimizer: float
    activations: float
    buffers: float
    host: float = 0.0
    """In the host's memory, by offloading."""

    @property
    def total(self) -> float:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.buffers


def at_fullest(
    size: ModelSize, placement: Placement, activations: float, *, several: bool
) -> Memory:
    """Find the fullest moment of a step.

    Args:
        size: Of the model.
        placement: How it is cut.
        activations: Bytes that a micro-batch keeps for its backward pass.
        several: Whether a step has several micro-batches, so that gradients wait meanwhile.
    """
    width = 2 if placement.precision == "bf16" else 4
    stage, ranks = placement.stage, placement.world_size
    parameters = float(width * (size.trained + size.frozen) / (ranks if stage == 3 else 1))
    state = _optimizer_bytes(size, placement)
    moments = _MOMENTS[stage](size, placement, activations, several)
    host = 0.0
    if placement.offload:
        # Master weights, moments and their gradient; a copy in the weights' type on the way to the
        # device or back; gradients of earlier micro-batches.
        own = size.trained / ranks
        host = (12 + 4) * own + width * own * (1 + (several and stage < 3))
        adam = 8 * own
        if placement.gloo:  # in the same memory, when activations and messages are gone
            moments = [*moments, (0.0, 0.0, adam)]
        else:
            host += adam
    gradients, kept, buffers = max(moments, key=sum)
    always = size.buffer_bytes + (CPU_PROCESS_BYTES if placement.gloo else 0.0)
    return Memory(
        parameters=parameters,
        gradients=gradients,
        optimizer=0.0 if placement.offload else state,
        activations=kept,
        buffers=buffers + always,
        host=host,
    )


def _optimizer_bytes(size: ModelSize, placement: Placement) -> float:
    """Float32 weights and both moments, where they are not the model's own weights."""
    # In fp32 without ZeRO Adam works on the weights themselves.
    own_weights = placement.precision == "fp32" and placement.stage == 0
    each = 8.0 if own_weights else 12.0
    return each * size.trained / (placement.world_size if placement.stage else 1)


Moments = list[tuple[float, float, float]]
"""Bytes of gradients, activations and buffers at each moment."""


def _adam(elements: float, placement: Placement) -> float:
    """Temporaries of PyTorch's AdamW: a square root, and on the CPU its quotient besides."""
    return (8.0 if placement.gloo else 4.0) * elements


def _moments_without_zero(
    size: ModelSize, placement: Placement, activations: float, several: bool
) -> Moments:
    width = 2 if placement.precision == "bf16" else 4
    gradient = float(width * size.trained)
    reduced = width * float(min(BUCKET, size.trained)) * (placement.world_size > 1)
    wide = 4.0 * size.trained * (placement.precision == "bf16")
    # One tensor after the other on the CPU, all at once on a GPU.
    at_once = size.largest if placement.gloo else size.trained
    return [
        (gradient * several, activations, 0.0),
        (gradient, 0.0, reduced),
        (gradient, 0.0, wide + _adam(at_once, placement)),
    ]


def _moments_of_cut_optimizer(
    size: ModelSize, placement: Placement, activations: float, several: bool
) -> Moments:
    """ZeRO 1 and 2: a bucket takes the gradients, is flattened anew by rank, and averaged."""
    width = 2 if placement.precision == "bf16" else 4
    several_ranks = placement.world_size > 1
    whole, own = float(width * size.trained), size.trained / placement.world_size
    bucket = width * float(min(BUCKET, size.trained))
    reserved = 0.0 if placement.gloo else width * BUCKET - bucket  # all of it at once on a GPU
    waiting = (whole if placement.stage == 1 else width * own) * several
    flattened = bucket * several_ranks
    copied = 0.0 if placement.offload else width * own
    wide = 4.0 * own if placement.precision == "bf16" else 0.0
    if placement.stage == 1:  # the bucket takes the place of the gradients
        reduce = (whole, 0.0, reserved + max(flattened, copied))
    else:
        reduce = (waiting, 0.0, reserved + bucket + max(flattened, copied))
    moments = [(waiting, activations, reserved + bucket * (not placement.gloo)), reduce]
    if not placement.offload:
        moments += [
            (width * own, 0.0, width * own + wide),
            (0.0, 0.0, 4 * own + _adam(own, placement)),
        ]
    return [*moments, (0.0, 0.0, whole * (placement.gloo and several_ranks))]


def _moments_of_cut_weights(
    size: ModelSize, placement: Placement, activations: float, several: bool
) -> Moments:
    """ZeRO 3: the bucket stays, gathered weights stay from forward to backward."""
    width = 2 if placement.precision == "bf16" else 4
    several_ranks = placement.world_size > 1
    own = size.trained / placement.world_size
    waiting = 0.0 if placement.offload else width * own
    touched = width * float(min(BUCKET, size.trained))
    bucket = touched if placement.gloo else float(width * BUCKET)
    live = width * max(size.largest, min(LIVE, size.trained + size.frozen)) * several_ranks
    message = width * min(PREFETCH, size.trained + size.frozen) * several_ranks
    small = width * size.small * several_ranks
    wide = 4.0 * own if placement.precision == "bf16" else 0.0
    updated = 0.0 if placement.offload else width * own + wide + _adam(own, placement)
    return [
        (waiting, activations, bucket + live + message),
        (waiting, 0.0, bucket + small + touched * several_ranks),
        (waiting, 0.0, bucket + small + updated),
    ]


_MOMENTS: Final = {
    0: _moments_without_zero,
    1: _moments_of_cut_optimizer,
    2: _moments_of_cut_optimizer,
    3: _moments_of_cut_weights,
}
