"""FAVOR+ attention over tiles of the sequence, in plain PyTorch operations.

The feature maps, (n, m) for each cell and head, are far larger than everything else (at full length
86 GB of traffic per cell and step). Here they exist only a tile at a time, in buffers that are used
again, and are computed anew in the backward pass. With x the exponents, e = exp(x - maximum), and ε
added to every feature, the attended value of a query is a / b:

    S = Σ (e_k + ε) v,  z = Σ (e_k + ε)      over the keys of a cell, (m, d) and (m,)
    a = (e_q + ε) S,    b = (e_q + ε) z

and backward, with g the gradient of a / b, g_a = g / b and g_b = -g_a·(a / b):

    dS = Σ (e_q + ε)ᵀ g_a,  dz = Σ (e_q + ε)ᵀ g_b,  dx_q = e_q ∘ (g_a Sᵀ + g_b zᵀ),  dq = dx_q P
    dv = (e_k + ε) dS,      dx_k = e_k ∘ (v dSᵀ + dzᵀ),       dk = dx_k P - (Σ dx_k) k / √d

The maxima are constants: without ε they cancel, and with it their gradient is left out.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CPU_ROWS = 1024
"""Rows of a tile on the CPU: their exponents, 1 MB at 266 features, stay in the second cache."""
GPU_ROWS = 1 << 18
"""Rows of a tile elsewhere: enough to fill a GPU, 280 MB of exponents at 266 features."""

Part = tuple[slice, slice]
"""Cells and positions of a block of a (B, n, H, d) tensor."""


def tiled_attention(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float, rows: int | None = None
) -> Tensor:
    """Attend within cells of one length; see `pretrain.favor.favor_attention`.

    Args:
        q: Queries, (B, n_q, H, d).
        k: Keys, (B, n, H, d).
        v: Values, as the keys.
        projection: Random directions, (m, d).
        epsilon: Added to each feature.
        rows: Rows of a tile, over all its cells; by default what suits the device.

    Returns:
        Attended values, (B, n_q, H, d), in the type of `v`.
    """
    rows = rows or (CPU_ROWS if q.device.type == "cpu" else GPU_ROWS)
    attended: Tensor = _TiledAttention.apply(q, k, v, projection, epsilon, rows)
    return attended


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float, rows: int
    ) -> Tensor:
        with torch.autocast(q.device.type, enabled=False), _products_as(q.dtype):
            work = _Tiles(q, projection, epsilon, rows)
            sums, maxima = _summarize_keys(work, k, v)
            read = _read_queries(work, q, sums, v.dtype)
        ctx.save_for_backward(q, k, v, projection, maxima, *sums, *read)
        ctx.epsilon, ctx.rows = epsilon, rows
        return read.out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, projection, maxima, *saved = ctx.saved_tensors
        sums, read = _Sums(*saved[:2]), _Read(*saved[2:])
        with torch.autocast(q.device.type, enabled=False), _products_as(q.dtype):
            work = _Tiles(q, projection, ctx.epsilon, ctx.rows)
            grad_q, grad_sums = _queries_backward(work, q, sums, read, grad)
            grad_k, grad_v = _keys_backward(work, k, v, maxima, grad_sums)
        return grad_q, grad_k, grad_v, None, None, None


class _Sums(NamedTuple):
    """Sums over the keys of each cell, or their gradients."""

    values: Tensor
    """S, (B, H, m, d)."""
    counts: Tensor
    """z, (B, H, m, 1)."""


class _Read(NamedTuple):
    """What the queries read from the sums."""

    out: Tensor
    """Attended values, (B, n, H, d)."""
    divisors: Tensor
    """What each was divided by, (B, n, H, 1)."""


class _Tiles:
    """How a call is cut into tiles, and the steps that all four passes share.

    All arithmetic is float32 (float64 for float64 inputs): bf16 has no digits left at |k|²/2 of 30.
    """

    def __init__(self, q: Tensor, projection: Tensor, epsilon: float, rows: int) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.epsilon = epsilon
        self.rows = rows
        self.scale: float = q.shape[-1] ** -0.25
        self.directions = projection.to(self.wide) * self.scale  # (m, d)
        self._buffers: dict[str, Tensor] = {}

    def parts(self, x: Tensor) -> Iterator[tuple[slice, list[Part]]]:
        """Cells that share tiles (several if they are short), and their blocks of positions."""
        cells = max(self.rows // max(x.shape[1], 1), 1)
        for b in range(0, x.shape[0], cells):
            group = slice(b, min(b + cells, x.shape[0]))
            starts = range(0, x.shape[1], self.rows)
            yield group, [(group, slice(s, min(s + self.rows, x.shape[1]))) for s in starts]

    def buffer(self, name: str, like: Tensor, *shape: int) -> Tensor:
        """Memory of a shape, the same at every call with one name."""
        size = torch.Size(shape).numel()
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            held = self._buffers[name] = like.new_empty(size, dtype=self.wide)
        return held[:size].view(shape)

    def block(self, name: str, x: Tensor, part: Part) -> Tensor:
        """Copy a block of all heads, (c, r, H, d): rows of one head are regular within it."""
        return self.buffer(name, x, *x[part].shape).copy_(x[part])

    def exponents(self, block: Tensor, head: int) -> Tensor:
        """Scaled projections of a block's head on all directions, (c, r, m)."""
        cells, length, _, dim = block.shape
        exponents = self.buffer("exponents", block, cells, length, len(self.directions))
        rows = block[:, :, head].reshape(cells * length, dim)  # a view
        _multiply(rows[None], self.directions.t()[None], exponents.view(1, cells * length, -1))
        return exponents

    def half_squares(self, keys: Tensor) -> Tensor:
        """|k|²/2 of a block of scaled keys, (c, r, H)."""
        squares = self.buffer("squares", keys, *keys.shape)
        return torch.mul(keys, keys, out=squares).sum(-1) * (self.scale**2 / 2)

    def back(self, gradient: Tensor, block: Tensor, head: int) -> None:
        """Write a head's gradient from that of its exponents, (c, r, m), into a block."""
        cells, length, _, dim = block.shape
        rows = block[:, :, head].reshape(cells * length, dim)  # a view
        _multiply(gradient.view(1, cells * length, -1), self.directions[None], rows[None])


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """Product of each cell's matrices; of a single cell's without the detour of a batch."""
    if torch.compiler.is_compiling():
        out.copy_(a @ b)  # torch.compile stops at `out` with strides, and fuses as it likes
    elif len(a) == 1:
        torch.mm(a[0], b[0], out=out[0])
    else:
        torch.bmm(a, b, out=out)
    return out


