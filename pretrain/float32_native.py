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

from pretrain.native import best_variant, load, missing, run
from pretrain.native_calls import (
    as_rows,
    attention_call,
    attention_gradients,
    check_feed_forward,
    scaled,
)


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
    """Attend within packed cells, (Q, H, d) float32; `favor_native.native_attention` checks it."""
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
        q, k, v = (as_rows(x) for x in (q, k, v))
        inputs = q, k, v, scaled(projection), offsets, query_offsets
        kept = {"out": torch.empty(q.shape)}
        if any(ctx.needs_input_grad):
            cells, heads, dim = len(offsets) - 1, *q.shape[1:]
            width, features = (round_up(n) for n in (dim, len(projection)))
            kept["divisors"] = torch.empty(q.shape[:2])
            kept["sums"] = torch.empty(cells, heads, features, width + 1)
            kept["maxima"] = torch.empty(cells, heads)
        call = attention_call(inputs, epsilon)
        call.give(**kept)
        run(load(variant).float32_forward, call)
        ctx.save_for_backward(*inputs, *kept.values())
        ctx.epsilon, ctx.variant, ctx.kept = epsilon, variant, tuple(kept)
        return kept["out"]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # once: under checkpointing, each look computes them again
        call = attention_call(saved[:6], ctx.epsilon)
        call.give(**dict(zip(ctx.kept, saved[6:], strict=True)))
        gradients = attention_gradients(load(ctx.variant).float32_backward, call, grad, saved[:3])
        return *gradients, None, None, None, None, None


def feeds(x: Tensor, *weights: Tensor) -> bool:
    """Whether `feed_forward` can take a float32 layer here: on the CPU, without gradients."""
    tensors = (x, *weights)
    if any(each.dtype != torch.float32 or each.device.type != "cpu" for each in tensors):
        return False
    wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
    return not wanted and missing("float32") is None


def feed_forward(
    x: Tensor, norm: nn.LayerNorm, inner: nn.Linear, outer: nn.Linear, variant: str | None = None
) -> Tensor:
    """Compute x + outer(gelu(inner(norm(x)))) of rows, (n, D) or (B, n, D) float32.

    Raises:
        ValueError: If a tensor is not float32 on the CPU, is missing, or shapes do not fit.
    """
    check_feed_forward(x, norm, inner, outer)
    names = "x", "gamma", "beta", "w1", "b1", "w2", "b2"
    tensors = x, norm.weight, norm.bias, inner.weight, inner.bias, outer.weight, outer.bias
    if any(tensor.dtype != torch.float32 for tensor in tensors):
        raise ValueError("the float32 feed-forward takes rows and weights of float32 alone")
    held = [tensor.detach().contiguous() for tensor in tensors]
    out = torch.empty_like(held[0])
    call = _FeedForward(
        **{name: tensor.data_ptr() for name, tensor in zip(names, held, strict=True)},
        out=out.data_ptr(),
        rows=x.shape[:-1].numel(),
        width=x.shape[-1],
        hidden=len(inner.weight),
        threads=torch.get_num_threads(),
        epsilon=norm.eps,
    )
    run(load(variant or best_variant("float32")).float32_feed_forward, call)
    return out


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
