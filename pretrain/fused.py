"""Queries, keys and values as slices of one product, whose gradient is not put together by copying.

`unbind` would join the slices' gradients in new memory, a seventh of a step at full length. Here an
attention that writes them as slices of one tensor (see `empty_slices`) has that tensor taken as is.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def split_fused(joined: Tensor) -> tuple[Tensor, ...]:
    """Split (n, parts, H, d) into its parts, (n, H, d) each, as views."""
    if torch.compiler.is_compiling():
        return joined.unbind(1)
    parts: tuple[Tensor, ...] = _Split.apply(joined)
    return parts


def empty_slices(*like: Tensor) -> list[Tensor]:
    """Allocate a tensor for each of (n, H, d), those of one shape as slices of one tensor."""
    if len({x.shape for x in like}) > 1:
        first, *others = like
        return [first.new_empty(first.shape), *empty_slices(*others)]
    length, heads, dim = like[0].shape
    return list(like[0].new_empty(length, len(like), heads, dim).unbind(1))


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, joined: Tensor) -> tuple[Tensor, ...]:
        return joined.unbind(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return _whole(grads) if _are_slices(grads) else torch.stack(grads, 1)


def _are_slices(grads: tuple[Tensor, ...]) -> bool:
    """Whether tensors lie in one storage as `unbind(1)` of a contiguous tensor lays them."""
    first = grads[0]
    _, heads, dim = first.shape
    size = heads * dim
    return all(
        grad.untyped_storage().data_ptr() == first.untyped_storage().data_ptr()
        and grad.dtype == first.dtype
        and grad.shape == first.shape
        and grad.stride() == (len(grads) * size, dim, 1)
        and grad.storage_offset() == first.storage_offset() + number * size
        for number, grad in enumerate(grads)
    )


def _whole(grads: tuple[Tensor, ...]) -> Tensor:
    first = grads[0]
    length, heads, dim = first.shape
    shape = length, len(grads), heads, dim
    strides = len(grads) * heads * dim, heads * dim, dim, 1
    return first.as_strided(shape, strides, first.storage_offset())