def _summarize_keys(work: _Tiles, k: Tensor, v: Tensor) -> tuple[_Sums, Tensor]:
    """Sums over the keys, and the largest exponents, (B, H, 1, 1)."""
    cells, _, heads, dim = k.shape
    features = len(work.directions)
    sums = k.new_zeros(cells, heads, features, dim, dtype=work.wide)
    counts = k.new_zeros(cells, heads, features, 1, dtype=work.wide)
    maxima = k.new_full((cells, heads, 1, 1), -torch.inf, dtype=work.wide)
    for group, parts in work.parts(k):
        for part in parts:
            keys, values = work.block("keys", k, part), work.block("values", v, part)
            half = work.half_squares(keys)
            for head in range(heads):
                total, count, largest = (x[group, head] for x in (sums, counts, maxima))
                exponents = work.exponents(keys, head).sub_(half[:, :, head, None])
                grown = torch.maximum(largest, exponents.amax((-1, -2), keepdim=True))
                shrink = torch.exp(largest - grown)  # what was summed below a smaller maximum
                largest.copy_(grown)
                e = exponents.sub_(grown).exp_()
                product = work.buffer("sums", k, len(e), features, dim)
                _multiply(e.transpose(-1, -2), values[:, :, head], product)
                total.mul_(shrink).add_(product)
                count.mul_(shrink).add_(e.sum(1).unsqueeze(-1))
        everything = v[group].sum(1, dtype=work.wide).unsqueeze(-2)  # (c, H, 1, d)
        sums[group].add_(everything, alpha=work.epsilon)
    counts.add_(work.epsilon * k.shape[1])
    return _Sums(sums, counts), maxima


