"""Health of the attention: do its random features still tell keys apart?

Two figures for each block, over cells and heads. The share of key features at the floor, that is
below the epsilon which is added to each: near 1, all keys look alike. The entropy of the mean
attention, divided by that of equal weights: 1 says that on average every position is attended
alike, 0 that it is always the same one. The mean over queries costs as much as the attention
itself, n × m, because it can be taken before the product with the keys.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise

import torch
from torch import Tensor

from pretrain.encoder import ExpressionEncoder
from pretrain.favor import EPSILON
from pretrain.published_attention import published_exponentials


class HealthRecord:
    """Sums over the cells and heads that were seen, block by block."""

    def __init__(self, depth: int) -> None:
        self.floor_share = [0.0] * depth
        self.entropy = [0.0] * depth
        self.num_seen = 0
        """Cells × heads in each block."""

    def sums(self) -> list[float]:
        """All numbers in a row, to be added over ranks."""
        return [*self.floor_share, *self.entropy, float(self.num_seen)]


@contextmanager
def observed(encoder: ExpressionEncoder, record: HealthRecord | None) -> Iterator[None]:
    """Add the health of every attention that is computed inside to a record, if there is one."""
    if record is None:
        yield
        return

    def look(block: int, q: Tensor, k: Tensor, directions: Tensor, *offsets: Tensor | None) -> None:
        key_ends, query_ends = (ends.tolist() for ends in offsets if ends is not None)
        for (a, b), (c, d) in zip(pairwise(query_ends), pairwise(key_ends), strict=True):
            if a == b:
                continue  # a cell where nobody reads
            floor, entropy = attention_health(q[a:b], k[c:d], directions, published)
            record.floor_share[block] += float(floor.sum())
            record.entropy[block] += float(entropy.sum())
            record.num_seen += len(floor) if block == 0 else 0

    published = encoder.config.attention == "published"
    attentions = [block[0].fn for block in encoder.performer.net.layers]
    for number, attention in enumerate(attentions):
        attention.observer = lambda *given, block=number: look(block, *given)
    try:
        yield
    finally:
        for attention in attentions:
            attention.observer = None


def attention_health(
    q: Tensor, k: Tensor, directions: Tensor, published: bool = False
) -> tuple[Tensor, Tensor]:
    """Measure one cell.

    Args:
        q: Queries, (n, H, d).
        k: Keys, (n', H, d).
        directions: Random directions, (m, d).
        published: Whether the model attends as the published code does.

    Returns:
        Of each head, (H,): share of the key features below `EPSILON`, relative to the largest that
        the model's stabiliser allows; and entropy of the attention averaged over queries, from 0
        to 1 (1 for a single key).
    """
    with torch.no_grad():
        q, k, directions = (x.float() for x in (q, k, directions))
        q, k = q.transpose(0, 1), k.transpose(0, 1)  # (H, n, d)
        query, key = (_published if published else _stable)(q, k, directions)
        floor = (key < EPSILON).float().mean((-1, -2))
        key += EPSILON
        query += EPSILON
        query /= query @ key.sum(-2).unsqueeze(-1)
        weights = (key @ query.mean(-2).unsqueeze(-1)).squeeze(-1)  # (H, n'), sums to 1
        entropy = torch.special.entr(weights).sum(-1)
        longest = torch.tensor(float(k.shape[1])).log()
        return floor, entropy / longest if k.shape[1] > 1 else torch.ones_like(entropy)


def _stable(q: Tensor, k: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Features of queries and keys, (H, n, m), relative to the largest of a query and of a head."""
    scale = q.shape[-1] ** -0.25
    exponent = q @ directions.t() * scale
    query = torch.exp(exponent - exponent.amax(-1, keepdim=True))
    exponent = k @ directions.t() * scale - (k * scale).square().sum(-1, keepdim=True) / 2
    return query, torch.exp(exponent - exponent.amax((-1, -2), keepdim=True))


def _published(q: Tensor, k: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    query = published_exponentials(q, directions, (-1,))
    return query, published_exponentials(k, directions, (-3, -2, -1))


def health_metrics(sums: list[float]) -> dict[str, float]:
    """Name the means that follow from `HealthRecord.sums`, added over ranks; none if nothing."""
    *figures, seen = sums
    depth = len(figures) // 2
    if not seen:
        return {}
    names = [
        f"attention_{what}_block_{block + 1}"
        for what in ("floor_share", "entropy")
        for block in range(depth)
    ]
    return {name: figure / seen for name, figure in zip(names, figures, strict=True)}
