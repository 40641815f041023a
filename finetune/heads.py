"""Heads: what turns the states of a cell's genes into logits.

A head gives logits (B, C) and a cell embedding (B, bottleneck). `ExpressionLogits` adds what linear
experts say of the cell's expression, so that the network only has to learn what they cannot say.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from finetune.config import HeadConfig
from finetune.expert_pool import ExpertPool
from finetune.expression import on_scale


class ConvHead(nn.Module):
    """One value per gene by convolution, then two layers, then classes (scBERT, Methods).

    Between convolution and layers the published head has a ReLU; with `normalize` the values are
    brought to mean 0 and variance 1 over the training cells instead. In evaluation these are
    constants, so a cell's result does not depend on its batch.
    """

    def __init__(self, dim: int, length: int, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        # A convolution with a kernel of 1 × D over the embedding is a linear map per gene.
        self.convolution = nn.Linear(dim, 1)
        self.activation = nn.BatchNorm1d(length, affine=False) if config.normalize else nn.ReLU()
        # Normalization takes the bias away again: trained, it would follow rounding errors.
        self.convolution.bias.requires_grad_(not config.normalize)
        self.hidden = nn.Linear(length, config.hidden)
        self.bottleneck = nn.Linear(config.hidden, config.bottleneck)
        self.classes = nn.Linear(config.bottleneck, num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Classify.

        Args:
            states: Encoder states, (B, G + 1, D).
            tokens: Not used: every gene has its place here.

        Returns:
            Logits, (B, C), and the cell embedding, (B, bottleneck).
        """
        per_gene = self.activation(self.convolution(states).squeeze(-1))  # (B, G + 1)
        hidden = self.dropout(torch.relu(self.hidden(per_gene)))
        embedding = torch.relu(self.bottleneck(hidden))
        return self.classes(self.dropout(embedding)), embedding


class PooledHead(nn.Module):
    """Mean and attention over the states of a cell's expressed genes, one layer, classes.

    Its size does not depend on the number of genes, so it suits few cells and the expressed-only
    sequence. The constant position counts as expressed: a cell without counts has a state.
    """

    def __init__(self, dim: int, length: int, num_classes: int, config: HeadConfig) -> None:
        super().__init__()
        self.query = nn.Linear(dim, 1)
        self.query.bias.requires_grad_(False)  # shifts all scores alike: of no effect
        self.norm = nn.LayerNorm(2 * dim)
        self.bottleneck = nn.Linear(2 * dim, config.bottleneck)
        self.classes = nn.Linear(config.bottleneck, num_classes)
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Classify: states (B, G + 1, D) and tokens (B, G) to logits and embedding."""
        is_shown = nn.functional.pad(tokens > 0, (0, 1), value=True)
        sizes = is_shown.sum(dim=1)
        offsets = nn.functional.pad(sizes.cumsum(0), (1, 0))
        return self.packed(states[is_shown], offsets)

    def packed(self, states: Tensor, offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Classify cells whose states stand one after the other.

        Args:
            states: States of all cells' genes, (T, D).
            offsets: Where each cell begins, and T, int64 of shape (B + 1,); no cell is empty.
        """
        sizes = offsets.diff()
        cell = torch.repeat_interleave(torch.arange(len(sizes), device=states.device), sizes)
        scores = self.query(states).squeeze(-1)  # (T,)
        highest = torch.full_like(sizes, -torch.inf, dtype=scores.dtype)
        highest = highest.scatter_reduce(0, cell, scores.detach(), "amax")
        weights = (scores - highest[cell]).exp()[:, None]
        blank = states.new_zeros(len(sizes), states.shape[1])
        attended = blank.index_add(0, cell, weights * states)
        attended = attended / weights.new_zeros(len(sizes), 1).index_add(0, cell, weights)
        mean = blank.index_add(0, cell, states) / sizes[:, None]
        pooled = self.norm(torch.cat([mean, attended], dim=1))
        embedding = torch.relu(self.bottleneck(self.dropout(pooled)))
        return self.classes(self.dropout(embedding)), embedding


HEADS: dict[str, Callable[[int, int, int, HeadConfig], ConvHead | PooledHead]] = {
    "conv1d": ConvHead,
    "pooled": PooledHead,
}
"""Heads by the name in `head.kind`: (D, G + 1, C, config) → head."""


class ExpressionLogits(nn.Module):
    """Pooled linear experts on expression: one matrix on each scale, fixed once fitted."""

    genes: Tensor
    compared: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, num_genes: int, num_classes: int, scales: Sequence[str]) -> None:
        super().__init__()
        self.scales = tuple(scales)
        self.register_buffer("genes", torch.zeros(num_genes, dtype=torch.long))
        self.register_buffer("compared", torch.ones(num_genes, dtype=torch.bool))
        self.register_buffer("weight", torch.zeros(len(scales), num_classes, num_genes))
        self.register_buffer("bias", torch.zeros(num_classes))

    def forward(self, rates: Tensor) -> Tensor:
        """Logits, (B, C), of counts per 10,000 in panel order, (B, G)."""
        seen = rates[:, self.genes]
        logits = self.bias.expand(len(rates), -1)
        for scale, weight in zip(self.scales, self.weight, strict=True):
            logits = logits + on_scale(seen, scale, self.compared) @ weight.T
        return logits


def expression_logits(pool: ExpertPool) -> ExpressionLogits:
    """Make the module of a fitted pool."""
    scales = list(pool.maps)
    module = ExpressionLogits(len(pool.genes), len(pool.classes), scales)
    module.genes.copy_(torch.from_numpy(pool.genes))
    module.compared.copy_(torch.from_numpy(pool.compared))
    module.weight.copy_(torch.from_numpy(np.stack([pool.maps[scale].weight for scale in scales])))
    module.bias.copy_(torch.from_numpy(np.sum([pool.maps[s].bias for s in scales], axis=0)))
    return module