def _read_queries(work: _Tiles, q: Tensor, sums: _Sums, dtype: torch.dtype) -> _Read:
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    divisors = q.new_empty(*q.shape[:-1], 1, dtype=work.wide)
    floor = sums.values.sum(-2).unsqueeze(1) * work.epsilon  # (B, 1, H, d)
    count_floor = sums.counts.sum(-2).unsqueeze(1) * work.epsilon  # (B, 1, H, 1)
    for group, parts in work.parts(q):
        for part in parts:
            queries = work.block("queries", q, part)
            read = work.buffer("read", q, *queries.shape)
            divisor = divisors[part]
            for head in range(q.shape[2]):
                # |q|²/2 is the same for all features of a query and cancels in the division.
                exponents = work.exponents(queries, head)
                e = exponents.sub_(exponents.amax(-1, keepdim=True)).exp_()
                _multiply(e, sums.values[group, head], read[:, :, head])
                divisor[:, :, head].copy_(e @ sums.counts[group, head])
            divisor.add_(count_floor[group])
            out[part].copy_(read.add_(floor[group]).div_(divisor))
    return _Read(out, divisors)


def _queries_backward(
    work: _Tiles, q: Tensor, sums: _Sums, read: _Read, grad: Tensor
) -> tuple[Tensor, _Sums]:
    """Gradients of the queries and of the sums over keys."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_sums = _Sums(torch.zeros_like(sums.values), torch.zeros_like(sums.counts))
    for group, parts in work.parts(q):
        for part in parts:
            queries = work.block("queries", q, part)
            ga = work.block("grad", grad, part).div_(read.divisors[part])
            gb = work.block("out", read.out, part).mul_(ga).sum(-1, keepdim=True).neg_()
            for head in range(q.shape[2]):
                exponents = work.exponents(queries, head)
                e = exponents.sub_(exponents.amax(-1, keepdim=True)).exp_()
                along, across = ga[:, :, head], gb[:, :, head]
                total, count = sums.values[group, head], sums.counts[group, head]
                product = work.buffer("sums", q, *total.shape)
                grad_sums.values[group, head] += _multiply(e.transpose(-1, -2), along, product)
                per_feature = across.transpose(-1, -2) @ e  # (c, 1, m)
                grad_sums.counts[group, head] += per_feature.transpose(-1, -2)
                dx = work.buffer("dx", q, *e.shape)
                _multiply(along, total.transpose(-1, -2), dx)
                dx.addcmul_(across, count.transpose(-1, -2)).mul_(e)
                work.back(dx, queries, head)  # this head of the queries is not needed any more
            grad_q[part].copy_(queries)
            grad_sums.values[group].add_(ga.sum(1).unsqueeze(-2), alpha=work.epsilon)
            grad_sums.counts[group].add_(gb.sum(1).unsqueeze(-2), alpha=work.epsilon)
    return grad_q, grad_sums


def _keys_backward(
    work: _Tiles, k: Tensor, v: Tensor, maxima: Tensor, grad_sums: _Sums
) -> tuple[Tensor, Tensor]:
    """Gradients of the keys and values."""
    grad_k = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    grad_v = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    floor = grad_sums.values.sum(-2).unsqueeze(1) * work.epsilon  # (B, 1, H, d)
    for group, parts in work.parts(k):
        for part in parts:
            keys, values = work.block("keys", k, part), work.block("values", v, part)
            gradient = work.buffer("grad", k, *keys.shape)
            read = work.buffer("read", k, *values.shape)
            half = work.half_squares(keys)
            along = torch.empty_like(half)
            for head in range(k.shape[2]):
                total, count = grad_sums.values[group, head], grad_sums.counts[group, head]
                exponents = work.exponents(keys, head).sub_(half[:, :, head, None])
                e = exponents.sub_(maxima[group, head]).exp_()
                _multiply(e, total, read[:, :, head])
                dx = work.buffer("dx", k, *e.shape)
                _multiply(values[:, :, head], total.transpose(-1, -2), dx)
                dx.add_(count.transpose(-1, -2)).mul_(e)
                along[:, :, head] = dx.sum(-1)
                work.back(dx, gradient, head)
            gradient.addcmul_(keys, along.unsqueeze(-1), value=-(work.scale**2))
            grad_k[part].copy_(gradient)
            grad_v[part].copy_(read.add_(floor[group]))
    return grad_k, grad_v


_PRECISION = threading.Lock()


@contextmanager
def _narrow_products() -> Iterator[None]:
    # torch has this switch for the whole process, so one thread at a time turns it.
    with _PRECISION:
        matmul = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
        before = matmul.fp32_precision
        matmul.fp32_precision = "bf16"
        try:
            yield
        finally:
            matmul.fp32_precision = before


def _products_as(dtype: torch.dtype) -> Any:
    """Context in which CPU products of bf16 inputs multiply in bf16; they add in float32 anyway."""
    if dtype != torch.bfloat16 or torch.compiler.is_compiling():
        return nullcontext()
    return _narrow_products()
