"""Attention and feed-forward in float32 by a native CPU kernel, `float32_native.cpp`.

For what needs no gradients on x86-64 with AVX2 or AVX-512: labelling and embedding cells. A row's
result does not depend on its neighbours, and no result on the number of threads.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn

from pretrain.native import best_variant, load, missing, run


def unavailable(*tensors: Tensor) -> str | None:
    """Why the kernels cannot take these float32 tensors here, or None if they can."""
    if tensors[0].device.type != "cpu":
        return f"it runs on the CPU, not on {tensors[0].device.type}"
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        return "in float32 it gives no gradients"
    return missing("float32")


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    epsilon: float,
    offsets: Tensor,
    query_offsets: Tensor,
    variant: str | None = None,
) -> Tensor:
    """Attend within packed cells, (Q, H, d) float32; see `favor_native.native_attention`."""
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    scale = q.shape[2] ** -0.25
    directions = (projection.detach().float() * scale).contiguous()
    offsets, query_offsets = offsets.contiguous(), query_offsets.contiguous()
    out = torch.empty(q.shape)
    call = _Attention(
        **{name: _rows(x) for name, x in (("q", q), ("k", k), ("v", v), ("out", out))},
        directions=directions.data_ptr(),
        offsets=offsets.data_ptr(),
        query_offsets=query_offsets.data_ptr(),
        cells=len(offsets) - 1,
        heads=q.shape[1],
        dim=q.shape[2],
        features=len(directions),
        threads=torch.get_num_threads(),
        epsilon=epsilon,
        scale=scale,
    )
    run(load(variant or best_variant("float32")).float32_attention, call)
    return out


def feed_forward(
    x: Tensor, norm: nn.LayerNorm, inner: nn.Linear, outer: nn.Linear, variant: str | None = None
) -> Tensor:
    """Compute x + outer(gelu(inner(norm(x)))) of rows, (n, D) float32."""
    names = "x", "gamma", "beta", "w1", "b1", "w2", "b2"
    tensors = x, norm.weight, norm.bias, inner.weight, inner.bias, outer.weight, outer.bias
    held = [tensor.detach().contiguous() for tensor in tensors]
    out = torch.empty_like(held[0])
    call = _FeedForward(
        **{name: tensor.data_ptr() for name, tensor in zip(names, held, strict=True)},
        out=out.data_ptr(),
        rows=len(x),
        width=x.shape[1],
        hidden=len(inner.weight),
        threads=torch.get_num_threads(),
        epsilon=norm.eps,
    )
    run(load(variant or best_variant("float32")).float32_feed_forward, call)
    return out


class _Rows(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class _Attention(ctypes.Structure):
    """Mirrors `struct Attention` of the source."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_void_p) for name in ("directions", "offsets", "query_offsets")),
        *((name, ctypes.c_int64) for name in ("cells", "heads", "dim", "features", "threads")),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]


class _FeedForward(ctypes.Structure):
    """Mirrors `struct FeedForward` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "gamma", "beta", "w1", "b1", "w2", "b2")),
        ("out", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("rows", "width", "hidden", "threads")),
        ("epsilon", ctypes.c_double),
    ]


def _rows(x: Tensor) -> Any:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1))
