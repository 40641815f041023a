"""Gradients that are sums over all tokens, added up in float32.

In bf16 PyTorch adds them up in bf16 on the CPU, where a sum of 16,907 numbers stops growing once it
is 256 times the next: gradients of LayerNorm's bias were found to be off by 84 %, those of an
embedding's rows by 29 %.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class TokenNorm(nn.LayerNorm):
    """LayerNorm over the width of each token, (..., D)."""

    def forward(self, x: Tensor) -> Tensor:
        """Normalize; the same numbers as `nn.LayerNorm`'s."""
        if not _adds_in_bf16(x):
            return super().forward(x)
        normalized: Tensor = _LayerNorm.apply(x, self.weight, self.bias, self.eps)
        return normalized


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, epsilon: float) -> Tensor:
        normalized, mean, inverse = torch.native_layer_norm(x, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(x, weight, bias, mean, inverse)
        ctx.epsilon = epsilon
        return normalized

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, mean, inverse = ctx.saved_tensors
        grad = grad.contiguous()
        grad_x, _, _ = torch.ops.aten.native_layer_norm_backward(
            grad, x, weight.shape, mean, inverse, weight, bias, [True, False, False]
        )
        plain = torch.native_layer_norm(x, weight.shape, None, None, ctx.epsilon)[0]
        grad_weight = plain.mul_(grad).flatten(0, -2).sum(0, dtype=torch.float32)
        grad_bias = grad.flatten(0, -2).sum(0, dtype=torch.float32)
        return grad_x, grad_weight.to(weight.dtype), grad_bias.to(bias.dtype), None


class TokenEmbedding(nn.Embedding):
    """A row for each of some tokens."""

    def forward(self, tokens: Tensor) -> Tensor:
        """Look tokens up, integers of any shape; a dimension D is added."""
        if not _adds_in_bf16(self.weight):
            return super().forward(tokens)
        found: Tensor = _LookUp.apply(tokens, self.weight)
        return found


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(rows)
        ctx.number = len(weight)
        return nn.functional.embedding(rows, weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        total = grad.new_zeros(ctx.number, grad.shape[-1], dtype=torch.float32)
        total.index_add_(0, rows.flatten(), grad.flatten(0, -2).float())
        return None, total.to(grad.dtype)


def _adds_in_bf16(x: Tensor) -> bool:
    return (
        x.dtype == torch.bfloat16 and x.device.type == "cpu" and not torch.compiler.is_compiling()
    )
