"""Feed-forward with its norm and residual by native CPU kernels.

`feed_forward_native.cpp` takes bf16; `float32_feed_forward.cpp` float32, forward only. They go over
the rows once. What lies between (normalized rows, hidden units before and after GELU) is never
written and is computed again in the backward pass: only the input is kept for it.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pretrain import float32_native
from pretrain.native import best_variant, load, missing, run
from pretrain.native_calls import check_feed_forward

KERNELS = ("auto", "native")
"""Words of `encoder.kernel` that allow these kernels."""


def usable(x: Tensor, kernel: str, *weights: Tensor) -> bool:
    """Whether the kernels can take a layer's input and weights here.

    They take bf16 on the CPU; under autocast to bf16 float32 too, of which products are rounded;
    and float32 where no gradients are asked for.
    """
    if kernel not in KERNELS or torch.compiler.is_compiling():
        return False
    if any(tensor.device.type != "cpu" for tensor in (x, *weights)):
        return False
    narrow = torch.bfloat16
    if not torch.is_autocast_enabled("cpu") and x.dtype == torch.float32:
        return float32_native.feeds(x, *weights)
    if torch.is_autocast_enabled("cpu"):
        if torch.get_autocast_dtype("cpu") != narrow:
            return False
        allowed: tuple[torch.dtype, ...] = (narrow, torch.float32)
    else:
        allowed = (narrow,)
    return all(tensor.dtype in allowed for tensor in (x, *weights)) and missing() is None


def native_feed_forward(
    x: Tensor, norm: nn.LayerNorm, inner: nn.Linear, outer: nn.Linear, variant: str | None = None
) -> Tensor:
    """Compute x + outer(gelu(inner(norm(x)))).

    The result does not depend on the number of threads (`torch.get_num_threads`). Float32 layers of
    which `float32_native.feeds` does not hold, as those with gradients, are computed by PyTorch.

    Args:
        x: Rows, bf16 or float32 on the CPU, (n, D) or (B, n, D).
        norm: Over D.
        inner: D to H units, with a bias.
        outer: H units to D, with a bias.
        variant: A key of `pretrain.native.VARIANTS`; by default the fastest this machine has.

    Returns:
        As `x`.

    Raises:
        ValueError: If a tensor is not on the CPU, is missing, or types or shapes do not fit.
    """
    check_feed_forward(x, norm, inner, outer)
    parameters = norm.weight, norm.bias, inner.weight, inner.bias, outer.weight, outer.bias
    if x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu"):
        if float32_native.feeds(x, *parameters):
            return float32_native.feed_forward(x, norm, inner, outer, variant)
        plain: Tensor = x + outer(nn.functional.gelu(inner(norm(x))))
        return plain
    rows = x.reshape(-1, x.shape[-1])
    out: Tensor = _FeedForward.apply(rows, norm.eps, variant or best_variant(), *parameters)
    return out.view(x.shape)


class _Call(ctypes.Structure):
    """Mirrors `struct FeedForward` of the source."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "grad", "out", "grad_x")),
        *((name, ctypes.c_void_p) for name in ("gamma", "beta", "b1", "b2", "w1", "w2")),
        *((name, ctypes.c_void_p) for name in ("grad_gamma", "grad_beta", "grad_b1", "grad_b2")),
        *((name, ctypes.c_void_p) for name in ("grad_w1", "grad_w2")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "hidden", "threads", "wide")),
        ("epsilon", ctypes.c_double),
    ]


_NAMES = "gamma", "beta", "w1", "b1", "w2", "b2"


class _FeedForward(torch.autograd.Function):
    """Takes weight and bias of the norm, of the inner map and of the outer one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, epsilon: float, variant: str, *parameters: Tensor) -> Tensor:
        x = x.contiguous()
        out = torch.empty_like(x)
        call, held = _call(x, epsilon, parameters)
        call.out = out.data_ptr()
        run(load(variant).feed_forward_forward, call)
        del held
        ctx.save_for_backward(x, *parameters)
        ctx.epsilon, ctx.variant = epsilon, variant
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        call, held = _call(x, ctx.epsilon, parameters)
        grad, grad_x = grad.contiguous(), torch.empty_like(x)
        gradients = [torch.empty_like(weight) for weight in held]
        call.grad, call.grad_x = grad.data_ptr(), grad_x.data_ptr()
        for name, gradient in zip(_NAMES, gradients, strict=True):
            setattr(call, f"grad_{name}", gradient.data_ptr())
        run(load(ctx.variant).feed_forward_backward, call)
        cast = (a.to(weight.dtype) for a, weight in zip(gradients, parameters, strict=True))
        return grad_x, None, None, *cast


def _call(x: Tensor, epsilon: float, parameters: Sequence[Tensor]) -> tuple[_Call, list[Tensor]]:
    """Describe a call; the weights as the kernel takes them must outlive it."""
    call = _Call(
        x=x.data_ptr(),
        rows=len(x),
        width=x.shape[1],
        hidden=len(parameters[2]),
        threads=torch.get_num_threads(),
        wide=x.dtype == torch.float32,
        epsilon=epsilon,
    )
    held = []
    for name, weight in zip(_NAMES, parameters, strict=True):
        dtype = torch.bfloat16 if name in ("w1", "w2") else torch.float32
        held.append(weight.detach().to(dtype).contiguous())
        setattr(call, name, held[-1].data_ptr())
    return call, held
