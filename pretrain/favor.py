"""FAVOR+ attention whose random features never sink to zero.

performer-pytorch subtracts the largest projection first and |k|²/2 afterwards, so keys (and
queries) of unit variance underflow to the additive epsilon and the attention becomes uniform; the
published scBERT takes that maximum over the whole batch besides, so a cell's result depends on its
neighbours. Here the maximum is taken per cell and head, of the complete exponent. Parameters and
state dict are those of performer-pytorch's `FastAttention`. (Choromanski et al. 2021, "Rethinking
attention with performers", equations 5 to 7 and Lemma 1.)
"""

import functools
import logging
import warnings
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from pretrain.favor_checks import cell_lengths, check_attention, type_name
from pretrain.favor_compiled import as_operation
from pretrain.favor_native import native_attention, unavailable
from pretrain.favor_tiled import tiled_attention

with warnings.catch_warnings():
    # performer-pytorch imports interfaces that Python and torch are about to drop.
    warnings.simplefilter("ignore", DeprecationWarning)
    warnings.simplefilter("ignore", FutureWarning)
    from performer_pytorch.performer_pytorch import (
        FastAttention,
        Performer,
        PreLayerNorm,
        gaussian_orthogonal_random_matrix,
    )

__all__ = [
    "EPSILON",
    "KERNELS",
    "FavorAttention",
    "Performer",
    "PreLayerNorm",
    "draw_projection",
    "favor_attention",
    "fresh_projection",
]

EPSILON = 1e-4
"""Added to every feature, relative to the largest; performer-pytorch's value."""

KERNELS = ("auto", "native", "torch", "reference")
"""Implementations: `native` is compiled for this CPU and takes bf16 and float32;
`torch` works in tiles of the sequence, `reference` writes the whole feature maps down (to compare
with), `auto` takes the first of these that can run."""

_logger = logging.getLogger(__name__)


class FavorAttention(FastAttention):  # type: ignore[misc]
    """Linear attention by positive orthogonal random features, one cell at a time."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attend.

        Args:
            q: Queries, (B, H, n, d), as performer-pytorch lays them out.
            k: Keys, (B, H, n, d).
            v: Values, (B, H, n, d).

        Returns:
            Attended values, (B, H, n, d).
        """
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return favor_attention(q, k, v, self.projection_matrix).transpose(1, 2)


def favor_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    offsets: Tensor | None = None,
    query_offsets: Tensor | None = None,
    *,
    kernel: str = "auto",
    epsilon: float = EPSILON,
) -> Tensor:
    """Approximate softmax(q kᵀ / √d) v within each cell, in time linear in its length.

    Cells are either of one length, dense, or packed one behind the other with `offsets`. Both forms
    can be compiled without graph breaks: of dense cells torch.compile sees the tiles, packed cells
    are one operation, for which it takes the same kernels as without (see `favor_compiled`).

    Args:
        q: Queries, floats (B, n, H, d); packed (Q, H, d).
        k: Keys, (B, n, H, d); packed (tokens, H, d).
        v: Values, as the keys.
        projection: Random directions, (m, d); constants, to which no gradient flows.
        offsets: Packed cells: first token of each cell and their number at the end, int64 (B + 1,).
        query_offsets: The same for the queries, if they are other positions than the keys'. A cell
            may have no queries, but not no keys.
        kernel: Which implementation, see `KERNELS`.
        epsilon: Added to each feature, 0 or more.

    Returns:
        Attended values in the shape of `q` and the type of `v`.

    Raises:
        ValueError: If shapes, types, devices, offsets, epsilon or the kernel's name do not fit.
    """
    if kernel not in KERNELS:
        raise ValueError(f"kernel is {kernel!r}; choose one of {', '.join(KERNELS)}")
    check_attention(q, k, v, projection, epsilon, packed=offsets is not None)
    projection = projection.detach()
    if offsets is None:
        if query_offsets is not None:
            raise ValueError("query_offsets are for packed cells; give offsets, too, or neither")
        return _attend_dense(q, k, v, projection, kernel, epsilon)
    attend = _packed_operation if torch.compiler.is_compiling() else _attend_packed
    return attend(q, k, v, projection, offsets, query_offsets, kernel, epsilon)


