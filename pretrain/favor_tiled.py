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

from pretrain.products import multiplies_bf16

CPU_ROWS = 1536
"""Rows of a tile on the CPU: their exponents take 1.6 MB at 266 features, the features half."""
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
        with torch.autocast(q.device.type, enabled=False):
            work = _Tiles(q, v, projection, epsilon, rows)
            sums, maxima = _summarize_keys(work, k, v)
            out, divisors = _read_queries(work, q, sums, v.dtype)
        ctx.save_for_backward(q, k, v, projection, maxima, divisors, *sums)
        ctx.epsilon, ctx.rows = epsilon, rows
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, projection, maxima, divisors, *saved = ctx.saved_tensors
        sums = _Sums(*saved)
        with torch.autocast(q.device.type, enabled=False):
            work = _Tiles(q, v, projection, ctx.epsilon, ctx.rows)
            grad_q, grad_sums = _queries_backward(work, q, sums, divisors, grad)
            grad_k, grad_v = _keys_backward(work, k, v, maxima, grad_sums)
        return grad_q, grad_k, grad_v, None, None, None


class _Sums(NamedTuple):
    """Sums over the keys of each cell, or their gradients."""

    values: Tensor
    """S, (B, H, m, d)."""
    counts: Tensor
    """z, (B, H, m, 1)."""
    center: Tensor
    """c, (B, 1, H, d); it has no gradient."""

    def joined(self, dtype: torch.dtype) -> Tensor:
        """S and z beside each other, (B, H, m, d + 1), for products in a type."""
        return torch.cat((self.values, self.counts), -1).to(dtype)


