"""Masked-gene reconstruction: head and loss."""

from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.encoder import ExpressionEncoder
from pretrain.engine import TrainingEngine
from pretrain.masking import UNKNOWN, MaskedBatch, PackedMaskedBatch


class Reconstruction(NamedTuple):
    """Sums over the targets of a micro-batch; the caller divides by the global number."""

    loss: Tensor
    """Cross-entropy in nats, scalar with gradient."""
    correct: Tensor
    """Targets whose likeliest bin is the true one, int64 scalar."""
    cell: Tensor
    """Of the cell objective: nats per gene, each cell as often as it has targets; 0 without."""


class CellHead(nn.Module):
    """Foretells the bin of every gene from the state of a cell's constant position.

    A normal distribution for each gene, its mean linear in the state, its variance learned: as in
    factor analysis a gene counts by how much of its own variation is explained.
    """

    def __init__(self, dim: int, num_genes: int) -> None:
        super().__init__()
        self.mean = nn.Linear(dim, num_genes)
        self.log_variance = nn.Parameter(torch.zeros(num_genes))

    def forward(self, states: Tensor, whole: Tensor) -> Tensor:
        """Nats per gene of each cell, (B,), over the genes that are known.

        Args:
            states: Of constant positions, (B, D).
            whole: True bins, uint8 (B, G); `UNKNOWN` counts nothing.
        """
        known = (whole != UNKNOWN).float()
        level = self.log_variance.float().clamp(-8, 8)
        apart = whole.float() - self.mean(states).float()
        nats = (apart.square() * torch.exp(-level) + level) / 2
        of_cell: Tensor = (nats * known).sum(1) / known.sum(1).clamp(min=1)
        return of_cell


class MaskedGeneModel(nn.Module):
    """Encoder and a linear head that names the bin of each target.

    Args:
        encoder: The encoder.
        sums_up: Whether the constant position must foretell the whole cell as well.
    """

    def __init__(self, encoder: ExpressionEncoder, sums_up: bool = False) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.dim, encoder.binning.num_tokens)
        self.cell_head = CellHead(encoder.config.dim, encoder.num_genes) if sums_up else None

    def forward(
        self,
        inputs: Tensor,
        read: Tensor,
        targets: Tensor,
        genes: Tensor | None = None,
        offsets: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> Reconstruction:
        """Reconstruct the targets; only they are encoded to the end.

        Args:
            inputs: Tokens with hidden genes, or values of a continuous encoder: of the whole panel,
                (B, G); packed, (n,).
            read: Position of each target among the encoder's states, in rising order, (T,).
            targets: True bin of each target, (T,).
            genes: Packed cells: panel position of each token, (n,).
            offsets: Packed cells: first token of each, and n at the end, (B + 1,).
            whole: With a cell objective the bin of every gene, (B, G).

        Returns:
            Sums over the T targets; both are 0, with a gradient of 0, when there is none.
        """
        if self.cell_head is None or whole is None:
            states, cell = self._states(inputs, read, genes, offsets), inputs.new_zeros(()).float()
        else:
            length = self.encoder.num_genes + 1
            stops = offsets[1:] if offsets is not None else _stops(len(inputs), length, read)
            places, order = torch.cat([read, stops - 1]).sort()
            found = self._states(inputs, places, genes, offsets)
            states, of_cells = found[order.argsort()].split([len(read), len(stops)])
            targets_of_cell = torch.searchsorted(read, stops).diff(prepend=read.new_zeros(1))
            cell = (self.cell_head(of_cells, whole) * targets_of_cell).sum()
        logits = self.head(states).float()  # (T, tokens)
        targets = targets.long()
        loss = nn.functional.cross_entropy(logits, targets, reduction="sum")
        # Without targets the sum is empty: tie it to the graph, so that every rank runs backward.
        loss = loss + 0.0 * states.float().sum()
        return Reconstruction(loss, (logits.argmax(-1) == targets).sum(), cell)

    def _states(
        self, inputs: Tensor, read: Tensor, genes: Tensor | None, offsets: Tensor | None
    ) -> Tensor:
        """States at the positions to read, (T, D)."""
        if genes is None or offsets is None:
            return self.encoder(inputs, read)  # type: ignore[no-any-return]
        return self.encoder.encode(genes, inputs, offsets, read)


def _stops(cells: int, length: int, like: Tensor) -> Tensor:
    """Where each of some whole cells ends, (B,)."""
    return torch.arange(1, cells + 1, device=like.device) * length


def to_tensors(
    batch: MaskedBatch | PackedMaskedBatch, device: torch.device
) -> tuple[Tensor | None, ...]:
    """Move a masked batch to a device, in the order of `MaskedGeneModel.forward`."""
    arrays: tuple[NDArray[Any] | None, ...]
    inputs = batch.inputs if batch.values is None else batch.values
    if isinstance(batch, PackedMaskedBatch):
        arrays = (inputs, batch.read, batch.targets, batch.genes, batch.offsets)
    else:
        length = batch.inputs.shape[1] + 1  # the constant position follows the genes
        arrays = (inputs, batch.cells * length + batch.genes, batch.targets)
    if batch.whole is not None:
        arrays = (*arrays, *[None] * (5 - len(arrays)), batch.whole)
    return tuple(None if array is None else torch.from_numpy(array).to(device) for array in arrays)


def model_of(engine: TrainingEngine) -> MaskedGeneModel:
    """Give the model inside an engine."""
    model = engine.model
    assert isinstance(model, MaskedGeneModel)
    return model
