"""FAVOR+ attention over tiles of the sequence, in plain PyTorch operations.

The feature maps, (n, m) for each cell and head, are far larger than everything else (at full length
86 GB of traffic per cell and step). Here they exist only a tile at a time, in buffers that are used
again, and are computed anew in the backward pass. With x the exponents, e = exp(x - maximum), ε
added to every feature, and c any constant, the attended value of a query is c + a / b:

    S = Σ (e_k + ε) (v - c),  z = Σ (e_k + ε)    over the keys of a cell, (m, d) and (m,)
    a = (e_q + ε) S,          b = (e_q + ε) z

and backward, with g the gradient of a / b, g_a = g / b and g_b = -g_a·(a / b):

    dS = Σ (e_q + ε)ᵀ g_a,  dz = Σ (e_q + ε)ᵀ g_b,  dx_q = e_q ∘ (g_a Sᵀ + g_b zᵀ),  dq = dx_q P
    dv = (e_k + ε) dS,  dx_k = e_k ∘ ((v - c) dSᵀ + dzᵀ),  dk = dx_k P - (Σ dx_k) k / √d

The maxima are constants: without ε they cancel, and with it their gradient is left out. So is c,
for what is attended moves with the values. It is chosen so that the S of all features add up to
zero: what every query would attend if features told it nothing. With c of zero the two terms of
dx_q nearly cancel where attention is even, as it is early in training, and in bf16 nothing but
rounding is left of the gradients of queries and keys.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from pretrain.favor_tiles import CPU_ROWS, GPU_ROWS, Tiles, cut, put
from pretrain.fused import empty_slices

Lengths = tuple[list[int], list[int]]
"""Numbers of queries and of keys of packed cells."""


def tiled_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    epsilon: float,
    lengths: Lengths | None = None,
    rows: int | None = None,
) -> Tensor:
    """Attend within each cell; see `pretrain.favor.favor_attention`.

    Args:
        q: Queries of cells of one length, (B, n_q, H, d); packed (Q, H, d).
        k: Keys, (B, n, H, d); packed (tokens, H, d).
        v: Values, as the keys.
        projection: Random directions, (m, d).
        epsilon: Added to each feature.
        lengths: Packed cells: their numbers of queries, and of keys.
        rows: Rows of a tile, over all its cells and heads; by default what suits the device.

    Returns:
        Attended values in the shape of `q` and the type of `v`.
    """
    rows = rows or (CPU_ROWS if q.device.type == "cpu" else GPU_ROWS)
    attended: Tensor = _TiledAttention.apply(q, k, v, projection, epsilon, lengths, rows)
    return attended


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        projection: Tensor,
        epsilon: float,
        lengths: Lengths | None,
        rows: int,
    ) -> Tensor:
        kept: list[Tensor] = []
        with torch.autocast(q.device.type, enabled=False):
            work = Tiles(q, v, projection, epsilon, rows)
            out = torch.empty(q.shape, dtype=v.dtype, device=q.device)
            divisors = q.new_empty(*q.shape[:-1], 1, dtype=work.wide)
            of_queries, of_keys = lengths or (None, None)
            cells = zip(_cells(of_queries, q, out, divisors), _cells(of_keys, k, v), strict=True)
            for (queries, *written), (keys, values) in cells:
                sums, maxima = _summarize_keys(work, keys, values)
                _read_queries(work, queries, sums, *written)
                kept += (*sums, maxima)
        ctx.save_for_backward(q, k, v, projection, divisors, *kept)
        ctx.epsilon, ctx.lengths, ctx.rows = epsilon, lengths, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, projection, divisors, *kept = ctx.saved_tensors
        sliced = ctx.lengths is not None and q.dtype == k.dtype == v.dtype
        found = empty_slices(q, k, v) if sliced else [torch.empty_like(x) for x in (q, k, v)]
        of_queries, of_keys = ctx.lengths or (None, None)
        cells = zip(
            _cells(of_queries, q, divisors, grad, found[0]),
            _cells(of_keys, k, v, *found[1:]),
            zip(*[iter(kept)] * 4, strict=True),
            strict=True,
        )
        with torch.autocast(q.device.type, enabled=False):
            work = Tiles(q, v, projection, ctx.epsilon, ctx.rows)
            for own, (keys, values, *written), (*sums, maxima) in cells:
                grad_sums = _queries_backward(work, _Sums(*sums), *own)
                _keys_backward(work, keys, values, maxima, grad_sums, *written)
        return *found, None, None, None, None


def _cells(lengths: list[int] | None, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """What each packed cell has of some tensors, as a batch of one; of dense cells all at once."""
    if lengths is None:
        return iter([tensors])
    return zip(*([one[None] for one in x.split(lengths)] for x in tensors), strict=True)


class _Sums(NamedTuple):
    """Sums over the keys of each cell, or their gradients."""

    values: Tensor
    """S, (B, H, m, d)."""
    counts: Tensor
    """z, (B, H, m, 1)."""
    center: Tensor
    """c, (B, H, 1, d); it has no gradient."""


def _summarize_keys(work: Tiles, k: Tensor, v: Tensor) -> tuple[_Sums, Tensor]:
    """Sums over the keys, and the largest exponents, (B, H, 1, 1)."""
    cells, length, heads, dim = k.shape
    features = len(work.directions)
    sums = k.new_zeros(cells, heads, features, dim, dtype=work.wide)
    counts = k.new_zeros(cells, heads, features, 1, dtype=work.wide)
    maxima = k.new_full((cells, heads, 1, 1), -torch.inf, dtype=work.wide)
    # Any constant near the values will do here: a mean of a thousand of them, for a start.
    center = v[:, :: max(length // 1024, 1)].mean(1, dtype=work.wide).unsqueeze(2)
    total = torch.zeros_like(center)  # Σ (v - center),
    rounded = torch.zeros_like(center)  # and what is left of it in narrow numbers
    for group, parts in work.parts(k):
        largest = maxima[group]
        for part in parts:
            exact, values = work.less(cut(v, part), center[group])
            total[group] += exact.sum(2, keepdim=True)
            rounded[group] += values.sum(2, keepdim=True, dtype=work.wide)
            exponents = work.key_exponents(cut(k, part))
            grown = torch.maximum(largest, exponents.amax((-1, -2), keepdim=True))
            shrink = torch.exp2(largest - grown)  # what was summed below a smaller maximum
            largest.copy_(grown)
            e = exponents.sub_(grown).exp2_()
            e_narrow = work.narrowed("product", e)
            sums[group] *= shrink
            sums[group] += work.product("sums", e_narrow.transpose(-1, -2), values)
            counts[group] *= shrink
            counts[group] += e.sum(2).unsqueeze(-1)
    counts.add_(work.epsilon * length)
    sums.add_(rounded, alpha=work.epsilon)
    # Where all values lose alike, for they are small beside what they lie around, the center gains.
    center += (total - rounded) / length
    mean = sums.sum(2, keepdim=True) / counts.sum(2, keepdim=True)  # (B, H, 1, d)
    sums.sub_(counts * mean)
    return _Sums(sums, counts, center + mean), maxima


def _read_queries(work: Tiles, q: Tensor, sums: _Sums, out: Tensor, divisors: Tensor) -> None:
    """Write attended values, (B, n, H, d), and what each was divided by, (B, n, H, 1)."""
    floor = sums.counts.sum(2, keepdim=True) * work.epsilon  # (B, H, 1, 1)
    values = sums.values.to(work.narrow)
    for group, parts in work.parts(q):
        for part in parts:
            e = work.query_features(cut(q, part))
            read = work.product("read", work.narrowed("product", e), values[group])
            e *= sums.counts[group].transpose(-1, -2)
            divisor = e.sum(-1, keepdim=True).add_(floor[group])  # (c, H, r, 1)
            attended = torch.div(read, divisor, out=work.wide_like("attended", read))
            put(attended.add_(sums.center[group]), out, part)  # ε Σ S is nothing
            put(divisor, divisors, part)


def _queries_backward(
    work: Tiles, sums: _Sums, q: Tensor, divisors: Tensor, grad: Tensor, grad_q: Tensor
) -> _Sums:
    """Write gradients of the queries; return those of the sums over keys."""
    values = sums.values.to(work.narrow)
    grad_values, grad_counts = torch.zeros_like(sums.values), torch.zeros_like(sums.counts)
    for group, parts in work.parts(q):
        for part in parts:
            divisor, ga = cut(divisors, part), cut(grad, part)
            ga = torch.div(ga, divisor, out=work.wide_like("grad", ga))
            narrow_ga = work.narrowed("narrow grad", ga)
            e = work.query_features(cut(q, part))
            features = work.narrowed("product", e)
            grad_values[group] += work.product("sums", features.transpose(-1, -2), narrow_ga)
            dx = work.product("narrow dx", narrow_ga, values[group].transpose(-1, -2))
            dx = work.widened("dx", dx)
            # g_a·a, from the very numbers that g_b has to balance: Σ dx_q of a query is nothing but
            # ε, and in bf16 what was attended is too coarse for that.
            along = torch.mul(dx, e, out=work.wide_like("along", e)).sum(-1, keepdim=True)
            gb = along.div_(divisor).neg_()  # (c, H, r, 1)
            grad_counts[group] += (gb.transpose(-1, -2) @ e).transpose(-1, -2)
            dx.addcmul_(gb, sums.counts[group].transpose(-1, -2)).mul_(e)
            put(work.back(dx), grad_q, part)
            grad_values[group] += work.epsilon * ga.sum(2, keepdim=True)
            grad_counts[group] += work.epsilon * gb.sum(2, keepdim=True)
    return _Sums(grad_values, grad_counts, sums.center)


def _keys_backward(
    work: Tiles,
    k: Tensor,
    v: Tensor,
    maxima: Tensor,
    grad_sums: _Sums,
    grad_k: Tensor,
    grad_v: Tensor,
) -> None:
    """Write gradients of the keys and values."""
    floor = grad_sums.values.sum(2, keepdim=True) * work.epsilon  # (B, H, 1, d)
    grad_values = grad_sums.values.to(work.narrow)
    for group, parts in work.parts(k):
        for part in parts:
            keys = cut(k, part)
            _, values = work.less(cut(v, part), grad_sums.center[group])
            e = work.key_exponents(keys).sub_(maxima[group]).exp2_()
            dx = work.product("narrow dx", values, grad_values[group].transpose(-1, -2))
            dx = work.widened("dx", dx)
            dx.add_(grad_sums.counts[group].transpose(-1, -2)).mul_(e)
            read = work.product("read", work.narrowed("product", e), grad_values[group])
            put(torch.add(read, floor[group], out=work.wide_like("values", read)), grad_v, part)
            along = dx.sum(-1, keepdim=True).mul_(-(work.scale**2))
            from_squares = torch.mul(keys, along, out=work.wide_like("values", keys))
            put(from_squares.add_(work.back(dx)), grad_k, part)
