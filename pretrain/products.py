"""Linear maps in bf16 on CPUs that cannot multiply bf16.

Without AVX-512 torch multiplies bf16 element by element, some 200 times slower than float32. There
a product is made in float32 and rounded once, which is also what the faster CPUs compute.
"""

import functools
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


@functools.cache
def multiplies_bf16() -> bool:
    """Whether this CPU has fast products of bf16."""
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute x Wᵀ + b, as `torch.nn.functional.linear` does.

    Args:
        x: Rows, (..., K).
        weight: (N, K).
        bias: (N,).

    Returns:
        (..., N); in bf16 if `x` is, or under autocast to it.
    """
    if not _is_slow(x):
        return nn.functional.linear(x, weight, bias)
    with torch.autocast("cpu", enabled=False):
        product: Tensor = _WideLinear.apply(x, weight, bias)
    return product


class _WideLinear(torch.autograd.Function):
    """Products in float32, of tensors that are kept as they came."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        wide = None if bias is None else bias.float()
        return nn.functional.linear(x.float(), weight.float(), wide).bfloat16()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        grad, rows = grad.flatten(0, -2).float(), x.flatten(0, -2).float()
        grad_x = (grad @ weight.float()).to(x.dtype).view(x.shape)
        grad_bias = None if bias is None else grad.sum(0).to(bias.dtype)
        return grad_x, (grad.t() @ rows).to(weight.dtype), grad_bias


def _is_slow(x: Tensor) -> bool:
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    narrow = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
    return narrow == torch.bfloat16 and not multiplies_bf16()
