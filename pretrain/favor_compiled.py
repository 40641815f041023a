"""Packed attention as one operation in the graphs of torch.compile.

The lengths of packed cells are numbers in a tensor, and what is traced cannot ask for them: each
attention would break the graph in two. So the compiler is shown one operation that it does not look
into. When the graph runs, the operation computes what it does outside: native kernels, checks of
the offsets and all. What lies between two attentions is compiled as usual.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor

Attention = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, str, float], Tensor]
"""Takes queries, keys, values, directions, offsets of keys and of queries, kernel and epsilon."""

_ARGUMENTS: Final = (
    "Tensor q, Tensor k, Tensor v, Tensor projection, Tensor offsets, Tensor? query_offsets, "
    "str kernel, float epsilon"
)


def as_operation(name: str, attend: Attention) -> Attention:
    """Make an operation of an attention, once for each name in a process.

    Args:
        name: Its name among torch's operations, `library::operation`.
        attend: What it computes, with gradients for queries, keys and values; the result is new
            memory in the shape of the queries and the type of the values.

    Returns:
        The operation, called as `attend` is. Its backward pass runs `attend` again: what that keeps
        for it depends on the kernel, and a graph must know beforehand what is kept.
    """
    torch.library.define(name, f"({_ARGUMENTS}) -> Tensor")
    torch.library.define(
        f"{name}_backward", f"(Tensor grad, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)"
    )

    def backward(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *others: Any) -> tuple[Tensor, ...]:
        with torch.enable_grad():
            given = q, k, v = tuple(x.detach().requires_grad_() for x in (q, k, v))
            attended = attend(q, k, v, *others)
        # Kernels give the three as slices of one tensor; the graph was promised whole ones.
        found = torch.autograd.grad(attended, given, grad, materialize_grads=True)
        return tuple(x.contiguous() for x in found)

    def fake(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
        return q.new_empty(q.shape, dtype=v.dtype)

    def fake_backward(grad: Tensor, *tensors: Any) -> tuple[Tensor, ...]:
        return tuple(x.new_empty(x.shape) for x in tensors[:3])

    def keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:6])
        ctx.others = inputs[6:]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        found = _operation(f"{name}_backward")(grad, *ctx.saved_tensors, *ctx.others)
        return *found, None, None, None, None, None

    torch.library.impl(name, "default", attend)
    torch.library.impl(f"{name}_backward", "default", backward)
    torch.library.register_fake(name, fake)
    torch.library.register_fake(f"{name}_backward", fake_backward)
    torch.library.register_autograd(name, differentiate, setup_context=keep)
    operation: Attention = _operation(name)
    return operation


def _operation(name: str) -> Any:
    library, operation = name.split("::")
    return getattr(getattr(torch.ops, library), operation).default
