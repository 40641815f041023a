"""Masked-gene reconstruction: head and loss."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from pretrain.encoder import ExpressionEncoder
from pretrain.masking import MaskedBatch


class Reconstruction(NamedTuple):
    """Sums over the targets of a micro-batch; the caller divides by the global number."""

    loss: Tensor
    """Cross-entropy in nats, scalar with gradient."""
    correct: Tensor
    """Targets whose likeliest bin is the true one, int64 scalar."""


class MaskedGeneModel(nn.Module):
    """Encoder and a linear head that names the bin of each target."""

    def __init__(self, encoder: ExpressionEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.dim, encoder.binning.num_tokens)

    def forward(
        self, inputs: Tensor, cells: Tensor, genes: Tensor, targets: Tensor
    ) -> Reconstruction:
        """Reconstruct the targets.

        Args:
            inputs: Tokens with hidden genes, (B, G).
            cells: Row of each target, (T,).
            genes: Column of each target, (T,).
            targets: True bin of each target, (T,).

        Returns:
            Sums over the T targets; both are 0, with a gradient of 0, when there is none.
        """
        states = self.encoder(inputs)[cells, genes]  # (T, D)
        logits = self.head(states).float()  # (T, tokens)
        targets = targets.long()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        # Without targets the sum is empty: tie it to the graph, so that every rank runs backward.
        loss = loss + 0.0 * states.float().sum()
        return Reconstruction(loss, (logits.argmax(-1) == targets).sum())


def to_tensors(batch: MaskedBatch, device: torch.device) -> tuple[Tensor, ...]:
    """Move a masked batch to a device, in the order of `MaskedGeneModel.forward`."""
    arrays = (batch.inputs, batch.cells, batch.genes, batch.targets)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)
