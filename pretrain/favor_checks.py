"""What must hold for the arguments of an attention, and the sentence for each that does not."""

import math
from itertools import pairwise
from typing import Final

import torch
from torch import Tensor

_FLOATS: Final = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float, packed: bool
) -> None:
    """Refuse arguments that do not fit each other; native kernels would read where nothing is.

    Raises:
        ValueError: What does not fit, by name: shape, type, device or epsilon.
    """
    _check_kinds({"q": q, "k": k, "v": v, "projection": projection})
    layout = "(tokens, H, d)" if packed else "(B, n, H, d)"
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if q.ndim != 4 - packed or k.ndim != q.ndim or k.shape != v.shape:
        raise ValueError(f"{shapes}; give {layout}, keys and values of one shape")
    if q.shape[-2:] != k.shape[-2:] or (not packed and len(q) != len(k)):
        raise ValueError(f"{shapes}; cells, heads and their width must be the same")
    if not q.shape[-1] or not q.shape[-2]:
        raise ValueError(f"{shapes}; attention needs at least one head, of width 1 or more")
    if projection.ndim != 2 or projection.shape[1] != q.shape[-1] or not len(projection):
        raise ValueError(
            f"projection is {tuple(projection.shape)}; give one direction or more, which need the "
            f"heads' width, {q.shape[-1]}"
        )
    if not packed and not k.shape[1]:
        raise ValueError("the cells have no keys; attention needs at least one token in each")
    if not 0 <= epsilon < math.inf:
        raise ValueError(f"epsilon is {epsilon}; give a small number, 0 or more")


def _check_kinds(tensors: dict[str, Tensor]) -> None:
    for name, x in tensors.items():
        if x.dtype not in _FLOATS:
            raise ValueError(
                f"{name} is {type_name(x)}; give float32, float64, bfloat16 or float16"
            )
    if len({x.device for x in tensors.values()}) > 1:
        places = ", ".join(f"{name} on {x.device}" for name, x in tensors.items())
        raise ValueError(f"there is {places}; move all four to one device")


def cell_lengths(offsets: Tensor, total: int, name: str, least: int) -> list[int]:
    """Read the lengths of packed cells off their offsets.

    Args:
        offsets: First token of each cell and their number at the end, int64 (B + 1,).
        total: How many tokens there are.
        name: What the caller calls the offsets.
        least: Fewest tokens of a cell.

    Raises:
        ValueError: If the offsets are of another type or shape, do not rise from 0 to `total`, or
            give a cell too few tokens.
    """
    if offsets.dtype != torch.int64:
        raise ValueError(f"{name} must be int64, got {type_name(offsets)}")
    if offsets.ndim != 1 or not len(offsets):
        raise ValueError(f"{name} must be of shape (B + 1,), got {tuple(offsets.shape)}")
    if offsets.is_meta:
        raise ValueError(f"{name} on meta hold no numbers; give them on the CPU")
    ends = offsets.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    if ends[0] != 0 or ends[-1] != total or (lengths and min(lengths) < 0):
        raise ValueError(f"{name} must rise from 0 to the number of tokens, {total}")
    if lengths and min(lengths) < least:
        raise ValueError(f"{name} give cell {lengths.index(0)} no token; leave empty cells out")
    return lengths


def type_name(x: Tensor) -> str:
    """Say a tensor's type without the library's name."""
    return str(x.dtype).removeprefix("torch.")
