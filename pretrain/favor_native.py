"""FAVOR+ attention by native CPU kernels.

bf16 inputs take `favor_native.cpp`, on x86-64 with AVX-512; float32 inputs `float32_attention.cpp`,
with AVX2 too. `unavailable` says why neither can run.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import float32_native
from pretrain.native import Family, best_variant, load, missing, run
from pretrain.native_calls import (
    as_rows,
    attention_call,
    attention_gradients,
    check_native_attention,
    scaled,
)

MAX_DIM = 512
"""Widest head; what a worker keeps outgrows the second cache long before."""
_FAMILIES: Final[Mapping[torch.dtype, Family]] = {
    torch.bfloat16: "bf16",
    torch.float32: "float32",
}


def native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    epsilon: float,
    offsets: Tensor,
    query_offsets: Tensor,
    variant: str | None = None,
) -> Tensor:
    """Attend within packed cells; see `pretrain.favor.favor_attention`.

    The result does not depend on the number of threads (`torch.get_num_threads`).

    Args:
        q: Queries, bf16 or float32 on the CPU, (Q, H, d); as `k` and `v`, of any strides but the
            last.
        k: Keys, (tokens, H, d).
        v: Values, (tokens, H, d).
        projection: Random directions, (m, d).
        epsilon: Added to each feature.
        offsets: First token of each cell, and their number, int64 (B + 1,), already checked.
        query_offsets: The same for the queries.
        variant: A key of `pretrain.native.VARIANTS`; by default the fastest this machine has.

    Returns:
        Attended values, (Q, H, d), of the same type.

    Raises:
        ValueError: If a tensor is not on the CPU, or types, shapes or epsilon do not fit.
    """
    check_native_attention(q, k, v, projection, epsilon, offsets, query_offsets)
    if q.dtype == torch.float32:
        return float32_native.attend(q, k, v, projection, epsilon, offsets, query_offsets, variant)
    variant = variant or best_variant()
    attended: Tensor = _NativeAttention.apply(
        q, k, v, projection, epsilon, offsets.contiguous(), query_offsets.contiguous(), variant
    )
    return attended


def unavailable(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the kernel cannot attend to these tensors here, or None if it can."""
    if q.dtype not in _FAMILIES or not q.dtype == k.dtype == v.dtype:
        return f"it takes bfloat16 or float32, not {str(q.dtype).removeprefix('torch.')}"
    elsewhere = {x.device.type for x in (q, k, v)} - {"cpu"}
    if elsewhere:
        return f"it runs on the CPU, not on {min(elsewhere)}"
    if q.shape[-1] > MAX_DIM:
        return f"heads are {q.shape[-1]} wide, {MAX_DIM} at most"
    return missing(_FAMILIES[q.dtype])


class _NativeAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        epsilon: float,
        offsets: Tensor,
        query_offsets: Tensor,
        variant: str,
    ) -> Tensor:
        q, k, v = (as_rows(x) for x in (q, k, v))
        inputs = q, k, v, scaled(projection), offsets, query_offsets
        cells, heads, dim = len(offsets) - 1, *q.shape[1:]
        out = torch.empty(q.shape, dtype=torch.bfloat16)
        columns = (dim + 31) // 32 * 32, (len(projection) + 15) // 16 * 16
        kept = {
            "divisors": torch.empty(q.shape[:2]),
            "sums": torch.empty(cells, heads, columns[0] + 1, columns[1]),
            "centers": torch.empty(cells, heads, columns[0]),
            "maxima": torch.empty(cells, heads),
        }
        call = attention_call(inputs, epsilon)
        call.give(out=out, **kept)
        run(load(variant).favor_forward, call)
        ctx.save_for_backward(*inputs, *kept.values())
        ctx.epsilon, ctx.variant, ctx.kept = epsilon, variant, tuple(kept)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing, each look computes them again
        call = attention_call(saved[:6], ctx.epsilon)
        call.give(**dict(zip(ctx.kept, saved[6:], strict=True)))
        gradients = attention_gradients(load(ctx.variant).favor_backward, call, grad, saved[:3])
        return *gradients, None, None, None, None, None