class _Tiles:
    """How a call is cut into tiles, and the steps that all four passes share.

    Sums and exponents are float32 (float64 for float64 inputs): bf16 has no digits left at |k|²/2
    of 30. Features and what they multiply are bf16 for bf16 inputs, where that is fast.
    """

    def __init__(self, q: Tensor, v: Tensor, projection: Tensor, epsilon: float, rows: int) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.narrow = torch.bfloat16 if _multiplies_narrowly(q, v) else self.wide
        self.epsilon = epsilon
        self.rows = rows
        self.scale: float = q.shape[-1] ** -0.25
        self.directions = projection.to(self.wide) * self.scale  # (m, d)
        self.narrow_directions = self.directions.to(self.narrow)
        self._buffers: dict[str, Tensor] = {}

    def parts(self, x: Tensor) -> Iterator[tuple[slice, list[Part]]]:
        """Cells that share tiles (several if they are short), and their blocks of positions."""
        cells = max(self.rows // max(x.shape[1], 1), 1)
        for b in range(0, x.shape[0], cells):
            group = slice(b, min(b + cells, x.shape[0]))
            starts = range(0, x.shape[1], self.rows)
            yield group, [(group, slice(s, min(s + self.rows, x.shape[1]))) for s in starts]

    def buffer(self, name: str, like: Tensor, *shape: int, narrow: bool = False) -> Tensor:
        """Memory of a shape, the same at every call with one name."""
        size = torch.Size(shape).numel()
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            dtype = self.narrow if narrow else self.wide
            held = self._buffers[name] = like.new_empty(size, dtype=dtype)
        return held[:size].view(shape)

    def block(self, name: str, x: Tensor, part: Part) -> Tensor:
        """Copy a block of all heads, (c, r, H, d): rows of one head are regular within it."""
        return self.buffer(name, x, *x[part].shape).copy_(x[part])

    def joined(self, name: str, x: Tensor, beside: Tensor | float) -> Tensor:
        """A block and a number beside each of its rows, (c, r, H, d + 1), for products."""
        *shape, dim = x.shape
        both = self.buffer(name, x, *shape, dim + 1, narrow=True)
        both[..., :dim] = x
        both[..., dim:] = beside
        return both

    def exponents(self, block: Tensor, head: int) -> Tensor:
        """Scaled projections of a block's head on all directions, (c, r, m)."""
        cells, length, _, dim = block.shape
        exponents = self.buffer("exponents", block, cells, length, len(self.directions))
        rows = block[:, :, head].reshape(cells * length, dim)  # a view
        _multiply(rows[None], self.directions.t()[None], exponents.view(1, cells * length, -1))
        return exponents

    def narrowed(self, features: Tensor) -> Tensor:
        """Features for products, (c, r, m)."""
        if features.dtype == self.narrow:
            return features
        return self.buffer("features", features, *features.shape, narrow=True).copy_(features)

    def half_squares(self, keys: Tensor) -> Tensor:
        """|k|²/2 of a block of scaled keys, (c, r, H)."""
        squares = self.buffer("squares", keys, *keys.shape)
        return torch.mul(keys, keys, out=squares).sum(-1) * (self.scale**2 / 2)

    def gradient(self, rows: Tensor, sums: Tensor, features: Tensor) -> Tensor:
        """Gradient of a head's exponents, (c, r, m); `rows` and `sums` are joined."""
        dx = self.buffer("dx", rows, *features.shape, narrow=True)
        return _multiply(rows, sums.transpose(-1, -2), dx).mul_(features)

    def back(self, gradient: Tensor, block: Tensor, head: int) -> None:
        """Write a head's gradient from that of its exponents, (c, r, m), into a block."""
        cells, length, _, dim = block.shape
        rows = block[:, :, head].reshape(cells * length, dim)  # a view
        _multiply(gradient.view(1, cells * length, -1), self.narrow_directions[None], rows[None])


def _multiplies_narrowly(q: Tensor, v: Tensor) -> bool:
    if q.dtype != torch.bfloat16 or v.dtype != torch.bfloat16:
        return False
    return torch.compiler.is_compiling() or q.device.type != "cpu" or multiplies_bf16()


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
    center = v.mean(1, keepdim=True, dtype=work.wide)
    rest = torch.zeros_like(center)  # of Σ (v - center), which is zero, what rounding leaves
    for group, parts in work.parts(k):
        for part in parts:
            keys = work.block("keys", k, part)
            values = work.block("values", v, part).sub_(center[group])
            values = work.joined("joined", values, 1)[..., :dim]
            rest[group] += values.sum(1, keepdim=True, dtype=work.wide)
            half = work.half_squares(keys)
            for head in range(heads):
                total, count, largest = (x[group, head] for x in (sums, counts, maxima))
                exponents = work.exponents(keys, head).sub_(half[:, :, head, None])
                grown = torch.maximum(largest, exponents.amax((-1, -2), keepdim=True))
                shrink = torch.exp(largest - grown)  # what was summed below a smaller maximum
                largest.copy_(grown)
                e = exponents.sub_(grown).exp_()
                product = work.buffer("sums", k, len(e), features, dim, narrow=True)
                _multiply(work.narrowed(e).transpose(-1, -2), values[:, :, head], product)
                total.mul_(shrink).add_(product)
                count.mul_(shrink).add_(e.sum(1).unsqueeze(-1))
    counts.add_(work.epsilon * k.shape[1])
    sums.add_(rest.transpose(1, 2), alpha=work.epsilon)
    # A center below the last digits of the values is lost in them, for all tokens alike.
    center -= rest / k.shape[1]
    more = sums.sum(2, keepdim=True) / counts.sum(2, keepdim=True)  # (B, H, 1, d)
    sums.sub_(counts * more)
    return _Sums(sums, counts, center + more.transpose(1, 2)), maxima


def _read_queries(
    work: _Tiles, q: Tensor, sums: _Sums, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Attended values, (B, n, H, d), and what each was divided by, (B, n, H, 1)."""
    out = torch.empty(q.shape, dtype=dtype, device=q.device)
    divisors = q.new_empty(*q.shape[:-1], 1, dtype=work.wide)
    count_floor = sums.counts.sum(-2).unsqueeze(1) * work.epsilon  # (B, 1, H, 1)
    values = sums.values.to(work.narrow)
    for group, parts in work.parts(q):
        for part in parts:
            queries = work.block("queries", q, part)
            read = work.buffer("read", q, *queries.shape, narrow=True)
            divisor = divisors[part]
            for head in range(q.shape[2]):
                # |q|²/2 is the same for all features of a query and cancels in the division.
                exponents = work.exponents(queries, head)
                e = exponents.sub_(exponents.amax(-1, keepdim=True)).exp_()
                _multiply(work.narrowed(e), values[group, head], read[:, :, head])
                divisor[:, :, head].copy_(e @ sums.counts[group, head])
            divisor.add_(count_floor[group])
            attended = queries.copy_(read).div_(divisor)  # ε Σ S is nothing
            out[part].copy_(attended.add_(sums.center[group]))
    return out, divisors


def _queries_backward(
    work: _Tiles, q: Tensor, sums: _Sums, divisors: Tensor, grad: Tensor
) -> tuple[Tensor, _Sums]:
    """Gradients of the queries and of the sums over keys."""
    grad_q = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    grad_sums = sums._replace(
        values=torch.zeros_like(sums.values), counts=torch.zeros_like(sums.counts)
    )
    joined_sums = sums.joined(work.narrow)
    for group, parts in work.parts(q):
        for part in parts:
            queries = work.block("queries", q, part)
            ga = work.block("grad", grad, part).div_(divisors[part])
            # a is read again: what was attended has been rounded, with c in it.
            gb = torch.empty_like(divisors[part])
            joined = work.joined("joined", ga, 0)
            gradient = work.buffer("gradient", q, *queries.shape, narrow=True)
            for head in range(q.shape[2]):
                exponents = work.exponents(queries, head)
                e = exponents.sub_(exponents.amax(-1, keepdim=True)).exp_()
                features, rows, total = (
                    work.narrowed(e),
                    joined[:, :, head],
                    joined_sums[group, head],
                )
                read = work.buffer("read", q, *rows[..., :-1].shape, narrow=True)
                _multiply(features, total[..., :-1], read)
                along = (ga[:, :, head] * read).sum(-1, keepdim=True)
                across = along.div_(divisors[part][:, :, head]).neg_()  # g_b, (c, r, 1)
                gb[:, :, head] = rows[..., -1:] = across
                product = work.buffer("sums", q, *sums.values[group, head].shape, narrow=True)
                _multiply(features.transpose(-1, -2), rows[..., :-1], product)
                grad_sums.values[group, head] += product
                per_feature = across.transpose(-1, -2) @ e  # (c, 1, m)
                grad_sums.counts[group, head] += per_feature.transpose(-1, -2)
                work.back(work.gradient(rows, total, features), gradient, head)
            grad_q[part].copy_(gradient)
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
    joined_sums = grad_sums.joined(work.narrow)
    for group, parts in work.parts(k):
        for part in parts:
            keys = work.block("keys", k, part)
            values = work.block("values", v, part).sub_(grad_sums.center[group])
            joined = work.joined("joined", values, 1)
            gradient = work.buffer("gradient", k, *keys.shape, narrow=True)
            read = work.buffer("read", k, *values.shape, narrow=True)
            half = work.half_squares(keys)
            along = torch.empty_like(half)
            for head in range(k.shape[2]):
                exponents = work.exponents(keys, head).sub_(half[:, :, head, None])
                features = work.narrowed(exponents.sub_(maxima[group, head]).exp_())
                total = joined_sums[group, head]
                _multiply(features, total[..., :-1], read[:, :, head])
                dx = work.gradient(joined[:, :, head], total, features)
                along[:, :, head] = dx.sum(-1, dtype=work.wide)
                work.back(dx, gradient, head)
            along = along.mul_(-(work.scale**2)).unsqueeze(-1)
            grad_k[part].copy_(keys.mul_(along).add_(gradient))
            grad_v[part].copy_(values.copy_(read).add_(floor[group]))
    return grad_k, grad_v
