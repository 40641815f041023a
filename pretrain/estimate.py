"""Memory, speed and traffic of a pretraining before it is queued.

Counted: parameters, from the model built without storage; what a forward pass keeps for the
backward pass, from the autograd graph of small models of the same shape (it grows linearly in
tokens and blocks); floating-point operations, from the shapes; bytes on the wire, from what each
ZeRO stage reduces and gathers (Rajbhandari et al. 2020, section 7). Assumed: the share of a
device's peak that is reached, see `Device`. `benchmarks/scaling.py` compares with measured runs.
"""

import time
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from datastore.config import BinningConfig
from datastore.randomness import derive_key
from pretrain.config import EncoderConfig, MaskingConfig, PretrainConfig
from pretrain.encoder import ExpressionEncoder, build_encoder
from pretrain.memory_moments import (
    PERSISTENT,
    Memory,
    ModelSize,
    Placement,
    Precision,
    at_fullest,
)
from pretrain.objective import MaskedGeneModel

EXPRESSED_SHARE: Final = 0.053
"""Share of a PanglaoDB cell's genes that are expressed (about 900 of 16,906)."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """What one rank computes on; per second, bytes and floating-point operations."""

    memory: float
    """Bytes a rank may use."""
    flops: dict[Precision, float]
    """Peak of dense matrix products."""
    bandwidth: float
    """Peak of its memory."""
    network: float
    """Bytes that a rank sends between nodes, per second."""
    link: float
    """Bytes that a rank sends within a node, per second."""
    reached: float = 0.35
    """Assumed share of both peaks that training reaches; none of them was measured here."""


DEVICES: Final = {
    "h100": Device(
        memory=80e9,
        flops={"fp32": 495e12, "bf16": 989e12},
        bandwidth=3.35e12,
        network=50e9,
        link=450e9,
    ),
    "a100": Device(
        memory=80e9,
        flops={"fp32": 156e12, "bf16": 312e12},
        bandwidth=2.0e12,
        network=25e9,
        link=300e9,
    ),
}
"""Data sheets: SXM, 80 GB; fp32 by TF32. Network: 400 and 200 Gbit/s for each GPU."""


def measure_size(
    config: EncoderConfig,
    num_genes: int,
    model: nn.Module | None = None,
    masking: MaskingConfig | None = None,
) -> ModelSize:
    """Count a model's elements without making room for them, and a cell's operations.

    Args:
        config: Shape of the encoder.
        num_genes: Length of the panel, G.
        model: Model to count, if there is one already.
        masking: Says how many zeros come back in as targets; none takes none.
    """
    counted = model if model is not None else _on_meta(config, num_genes)
    sizes = [(p.numel(), p.requires_grad) for p in counted.parameters()]
    tokens = tokens_per_cell(config, num_genes, masking)
    return ModelSize(
        trained=sum(numel for numel, trained in sizes if trained),
        frozen=sum(numel for numel, trained in sizes if not trained),
        largest=max(numel for numel, _ in sizes),
        small=sum(numel for numel, _ in sizes if numel <= PERSISTENT),
        buffer_bytes=config.depth * config.features * config.dim_head * 4,
        tokens=tokens,
        flops=config.depth * tokens * flops_per_token(config),
    )


def tokens_per_cell(
    config: EncoderConfig, num_genes: int, masking: MaskingConfig | None = None
) -> float:
    """Positions that the encoder sees of a cell, the constant one included."""
    if config.sequence == "full":
        return num_genes + 1
    hidden_zeros = 0.0 if masking is None else masking.ratio * masking.zeros
    return EXPRESSED_SHARE * num_genes * (1 + hidden_zeros) + config.num_zeros + 1


def flops_per_token(config: EncoderConfig) -> float:
    """Floating-point operations of one block for one token, forward; a multiply-add is two."""
    inner = config.heads * config.dim_head
    linear = 4 * config.dim * inner + 2 * config.ff_mult * config.dim**2
    attention = 4 * inner * config.features  # features of q and k, context, attended values
    return 2.0 * (linear + attention)


def training_flops(config: EncoderConfig, size: ModelSize) -> float:
    """Operations of forward and backward for one cell; checkpointing computes forward twice."""
    return size.flops * (4 if config.checkpointing else 3)


def _on_meta(config: EncoderConfig, num_genes: int) -> nn.Module:
    with torch.device("meta"):
        return MaskedGeneModel(ExpressionEncoder(config, BinningConfig(), num_genes))


def activation_bytes(config: PretrainConfig, tokens: float, precision: Precision) -> float:
    """Bytes that the forward pass of one cell keeps for the backward pass.

    Measured on models of one and two blocks over two short sequences; what they keep is linear in
    both, so four measurements give the rest.
    """
    short, long = 64, 192
    at = {
        (depth, length): _kept_bytes(config, depth, length, precision)
        for depth in (1, 2)
        for length in (short, long)
    }

    def along_tokens(depth: int) -> float:
        slope = (at[depth, long] - at[depth, short]) / (long - short)
        return at[depth, short] + slope * (tokens + 1 - short)

    block = along_tokens(2) - along_tokens(1)
    kept = along_tokens(1) + (config.encoder.depth - 1) * block
    if config.encoder.checkpointing:
        plain = replace(config, encoder=replace(config.encoder, checkpointing=False, depth=2))
        one = replace(plain, encoder=replace(plain.encoder, depth=1))
        kept += activation_bytes(plain, tokens, precision) - activation_bytes(
            one, tokens, precision
        )
    return kept


def _kept_bytes(config: PretrainConfig, depth: int, length: int, precision: Precision) -> float:
    """Bytes of the tensors that autograd keeps of a cell of so many genes, besides weights."""
    encoder = replace(config.encoder, depth=depth, sequence="full", num_zeros=0)
    model = _small_model(replace(config, encoder=encoder), length)
    if precision == "bf16":
        model = model.to(torch.bfloat16)
    # What two cells keep more than one does: some is kept once for all, see `_joined_bytes`.
    one, two = (_kept_by(model, _one_cell(config, length, cells)) for cells in (1, 2))
    return two - one


def _kept_by(model: MaskedGeneModel, cells: tuple[Tensor, ...]) -> float:
    weights = {w.untyped_storage().data_ptr() for w in [*model.parameters(), *model.buffers()]}
    kept: dict[int, int] = {}
    alive: list[Tensor] = []

    def keep(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
            alive.append(value)
        return value

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda value: value):
        loss = model(*cells).loss
    assert loss.requires_grad
    return float(sum(kept.values()))


def _small_model(config: PretrainConfig, num_genes: int) -> MaskedGeneModel:
    encoder = build_encoder(config.encoder, config.binning, num_genes, seed=0)
    return MaskedGeneModel(encoder)


def _one_cell(config: PretrainConfig, num_genes: int, cells: int = 1) -> tuple[Tensor, ...]:
    """Made-up inputs, positions to read and targets of some cells."""
    generator = torch.Generator().manual_seed(derive_key(0, "estimate") >> 1)
    inputs = torch.randint(0, config.binning.num_tokens, (cells, num_genes), generator=generator)
    expressed_targets = num_genes * EXPRESSED_SHARE * config.masking.ratio
    num_targets = max(1, int(expressed_targets * (1 + config.masking.zeros)))
    starts = torch.arange(cells)[:, None] * (num_genes + 1)
    read = (starts + torch.arange(num_targets)).flatten()
    targets = torch.randint(0, config.binning.top_bin + 1, (len(read),), generator=generator)
    return inputs.to(torch.uint8), read, targets


def memory(
    config: PretrainConfig, size: ModelSize, placement: Placement, kept_per_cell: float
) -> Memory:
    """Bytes on each rank at the fullest moment of a step, by part; see `memory_moments`.

    Args:
        config: The training.
        size: Of its model.
        placement: How it is cut.
        kept_per_cell: What `activation_bytes` found.
    """
    several = config.batch.accumulation_steps(placement.world_size) > 1
    activations = config.batch.micro_size * _cell_bytes(config, size, placement, kept_per_cell)
    activations += _joined_bytes(config, placement)
    return at_fullest(size, placement, activations, several=several)


def _joined_bytes(config: PretrainConfig, placement: Placement) -> float:
    """Weights of queries, keys and values, side by side for their one product in each block."""
    width, of = 2 if placement.precision == "bf16" else 4, config.encoder
    return width * (1 if of.checkpointing else of.depth) * 3.0 * of.dim * of.heads * of.dim_head


def _cell_bytes(
    config: PretrainConfig, size: ModelSize, placement: Placement, kept: float
) -> float:
    """What one cell keeps for the backward pass, and what a block works on meanwhile."""
    width = 2 if placement.precision == "bf16" else 4
    hidden = config.encoder.ff_mult * config.encoder.dim
    return kept + width * size.tokens * (2 * hidden + 2 * config.encoder.dim)


def largest_micro_batch(
    config: PretrainConfig, size: ModelSize, placement: Placement, kept: float, limit: float
) -> int:
    """Cells per forward pass that fit into `limit` bytes; 0 if not even one does."""
    each = _cell_bytes(config, size, placement, kept)
    joined = _joined_bytes(config, placement)

    def is_too_much(cells: int) -> bool:
        return at_fullest(size, placement, joined + cells * each, several=True).total > limit

    return bisect_left(range(1, int(limit // each) + 2), True, key=is_too_much)


def bytes_per_step(config: PretrainConfig, size: ModelSize, placement: Placement) -> float:
    """Bytes that each rank sends in one optimizer step, by rings.

    ZeRO 0 all-reduces the gradient once a step, ZeRO 1 reduces it and gathers the weights. ZeRO 3
    gathers the weights for each forward and each backward pass; it and ZeRO 2 reduce after each
    micro-batch. Where there is no reduce-scatter (gloo), ZeRO 1 and 2 all-reduce, twice the bytes.
    """
    ranks = placement.world_size
    if ranks == 1:
        return 0.0
    width = 2 if placement.precision == "bf16" else 4
    around = (ranks - 1) / ranks
    micro = config.batch.accumulation_steps(ranks)
    gradient, weights = width * size.trained, width * (size.trained + size.frozen)
    reduced = gradient * (2 if placement.gloo else 1)
    if placement.stage == 0:
        return around * 2 * gradient
    if placement.stage == 1:
        return around * (reduced + gradient)
    if placement.stage == 2:
        return around * (micro * reduced + gradient)
    return around * micro * (2 * weights + gradient)


def seconds_per_cell(
    config: PretrainConfig, size: ModelSize, kept: float, device: Device, precision: Precision
) -> float:
    """Roofline: products at the reached share of the peak, or activations through memory."""
    compute = training_flops(config.encoder, size) / device.flops[precision]
    traffic = 4 * kept / device.bandwidth  # written and read, forward and backward
    return max(compute, traffic) / device.reached


def calibrate(config: PretrainConfig, num_genes: int, cells: int, repeats: int = 3) -> float:
    """CPU seconds per cell, forward and backward and update, of a rank with one thread here.

    The median of `repeats` after one to warm up, in process time, which a busy machine hardly
    changes.
    """
    model = _small_model(config, num_genes)
    optimizer = torch.optim.AdamW([w for w in model.parameters() if w.requires_grad])
    inputs = _one_cell(config, num_genes, cells)
    threads, times = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        for _ in range(repeats + 1):
            start = time.process_time()
            optimizer.zero_grad()
            model(*inputs).loss.backward()
            optimizer.step()
            times.append(time.process_time() - start)
    finally:
        torch.set_num_threads(threads)
    return sorted(times[1:])[repeats // 2] / cells


def precision_of(deepspeed: dict[str, Any]) -> Precision:
    """Read the precision off a checked DeepSpeed JSON."""
    return "bf16" if deepspeed.get("bf16", {}).get("enabled") else "fp32"
