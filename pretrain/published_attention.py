"""Attention as the published scBERT computes it, for weights that were trained with it.

Its key stabiliser is the largest projection over all heads and positions, taken before |k|²/2 is
subtracted, and so is each query's: features of long keys sink to the additive epsilon. The
published code takes the maximum over the whole batch besides; here over one cell, which is what it
computes when it predicts, a cell at a time. (TencentAILabHealthcare/scBERT, performer_pytorch.py,
`softmax_kernel`.)
"""

from typing import Final

import torch
from torch import Tensor

from pretrain.favor_compiled import as_operation

PUBLISHED_EPSILON: Final = 1e-4


def published_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None = None,
) -> Tensor:
    """Attend within each cell.

    Args:
        q: Queries, packed, (Q, H, d).
        k: Keys, packed, (n, H, d).
        v: Values, as the keys.
        projection: Random directions, (m, d).
        offsets: First key of each cell, and n at the end; int64 (B + 1,).
        query_offsets: The same for the queries, if they are at other positions.

    Returns:
        Attended values in the shape of `q` and the type of `v`.
    """
    attend = _operation if torch.compiler.is_compiling() else _attend_cells
    return attend(q, k, v, projection.detach(), offsets, query_offsets, "", PUBLISHED_EPSILON)


def _attend_cells(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    _kernel: str,
    epsilon: float,
) -> Tensor:
    ends = offsets.tolist()
    query_ends = ends if query_offsets is None else query_offsets.tolist()
    cells = [
        _attend(q[a:b], k[c:d], v[c:d], projection, epsilon)
        for a, b, c, d in zip(query_ends, query_ends[1:], ends, ends[1:], strict=False)
    ]
    return torch.cat(cells) if cells else q[:0].to(v.dtype, copy=True)


_operation = as_operation("scbert::published_attention", _attend_cells)


def published_exponentials(x: Tensor, projection: Tensor, dim: tuple[int, ...]) -> Tensor:
    """Features before epsilon is added, (H, n, m), of vectors (H, n, d).

    Args:
        x: Queries or keys of one cell, float32 or wider.
        projection: Random directions, (m, d), of the same type.
        dim: Axes over which the largest projection is taken: (-1,) of queries, all three of keys.
    """
    x = x * x.shape[-1] ** -0.25
    projected = x @ projection.t()
    largest = projected.amax(dim, keepdim=True) if projected.numel() else projected[..., :1]
    exponent = projected - x.square().sum(-1, keepdim=True) / 2 - largest.detach()
    return exponent.exp()


def _attend(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float) -> Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    with torch.autocast(q.device.type, enabled=False):
        query, key, values = (x.to(wide).transpose(0, 1) for x in (q, k, v))  # (H, n, d)
        # Both lack the published factor 1 / √m, which cancels in the division.
        query = published_exponentials(query, projection.to(wide), (-1,)) + epsilon
        key = published_exponentials(key, projection.to(wide), (-3, -2, -1)) + epsilon
        normalizer = query @ key.sum(-2).unsqueeze(-1)  # (H, Q, 1)
        attended = query @ (key.transpose(-1, -2) @ values) / normalizer
        return attended.transpose(0, 1).to(v.dtype)
