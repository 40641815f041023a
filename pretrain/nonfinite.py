"""Losses and gradients that are not finite: stop before the update, or skip a bounded number."""

import logging
import socket
from collections.abc import Sequence

from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks

log = logging.getLogger(__name__)

_SHOWN = 16
"""So many store positions of a rank are named."""


def update_is_safe(
    broken: Sequence[int], step: int, skipped: int, config: PretrainConfig, ranks: Ranks
) -> bool:
    """Decide on all ranks together whether the update of this step is made or skipped.

    Args:
        broken: Store positions of this rank's cells whose loss or gradient is not finite.
        step: The step that is being made.
        skipped: Steps that this training has skipped before.
        config: Whether to stop or to skip, and how often.
        ranks: This process among all.

    Raises:
        ValueError: On the first rank, with ranks, step and cells, if the training has to stop.
        SystemExit: With code 2 on the others.
    """
    if not any(ranks.sum([len(broken)])):
        return True
    reports = ranks.gather_texts(_report(broken, ranks.rank))
    found = f"loss or gradient is not finite at step {step} on {'; '.join(filter(None, reports))}; "
    with ranks.failing_together():
        if ranks.is_first:
            _refuse(found, skipped, config)
            log.warning(
                "%sno weight was changed, the step is skipped (%d of at most %d)",
                found,
                skipped + 1,
                config.max_skipped_steps,
            )
    return False


def _report(broken: Sequence[int], rank: int) -> str:
    if not broken:
        return ""
    more = f" and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
    shown = list(broken[:_SHOWN])
    return f"rank {rank} ({socket.gethostname()}), store positions {shown}{more}"


def _refuse(found: str, skipped: int, config: PretrainConfig) -> None:
    remedy = (
        "no weight was changed: lower optim.lr or optim.clip_norm and start again from the last "
        "checkpoint"
    )
    if config.on_nonfinite == "stop":
        raise ValueError(f"{found}{remedy}, or leave such steps out (--on_nonfinite skip)")
    if skipped >= config.max_skipped_steps:
        raise ValueError(
            f"{found}max_skipped_steps is {config.max_skipped_steps} and as many were skipped; "
            f"{remedy}"
        )
