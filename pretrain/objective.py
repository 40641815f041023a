"""Masked-gene reconstruction: head and loss."""

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.encoder import ExpressionEncoder
from pretrain.engine import TrainingEngine
from pretrain.masking import MaskedBatch, PackedMaskedBatch


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
        self,
        inputs: Tensor,
        read: Tensor,
        targets: Tensor,
        genes: Tensor | None = None,
        offsets: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstruct the targets; only they are encoded to the end.

        Args:
            inputs: Tokens with hidden genes, or values of a continuous encoder: of the whole panel,
                (B, G); packed, (n,).
            read: Position of each target among the encoder's states, in rising order, (T,).
            targets: True bin of each target, (T,).
            genes: Packed cells: panel position of each token, (n,).
            offsets: Packed cells: first token of each, and n at the end, (B + 1,).

        Returns:
            Sums over the T targets; both are 0, with a gradient of 0, when there is none.
        """
        if genes is None or offsets is None:
            states = self.encoder(inputs, read)  # (T, D)
        else:
            states = self.encoder.encode(genes, inputs, offsets, read)
        logits = self.head(states).float()  # (T, tokens)
        targets = targets.long()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        # Without targets the sum is empty: tie it to the graph, so that every rank runs backward.
        loss = loss + 0.0 * states.float().sum()
        return Reconstruction(loss, (logits.argmax(-1) == targets).sum())


def to_tensors(batch: MaskedBatch | PackedMaskedBatch, device: torch.device) -> tuple[Tensor, ...]:
    """Move a masked batch to a device, in the order of `MaskedGeneModel.forward`."""
    arrays: tuple[NDArray[Any], ...]
    inputs = batch.inputs if batch.values is None else batch.values
    if isinstance(batch, PackedMaskedBatch):
        arrays = (inputs, batch.read, batch.targets, batch.genes, batch.offsets)
    else:
        length = batch.inputs.shape[1] + 1  # the constant position follows the genes
        arrays = (inputs, batch.cells * length + batch.genes, batch.targets)
    return tuple(torch.from_numpy(array).to(device) for array in arrays)


def model_of(engine: TrainingEngine) -> MaskedGeneModel:
    """Give the model inside an engine."""
    model = engine.model
    assert isinstance(model, MaskedGeneModel)
    return model
