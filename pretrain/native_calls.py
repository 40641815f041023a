"""How tensors are handed to the native kernels: looked at first, then as addresses and strides.

A kernel reads what its sizes say. What does not fit is refused here, by name.
"""

import ctypes
from collections.abc import Sequence
from typing import Any, Final

import torch
from torch import Tensor, nn

from pretrain.favor_checks import check_attention, type_name
from pretrain.fused import empty_slices
from pretrain.native import run

TYPES: Final = (torch.bfloat16, torch.float32)


class _Rows(ctypes.Structure):
    """Mirrors `struct Rows` of attention_call.h."""

    _fields_ = [("data", ctypes.c_void_p), ("token", ctypes.c_int64), ("head", ctypes.c_int64)]


class AttentionCall(ctypes.Structure):
    """Mirrors `struct AttentionCall` of attention_call.h."""

    _fields_ = [
        *((name, _Rows) for name in ("q", "k", "v", "out", "grad", "grad_q", "grad_k", "grad_v")),
        *((name, ctypes.c_void_p) for name in ("directions", "offsets", "query_offsets")),
        *((name, ctypes.c_void_p) for name in ("divisors", "sums", "centers", "maxima")),
        *((name, ctypes.c_int64) for name in ("cells", "heads", "dim", "features", "threads")),
        ("epsilon", ctypes.c_double),
        ("scale", ctypes.c_double),
    ]

    def give(self, **tensors: Tensor) -> None:
        """Set fields to tensors, which must outlive the call; rows are (tokens, H, d)."""
        for name, tensor in tensors.items():
            address = tensor.data_ptr()
            is_rows = isinstance(getattr(self, name), _Rows)
            setattr(self, name, _Rows(address, *tensor.stride()[:2]) if is_rows else address)


def attention_call(inputs: Sequence[Tensor], epsilon: float) -> AttentionCall:
    """Describe a call by its inputs, which must outlive it.

    Args:
        inputs: Queries, keys and values, as `as_rows` leaves them; directions, as `scaled` does;
            offsets of the keys and of the queries, contiguous.
        epsilon: Added to each feature.
    """
    q, k, v, directions, offsets, query_offsets = inputs
    call = AttentionCall(
        cells=len(offsets) - 1,
        heads=q.shape[1],
        dim=q.shape[2],
        features=len(directions),
        threads=torch.get_num_threads(),
        epsilon=epsilon,
        scale=q.shape[2] ** -0.25,
    )
    call.give(q=q, k=k, v=v, directions=directions, offsets=offsets, query_offsets=query_offsets)
    return call


def attention_gradients(
    kernel: Any, call: AttentionCall, grad: Tensor, inputs: Sequence[Tensor]
) -> list[Tensor]:
    """Run a backward kernel for the gradients of queries, keys and values, (tokens, H, d) each."""
    grad = as_rows(grad.to(inputs[0].dtype))
    gradients = empty_slices(*inputs)
    call.give(grad=grad, grad_q=gradients[0], grad_k=gradients[1], grad_v=gradients[2])
    run(kernel, call)
    return gradients


def as_rows(x: Tensor) -> Tensor:
    """A tensor whose last dimension is dense."""
    return x if x.stride(-1) == 1 else x.contiguous()


def scaled(projection: Tensor) -> Tensor:
    """Directions as the kernels take them, float32 (m, d)."""
    scale: float = projection.shape[1] ** -0.25
    return (projection.float() * scale).contiguous()


def check_native_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    epsilon: float,
    offsets: Tensor,
    query_offsets: Tensor,
) -> None:
    """Refuse inputs of attention that a kernel would read wrongly; offsets rise as they should.

    Raises:
        ValueError: If a tensor is not on the CPU, or types, shapes or epsilon do not fit.
    """
    named = {"q": q, "k": k, "v": v, "projection": projection}
    ends = {"offsets": offsets, "query_offsets": query_offsets}
    for name, tensor in (named | ends).items():
        _check_device(name, tensor)
    if q.dtype not in TYPES or not q.dtype == k.dtype == v.dtype:
        types = f"q is {type_name(q)}, k {type_name(k)}, v {type_name(v)}"
        raise ValueError(f"{types}; native attention takes three of bfloat16 or of float32")
    check_attention(q, k, v, projection, epsilon, packed=True)
    for name, tensor in ends.items():
        if tensor.dtype != torch.int64 or tensor.ndim != 1 or tensor.shape != offsets.shape:
            raise ValueError(f"{name} must be int64 of shape (B + 1,), got {tuple(tensor.shape)}")


def check_feed_forward(x: Tensor, norm: nn.LayerNorm, inner: nn.Linear, outer: nn.Linear) -> None:
    """Refuse rows and layers that a kernel would read wrongly.

    Raises:
        ValueError: If a tensor is not on the CPU, is missing, or types or shapes do not fit.
    """
    _check_device("x", x)
    if x.dtype not in TYPES:
        raise ValueError(f"x is {type_name(x)}; native feed-forward takes bfloat16 or float32")
    if not x.ndim:
        raise ValueError("x is a single number; give rows, (n, D)")
    width, hidden = x.shape[-1], len(inner.weight)
    for name, tensor, shape in (
        ("norm.weight", norm.weight, (width,)),
        ("norm.bias", norm.bias, (width,)),
        ("inner.weight", inner.weight, (hidden, width)),
        ("inner.bias", inner.bias, (hidden,)),
        ("outer.weight", outer.weight, (width, hidden)),
        ("outer.bias", outer.bias, (width,)),
    ):
        if tensor is None:
            raise ValueError(f"{name} is missing; native feed-forward needs it")
        _check_device(name, tensor)
        if tensor.shape != shape:
            raise ValueError(
                f"{name} is {tuple(tensor.shape)}; rows of {width} and {hidden} hidden units "
                f"need {shape}"
            )


def _check_device(name: str, tensor: Tensor) -> None:
    if tensor.device.type != "cpu":
        raise ValueError(f"{name} is on {tensor.device.type}; native kernels run on the CPU")
