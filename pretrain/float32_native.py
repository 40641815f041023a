"""Attention and feed-forward in float32 by native CPU kernels, for x86-64 with AVX2 or AVX-512.

`float32_attention.cpp` goes forward and backward, `float32_feed_forward.cpp` forward only: PyTorch
leaves little to gain in its backward pass. A row's result does not depend on its neighbours, and no
result on the number of threads.
"""

import ctypes
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain.fused import empty_slices
from pretrain.native import best_variant, load, missing, run


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
    settings = epsilon, offsets.contiguous(), query_offsets.contiguous()
    library = variant or best_variant("float32")
    attended: Tensor = _Float32Attention.apply(q, k, v, projection, *settings, library)
    return attended


class _Float32Attention(torch.autograd.Function):
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
        directions = (projection.float() * dim**-0.25).contiguous()
        out = torch.empty(q.shape)
        kept: tuple[Tensor, ...] = ()
        if any(ctx.needs_input_grad):
            cells = len(offsets) - 1
            width, features = (round_up(n) for n in (dim, len(directions)))
            sums = torch.empty(cells, heads, features, width + 1)
            kept = torch.empty(q.shape[:2]), sums, torch.empty(cells, heads)
        saved = q, k, v, out, directions, offsets, query_offsets, *kept
        run(load(variant).float32_forward, _call(saved, epsilon))
        ctx.save_for_backward(*saved)
        ctx.epsilon, ctx.variant = epsilon, variant
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        grad = _dense_rows(grad)
        call, gradients = _call(saved, ctx.epsilon), empty_slices(*saved[:3])
        call.grad = _rows(grad)
        call.grad_q, call.grad_k, call.grad_v = (_rows(x) for x in gradients)
        run(load(ctx.variant).float32_backward, call)
        return *gradients, None, None, None, None, None


def feeds(x: Tensor, *weights: Tensor) -> bool:
    """Whether `feed_forward` can take a float32 layer here: on the CPU, without gradients."""
    if any(weight.dtype != torch.float32 for weight in (x, *weights)) or x.device.type != "cpu":
        return False
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights))
    return not wanted and missing("float32") is None


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
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("directions", "offsets", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("divisors", "sums", "maxima")),
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


def round_up(n: int) -> int:
    """Fill up to whole vectors of any build."""
    return (n + 15) // 16 * 16


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Any:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1))


def _call(saved: tuple[Tensor, ...], epsilon: float) -> _Attention:
    q, k, v, out, directions, offsets, query_offsets, *kept = saved
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
        scale=q.shape[2] ** -0.25,
    )
    for name, tensor in zip(("divisors", "sums", "maxima"), kept, strict=False):
        setattr(call, name, tensor.data_ptr())
    return call
