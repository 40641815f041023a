"""Held-out masked accuracy, beside the commonest-bin rule."""

from collections.abc import Iterable

import numpy as np
import torch

from datastore.loader import TokenBatch
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine
from pretrain.masking import commonest_bins, mask_tokens
from pretrain.objective import to_tensors


def evaluate(
    engine: TrainingEngine,
    batches: Iterable[TokenBatch],
    config: PretrainConfig,
    ranks: Ranks,
) -> dict[str, float]:
    """Reconstruct the same hidden genes of the same held-out cells each time.

    Every rank evaluates its own cells; sums are reduced, so all ranks return the same numbers.

    Returns:
        validation_loss (nats per target), validation_masked_accuracy,
        validation_commonest_bin_accuracy; empty if there are no targets at all.
    """
    engine.train(False)
    sums = np.zeros(4)
    with torch.no_grad():
        for batch in batches:
            masked = mask_tokens(
                batch.tokens, batch.positions, config.seed, -1, config.masking, config.binning
            )
            loss, correct = engine(*to_tensors(masked, ranks.device))
            rule = commonest_bins(masked, config.binning) == masked.targets
            sums += [float(loss), float(correct), float(rule.sum()), len(masked.targets)]
    engine.train(True)
    loss_sum, correct_sum, rule_sum, count = ranks.sum(list(sums))
    if not count:
        return {}
    return {
        "validation_loss": loss_sum / count,
        "validation_masked_accuracy": correct_sum / count,
        "validation_commonest_bin_accuracy": rule_sum / count,
    }