def _attend_packed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    projection: Tensor,
    offsets: Tensor,
    query_offsets: Tensor | None,
    kernel: str,
    epsilon: float,
) -> Tensor:
    lengths = cell_lengths(offsets, len(k), "offsets", least=1)
    if query_offsets is None:
        query_lengths = cell_lengths(offsets, len(q), "offsets", least=1)
    else:
        query_lengths = cell_lengths(query_offsets, len(q), "query_offsets", least=0)
    if len(lengths) != len(query_lengths):
        raise ValueError(
            f"offsets tell of {len(lengths)} cells, query_offsets of {len(query_lengths)}"
        )
    kernel = _resolve(kernel, q, k, v)
    if kernel == "native":
        ends = offsets if query_offsets is None else query_offsets
        return native_attention(q, k, v, projection, epsilon, offsets.cpu(), ends.cpu())
    if kernel == "torch":
        return tiled_attention(q, k, v, projection, epsilon, (query_lengths, lengths))
    cells = zip(q.split(query_lengths), k.split(lengths), v.split(lengths), strict=True)
    attended = [_reference(a[None], b[None], c[None], projection, epsilon)[0] for a, b, c in cells]
    return torch.cat(attended) if attended else q[:0].to(v.dtype, copy=True)


_packed_operation = as_operation("scbert::packed_attention", _attend_packed)


def _attend_dense(
    q: Tensor, k: Tensor, v: Tensor, projection: Tensor, kernel: str, epsilon: float
) -> Tensor:
    kernel = _resolve(kernel, q, k, v)
    if kernel == "native":
        queries, keys, values = (x.flatten(0, 1) for x in (q, k, v))  # views, as a rule
        offsets, ends = (torch.arange(len(q) + 1) * x.shape[1] for x in (k, q))
        attended = native_attention(queries, keys, values, projection, epsilon, offsets, ends)
        return attended.view(q.shape)
    function = tiled_attention if kernel == "torch" else _reference
    return function(q, k, v, projection, epsilon)


def _resolve(kernel: str, q: Tensor, k: Tensor, v: Tensor) -> str:
    """The implementation to take; a native kernel that cannot run is refused, or passed over."""
    if q.is_meta and kernel in ("auto", "torch"):
        return "reference"  # only shapes are computed; tiles need memory
    if kernel not in ("auto", "native"):
        return kernel
    if torch.compiler.is_compiling():
        return "torch"
    problem = _mixed(q, k, v) or unavailable(q, k, v)
    if problem is None:
        return "native"
    if kernel == "native":
        raise ValueError(f"kernel is 'native', but {problem}; choose 'auto' or 'torch'")
    if q.dtype in (torch.bfloat16, torch.float32) and q.device.type == "cpu":
        _note_fallback(problem)
    return "torch"


def _mixed(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    if q.dtype == k.dtype == v.dtype:
        return None
    types = ", ".join(f"{name} is {type_name(x)}" for name, x in (("q", q), ("k", k), ("v", v)))
    return f"{types}, and it takes one type"


@functools.cache
def _note_fallback(problem: str) -> None:
    _logger.info("attention runs without the native kernel: %s", problem)


def _reference(q: Tensor, k: Tensor, v: Tensor, projection: Tensor, epsilon: float) -> Tensor:
    # Exponents need float32: bf16 has no digits left at |k|²/2 of 30.
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.25
    directions = projection.to(wide).t() * scale  # (d, m)
    with _no_autocast(q):
        q, k, values = (x.to(wide).transpose(1, 2) for x in (q, k, v))  # (B, H, n, d)
        # |q|²/2 is the same for all features of a query and cancels in the normalization.
        exponent = q @ directions  # (B, H, n, m)
        query = torch.exp(exponent - exponent.amax(-1, keepdim=True).detach()) + epsilon
        exponent = k @ directions - (k * scale).square().sum(-1, keepdim=True) / 2
        key = torch.exp(exponent - exponent.amax((-1, -2), keepdim=True).detach()) + epsilon
        context = key.transpose(-1, -2) @ values  # (B, H, m, d)
        normalizer = query @ key.sum(-2).unsqueeze(-1)  # (B, H, n, 1)
        return (query @ context / normalizer).transpose(1, 2).to(v.dtype)


def _no_autocast(x: Tensor) -> AbstractContextManager[Any]:
    # There is no autocast for meta, and asking for it fails.
    return nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False)


def draw_projection(num_features: int, dim_head: int, seed: int) -> Tensor:
    """Draw orthogonal random directions of Gaussian length, (m, d), float32 on the CPU.

    The same seed gives the same directions on every rank and device; torch's global generator,
    from which performer-pytorch draws, is left as it was.
    """
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        drawn: Tensor = gaussian_orthogonal_random_matrix(num_features, dim_head, scaling=0)
        # QR fixes the signs of its factors, so performer-pytorch's directions have a mean other
        # than zero and its attention a bias; random signs make them uniform on the sphere.
        signs = 2 * torch.randint(2, (num_features, 1)) - 1
        return drawn.float() * signs


def fresh_projection(
    num_features: int, dim_head: int, device: torch.device | str | None = None
) -> Tensor:
    """Draw directions as `draw_projection` does, of a seed from torch's global generator."""
    seed = int(torch.randint(2**62, (), device="cpu"))
    return draw_projection(num_features, dim_head, seed).to(device)
