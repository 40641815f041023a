"""Tiles of a sequence: how tiled attention is cut, and what its four passes have in common.

A tile has some positions of all heads, or of several cells that are short, and is laid out by
heads: (c, H, r, d), so that all heads are multiplied at once.
"""

import math
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor

from pretrain.products import multiplies_bf16

CPU_ROWS = 1536
"""Rows of a tile on the CPU: their exponents take 1.6 MB at 266 features, the features half."""
GPU_ROWS = 1 << 16
"""Rows of a tile elsewhere: enough to fill a GPU, and 0.3 GB for all buffers at 266 features."""

LOG2_E: Final = math.log2(math.e)

Part = tuple[slice, slice]
"""Cells and positions of a block of a (B, n, H, d) tensor."""


class Tiles:
    """How a call is cut into tiles, and the steps that all four passes share.

    Sums, and exponents less their maximum, are float32 (float64 for float64 inputs): bf16 has no
    digits left at |k|²/2 of 30. What is multiplied, and each product, is bf16 for bf16 inputs,
    where that is fast.
    """

    def __init__(self, q: Tensor, v: Tensor, projection: Tensor, epsilon: float, rows: int) -> None:
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.narrow = torch.bfloat16 if _multiplies_narrowly(q, v) else self.wide
        self.epsilon = epsilon
        self.rows = rows
        self.scale: float = q.shape[-1] ** -0.25
        directions = projection.to(self.wide) * self.scale  # (m, d)
        self.directions = directions.to(self.narrow)
        # Exponents are taken to base 2: torch raises it three times as fast as e on some CPUs.
        ones = torch.ones_like(directions[:, :2])
        self.binary_directions = torch.cat((directions * LOG2_E, ones), 1).to(self.narrow)
        self._buffers: dict[str, Tensor] = {}

    def parts(self, x: Tensor) -> Iterator[tuple[slice, list[Part]]]:
        """Cells that share tiles (several if they are short), and their blocks of positions."""
        positions = max(self.rows // x.shape[2], 1)
        cells = max(positions // max(x.shape[1], 1), 1)
        for b in range(0, x.shape[0], cells):
            group = slice(b, min(b + cells, x.shape[0]))
            starts = range(0, x.shape[1], positions)
            yield group, [(group, slice(s, min(s + positions, x.shape[1]))) for s in starts]

    def buffer(self, name: str, like: Tensor, *shape: int, narrow: bool = False) -> Tensor:
        """Memory of a shape, the same at every call with one name."""
        size = torch.Size(shape).numel()
        held = self._buffers.get(name)
        if held is None or held.numel() < size:
            dtype = self.narrow if narrow else self.wide
            held = self._buffers[name] = like.new_empty(size, dtype=dtype)
        return held[:size].view(shape)

    def widened(self, name: str, x: Tensor) -> Tensor:
        """A copy in wide numbers; `x` itself if it is a buffer of such."""
        return x if x.dtype == self.wide else self.buffer(name, x, *x.shape).copy_(x)

    def narrowed(self, name: str, x: Tensor) -> Tensor:
        """A copy for products; `x` itself if it is a buffer of such numbers."""
        return x if x.dtype == self.narrow else self.buffer(name, x, *x.shape, narrow=True).copy_(x)

    def product(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """Products of matrices, (c, H, ., .), in narrow numbers."""
        out = self.buffer(name, a, *a.shape[:-1], b.shape[-1], narrow=True)
        if torch.compiler.is_compiling():
            return out.copy_(a @ b)  # torch.compile fuses as it likes
        torch.bmm(a.flatten(0, 1), b.flatten(0, 1), out=out.flatten(0, 1))
        return out

    def wide_like(self, name: str, x: Tensor) -> Tensor:
        """Memory for wide numbers in the shape of a tensor."""
        return self.buffer(name, x, *x.shape)

    def less(self, values: Tensor, center: Tensor) -> tuple[Tensor, Tensor]:
        """A block of values less their center, in wide and in narrow numbers, (c, H, r, d)."""
        exact = torch.sub(values, center, out=self.wide_like("values", values))
        return exact, self.narrowed("narrow values", exact)

    def key_exponents(self, keys: Tensor) -> Tensor:
        """Exponents of a block of keys, (c, H, r, m)."""
        exponents, more = self._exponents(keys)
        return exponents.add_(more)

    def query_features(self, queries: Tensor) -> Tensor:
        """e_q of a block, (c, H, r, m)."""
        # What is the same for all features of a query, as |q|²/2 is, cancels in the division.
        exponents, _ = self._exponents(queries)
        return exponents.sub_(exponents.amax(-1, keepdim=True)).exp2_()

    def back(self, gradient: Tensor) -> Tensor:
        """Gradient of a block from that of its projections, (c, H, r, d)."""
        narrow = self.narrowed("product", gradient)
        out = self.buffer(
            "gradient", gradient, *gradient.shape[:-1], self.directions.shape[1], narrow=True
        )
        _multiply(narrow.flatten(0, 2), self.directions, out.flatten(0, 2))
        return out

    def _exponents(self, block: Tensor) -> tuple[Tensor, Tensor]:
        """Projections x on all directions less a shift, and what this is more than |x|²/2.

        A bf16 number has three digits, so what the product gives should be small where it matters.
        Projections on random directions are spread by |x| around zero; the largest features have
        |x|² of it, but none is likely to have more than 3 |x|. That is the shift. It stands in two
        columns beside each row: in narrow numbers, and what is lost of it there.
        """
        *shape, dim = block.shape
        norm = torch.linalg.vector_norm(block, dim=-1, keepdim=True, dtype=self.wide) * self.scale
        shift = norm.clamp(max=3).mul_(norm).mul_(LOG2_E)
        rows = self.buffer("rows", block, *shape, dim + 2, narrow=True)
        rows[..., :dim] = block
        rows[..., dim : dim + 1] = -shift
        rows[..., dim + 1 :] = -shift - rows[..., dim : dim + 1]
        product = self.buffer("product", block, *shape, len(self.directions), narrow=True)
        _multiply(rows.flatten(0, 2), self.binary_directions.t(), product.flatten(0, 2))
        more = torch.addcmul(shift, norm, norm, value=-LOG2_E / 2)
        return self.widened("exponents", product), more


def cut(x: Tensor, part: Part) -> Tensor:
    """A block by heads, (c, H, r, d), of (B, n, H, d); dense, for memory is passed only once so."""
    return x[part].transpose(1, 2).contiguous()


def put(block: Tensor, x: Tensor, part: Part) -> None:
    """Write a block by heads, (c, H, r, d), where it belongs in (B, n, H, d)."""
    x[part].transpose(1, 2).copy_(block.to(x.dtype))


def _multiplies_narrowly(q: Tensor, v: Tensor) -> bool:
    if q.dtype != torch.bfloat16 or v.dtype != torch.bfloat16:
        return False
    return torch.compiler.is_compiling() or q.device.type != "cpu" or multiplies_bf16()


def _multiply(a: Tensor, b: Tensor, out: Tensor) -> None:
    if torch.compiler.is_compiling():
        out.copy_(a @ b)
    else:
        torch.mm(a, b, out=out)
