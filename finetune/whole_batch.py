"""Layers that see the whole batch although each rank has a part of its cells.

Normalization takes the moments of all cells, and dropout the places that one process would draw, so
that a training does not depend on the number of ranks.
"""

from collections.abc import Callable
from typing import Any, Final

import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from pretrain.distributed import Ranks


class Share:
    """This rank's cells of the batch at hand."""

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self.num_cells = 0
        """Cells of the whole batch."""

    @property
    def places(self) -> slice:
        """Where this rank's cells stand in the batch."""
        return self._ranks.part(self.num_cells)

    def of(self, rows: NDArray[Any]) -> NDArray[Any]:
        """Turn to a batch, and give the rows that are this rank's."""
        self.num_cells = len(rows)
        return rows[self.places]


class WholeBatchNorm(nn.BatchNorm1d):
    """Batch normalization, without a scale of its own, over the cells of all ranks."""

    def __init__(self, former: nn.BatchNorm1d, share: Share) -> None:
        super().__init__(former.num_features, former.eps, former.momentum, affine=False)
        self.load_state_dict(former.state_dict())
        self._share = share

    def forward(self, values: Tensor) -> Tensor:
        """Normalize values, (B, L), by the moments of the whole batch; all ranks take part."""
        if not self.training:
            return super().forward(values)
        assert self.momentum is not None
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        num_cells = self._share.num_cells
        mean = _SumOverRanks.apply(values.sum(0)) / num_cells
        centred = values - mean
        variance = _SumOverRanks.apply(centred.square().sum(0)) / num_cells
        with torch.no_grad():
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(variance * (num_cells / (num_cells - 1)), self.momentum)
        normalized: Tensor = centred * (variance + self.eps).rsqrt()
        return normalized


class WholeBatchDropout(nn.Dropout):
    """Dropout that draws for the whole batch, on every rank alike, and uses this rank's rows."""

    def __init__(self, former: nn.Dropout, share: Share) -> None:
        super().__init__(former.p)
        self._share = share

    def forward(self, values: Tensor) -> Tensor:
        """Drop some of the values, (B, L)."""
        if not self.training:
            return values
        kept = super().forward(values.new_ones(self._share.num_cells, *values.shape[1:]))
        return values * kept[self._share.places]


_WHOLE: Final[dict[type[nn.Module], Callable[[Any, Share], nn.Module]]] = {
    nn.BatchNorm1d: WholeBatchNorm,
    nn.Dropout: WholeBatchDropout,
}


def see_whole_batches(module: nn.Module, share: Share) -> None:
    """Replace the layers of a module that depend on the other cells of a batch, or draw."""
    for name, child in list(module.named_children()):
        if type(child) in _WHOLE:
            setattr(module, name, _WHOLE[type(child)](child, share))
        else:
            see_whole_batches(child, share)


class _SumOverRanks(torch.autograd.Function):
    """Sum over ranks, of values going forward and of their gradients going back."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _SumOverRanks.forward(ctx, gradient)
