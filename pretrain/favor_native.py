"""FAVOR+ attention by native CPU kernels.

bf16 inputs take `favor_native.cpp`, on x86-64 with AVX-512; float32 inputs `float32_attention.cpp`,
with AVX2 too. `unavailable` says why neither can run.
"""

import ctypes
from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain import float32_native
from pretrain.fused import empty_slices
from pretrain.native import Family, best_variant, load, missing, run

MAX_DIM = 512
"""Widest head; the kernel rounds a row of it on the stack."""
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
    """
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
    if q.device.type != "cpu":
        return f"it runs on the CPU, not on {q.device.type}"
    if q.shape[-1] > MAX_DIM:
        return f"heads are {q.shape[-1]} wide, {MAX_DIM} at most"
    return missing(_FAMILIES[q.dtype])


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Call(ctypes.Structure):
    """Mirrors `struct Call` of the source."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("directions", "offsets", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("divisors", "sums", "centers", "maxima")),
        *((name, ctypes.c_int64) for name in ("cells", "heads", "dim", "features", "threads")),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


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
        q, k, v = (_dense_rows(x) for x in (q, k, v))
        heads, dim = q.shape[1:]
        features, cells = len(projection), len(offsets) - 1
        directions = (projection.float() * dim**-0.25).contiguous()
        out = torch.empty(q.shape, dtype=torch.bfloat16)
        divisors = torch.empty(q.shape[:2])
        columns = (dim + 31) // 32 * 32, (features + 15) // 16 * 16
        sums = torch.empty(cells, heads, columns[0] + 1, columns[1])
        centers, maxima = torch.empty(cells, heads, columns[0]), torch.empty(cells, heads)
        saved = q, k, v, directions, offsets, query_offsets, divisors, sums, centers, maxima
        call = _call(saved, epsilon)
        call.out = _rows(out)
        run(load(variant).favor_forward, call)
        ctx.save_for_backward(*saved)
        ctx.epsilon, ctx.variant = epsilon, variant
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = _dense_rows(grad.to(torch.bfloat16))
        call = _call(saved, ctx.epsilon)
        gradients = empty_slices(*saved[:3])
        call.grad = _rows(grad)
        call.grad_q, call.grad_k, call.grad_v = (_rows(x) for x in gradients)
        run(load(ctx.variant).favor_backward, call)
        return *gradients, None, None, None, None, None


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _call(saved: tuple[Tensor, ...], epsilon: float) -> _Call:
    q, k, v, directions, offsets, query_offsets, divisors, sums, centers, maxima = saved
    return _Call(
        q=_rows(q),
        k=_rows(k),
        v=_rows(v),
        directions=directions.data_ptr(),
        offsets=offsets.data_ptr(),
        query_offsets=query_offsets.data_ptr(),
        divisors=divisors.data_ptr(),
        sums=sums.data_ptr(),
        centers=centers.data_ptr(),
        maxima=maxima.data_ptr(),
        cells=len(offsets) - 1,
        heads=q.shape[1],
        dim=q.shape[2],
        features=len(directions),
        threads=torch.get_num_threads(),
        epsilon=epsilon,
        scale=q.shape[2] ** -0.25,
    )
