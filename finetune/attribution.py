"""Which genes decided: attention that a gene received, gradient × input, and the linear part.

Three views of a cell, each a number per gene of the panel, 0 where the gene is not expressed:

- `attention`: the column mean of the attention matrix, averaged over heads and blocks, times the
  sequence's length: 1 is what a gene gets when attention is uniform.
- `gradient`: of the network's logit for the cell's type, less the mean logit, with respect to the
  embedding of each gene's expression, times what that embedding is more than that of no expression.
- `expression`: what the linear experts on expression add to that logit, weight × value.

The last two are in logits, so that their sum is a view as well: `logit`, what a gene adds to the
evidence for the type. No n × n matrix is made: with features q' and k' of queries and keys, and
D = q' Σ k', the column mean of attention is ((mean over queries of q' / D) · k'), in O(n·m).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor, nn

from finetune.classifier import CellClassifier, dense_rates, token_batches
from finetune.expression import on_scale
from pretrain.favor import EPSILON

VIEWS: Final = ("attention", "gradient", "expression", "logit")
_Views = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Attribution:
    """Views of some cells: the type that each got, (B,), and by name a number per gene, (B, G)."""

    codes: NDArray[np.int64]
    views: _Views


def attribute(
    model: CellClassifier,
    counts: sparse.csr_matrix,
    batch_size: int,
    views: tuple[str, ...] = VIEWS,
) -> Iterator[Attribution]:
    """Say for each cell and gene what the gene did for the type that the cell gets.

    Args:
        model: The classifier.
        counts: Raw counts in panel order, (N, G).
        batch_size: Cells at a time; the result does not depend on it.
        views: Which are wanted; attention alone needs no backward pass.

    Yields:
        Batch by batch, in order.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    starts = range(0, counts.shape[0], batch_size)
    batches = token_batches(counts, batch_size, model.encoder)
    for start, tokens in zip(starts, batches, strict=True):
        rates = dense_rates(counts[start : start + batch_size], device)
        yield _attribute(model, tokens.to(device), rates, views)
    model.train(was_training)


def column_mean_attention(
    q: Tensor, k: Tensor, projection: Tensor, *, epsilon: float = EPSILON
) -> Tensor:
    """Attention that each position of a cell receives, averaged over queries and heads.

    Args:
        q: Queries of one cell, (n, H, d).
        k: Keys, (n, H, d).
        projection: Random directions, (m, d).
        epsilon: Added to each feature, as `pretrain.favor` does.

    Returns:
        Column means of the attention matrix, (n,); they sum to 1.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    scale = q.shape[-1] ** -0.25
    directions = projection.to(wide).t() * scale  # (d, m)
    means = q.new_zeros(len(q), dtype=wide)
    for head in range(q.shape[1]):  # one at a time: features of all would take H × n × m
        queries, keys = q[:, head].to(wide), k[:, head].to(wide)
        exponent = queries @ directions
        query = torch.exp(exponent - exponent.amax(-1, keepdim=True)) + epsilon  # (n, m)
        exponent = keys @ directions - (keys * scale).square().sum(-1, keepdim=True) / 2
        key = torch.exp(exponent - exponent.amax()) + epsilon
        normalizer = query @ key.sum(0)  # (n,)
        means += key @ (query / normalizer[:, None]).mean(0)
    return means / q.shape[1]


def _attribute(
    model: CellClassifier, tokens: Tensor, rates: Tensor, views: tuple[str, ...]
) -> Attribution:
    needs_gradient = not {"gradient", "logit"}.isdisjoint(views)
    with _observed(model, needs_gradient) as seen, torch.set_grad_enabled(needs_gradient):
        logits, _ = model(tokens, rates)
        codes = logits.argmax(dim=1)
        # Calibration divides all logits by one number; reasons are told before it.
        margin = (logits.gather(1, codes[:, None])[:, 0] - logits.mean(dim=1)) * model.temperature
        gradient = None
        if needs_gradient:
            (gradient,) = torch.autograd.grad(margin.sum(), seen.embedding)
    shown = (tokens > 0).float()
    found: dict[str, Tensor] = {}
    if "attention" in views:
        # Scaled by the length of each cell's own sequence, the constant position included.
        attention = _spread(model, tokens, torch.cat(seen.attention)) / len(model.encoder.blocks)
        found["attention"] = attention * shown
    if gradient is not None:
        none = model.encoder.expression(torch.zeros_like(tokens[:1, :1])).detach().reshape(-1)
        towards = (gradient * (seen.embedding.detach() - none)).sum(-1)
        found["gradient"] = _spread(model, tokens, towards.flatten()) * shown
    if "expression" in views or "logit" in views:
        found["expression"] = _linear_part(model, rates, codes) * shown
    if "logit" in views:
        found["logit"] = found["gradient"] + found["expression"]
    kept = {name: found[name].detach().float().cpu().numpy() for name in views}
    return Attribution(codes.cpu().numpy(), kept)


class _Seen:
    """What the hooks caught: embeddings of expression, and attention summed over blocks."""

    def __init__(self) -> None:
        self.embedding: Any = None
        self.blocks = 0
        self.attention: list[Tensor] = []
        """Per cell: attention received, times its length, summed over blocks, (n,)."""

    def add(self, offsets: Tensor, q: Tensor, k: Tensor, directions: Tensor) -> None:
        cells = [
            column_mean_attention(q[a:b], k[a:b], directions) * (b - a)
            for a, b in pairwise(offsets.tolist())
        ]
        self.blocks += 1
        former = self.attention or [torch.zeros_like(cell) for cell in cells]
        self.attention = [a + b for a, b in zip(former, cells, strict=True)]


@contextmanager
def _observed(model: CellClassifier, needs_gradient: bool) -> Iterator[_Seen]:
    """Watch the encoder at work: embeddings, and queries and keys of every block."""
    seen = _Seen()

    def keep_embedding(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        seen.embedding = output.detach().requires_grad_(needs_gradient)
        return seen.embedding  # type: ignore[no-any-return]

    def keep_attention(q: Tensor, k: Tensor, directions: Tensor, *offsets: Tensor) -> None:
        with torch.no_grad():
            seen.add(offsets[0], q, k, directions)

    encoder = model.encoder
    attentions = [block[0].fn for block in encoder.performer.net.layers]
    hook = encoder.expression.register_forward_hook(keep_embedding)
    for attention in attentions:
        attention.observer = keep_attention
    try:
        yield seen
        assert seen.blocks == len(attentions), "a block did not show its queries and keys"
    finally:
        hook.remove()
        for attention in attentions:
            attention.observer = None


def _spread(model: CellClassifier, tokens: Tensor, packed: Tensor) -> Tensor:
    """Values of all positions of the sequence, one cell after the other, as (B, G)."""
    present = torch.ones_like(tokens, dtype=torch.bool)
    if model.encoder.config.sequence == "expressed":
        present = tokens != 0
    present = nn.functional.pad(present, (0, 1), value=True)  # the constant position
    spread = packed.new_zeros(present.shape).masked_scatter(present, packed)
    return spread[:, :-1]


def _linear_part(model: CellClassifier, rates: Tensor, codes: Tensor) -> Tensor:
    """Weight × value of the linear experts for each cell's type, less the mean of types, (B, G)."""
    part = torch.zeros_like(rates)
    experts = model.expression
    if experts is None:
        return part
    seen = rates[:, experts.genes]
    for scale, weight in zip(experts.scales, experts.weight, strict=True):
        own = weight[codes] - weight.mean(dim=0)  # (B, K)
        part[:, experts.genes] += on_scale(seen, scale, experts.compared) * own
    return part
