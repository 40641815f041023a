"""Do all ranks still hold the same model? If not, the first tensor that differs is named.

Without ZeRO 3 every rank has each parameter whole: all of them are compared, in the precision that
the forward pass uses. Under ZeRO 3 most parameters exist once, in shares; compared is what every
rank keeps whole: the small parameters that DeepSpeed leaves in place, and the buffers, among them
the random projections.
"""

import logging
from collections.abc import Iterator
from typing import Final

import torch
from torch import Tensor, nn

from pretrain.distributed import Ranks

log = logging.getLogger(__name__)

_PIECE: Final = 2**20
"""Elements that are summed at a time, so that the copies in int64 stay small."""
_PRIME: Final = 2_147_483_647


def require_agreement(model: nn.Module, step: int, ranks: Ranks) -> int:
    """Compare the tensors that all ranks hold whole; called by all of them.

    Args:
        model: The model inside the engine.
        step: Steps done, for the message.
        ranks: This process among all.

    Returns:
        How many tensors were compared.

    Raises:
        ValueError: On the first rank, naming the first tensor that differs and the ranks that hold
            another than most.
        SystemExit: With code 2 on the others.
    """
    tensors = list(_whole_tensors(model))
    own = torch.stack([checksum(value) for _, value in tensors]) if tensors else torch.zeros(0)
    table = ranks.gather_rows([float(number) for number in own.tolist()])
    with ranks.failing_together():
        if ranks.is_first:
            _compare([name for name, _ in tensors], table, step, ranks)
    return len(tensors)


def checksum(value: Tensor) -> Tensor:
    """Sum a tensor's bits, weighted by place: an int64 scalar below 2³¹, on its device.

    One changed element always shows; any other difference hides with a chance of 2⁻³¹.
    """
    bits = value.detach().reshape(-1).contiguous()
    bits = bits.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[bits.itemsize])
    total = torch.zeros((), dtype=torch.int64, device=value.device)
    for number, piece in enumerate(bits.split(_PIECE)):
        places = torch.arange(1, len(piece) + 1, device=value.device)
        # Exact in int64: products stay below 2⁵¹, the sum of a piece below 2⁵².
        mixed = piece.long().remainder(_PRIME) * places % _PRIME
        total = (total * 31 + mixed.sum() + number) % _PRIME
    return total


def _whole_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    saved = model.state_dict(keep_vars=True)
    for name, parameter in model.named_parameters():
        if getattr(parameter, "ds_numel", parameter.numel()) == parameter.numel():
            yield name, parameter
    for name, buffer in model.named_buffers():
        if name in saved:
            yield name, buffer


def _compare(names: list[str], table: list[list[float]], step: int, ranks: Ranks) -> None:
    for name, sums in zip(names, zip(*table, strict=True), strict=True):
        # The value that most ranks hold; the lowest rank's, if there is a draw.
        common = max(sums, key=lambda value: (sums.count(value), -sums.index(value)))
        if others := [rank for rank, value in enumerate(sums) if value != common]:
            shown = ", ".join(map(str, others[:8])) + (" and more" if len(others) > 8 else "")
            raise ValueError(
                f"{name} differs between ranks at step {step}: rank {shown} holds another than "
                f"rank {sums.index(common)}; the ranks no longer train one model: start again from "
                "the last checkpoint, and if it happens again, leave out the host of that rank"
            )
    log.debug("%d tensors are equal on %d ranks at step %d", len(names), ranks.world_size, step)
