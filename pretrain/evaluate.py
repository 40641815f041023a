"""Held-out masked accuracy, beside the commonest-bin rule."""

from collections.abc import Iterable

import numpy as np
import torch

from datastore.loader import PackedBatch, TokenBatch
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine
from pretrain.health import HealthRecord, health_metrics, observed
from pretrain.masking import Measured, commonest_bins, mask_batch
from pretrain.objective import model_of, to_tensors


def evaluate(
    engine: TrainingEngine,
    batches: Iterable[TokenBatch | PackedBatch],
    config: PretrainConfig,
    ranks: Ranks,
    measured: Measured | None = None,
) -> dict[str, float]:
    """Reconstruct the same hidden genes of the same held-out cells each time.

    Every rank evaluates its own cells; sums are reduced, so all ranks return the same numbers.

    Returns:
        validation_loss (nats per target), validation_masked_accuracy,
        validation_commonest_bin_accuracy; empty if there are no targets at all. With
        `attention_health` those of `pretrain.health` as well, with `cell_objective`
        validation_cell_loss (nats per gene).
    """
    engine.train(False)
    encoder = model_of(engine).encoder
    health = HealthRecord(config.encoder.depth)
    sums = np.zeros(5)
    with torch.no_grad():
        for number, batch in enumerate(batches):
            masked = mask_batch(batch, -1, config, encoder.num_genes, measured)
            is_looked_at = config.attention_health and number == 0 and len(batch.positions) > 0
            with observed(encoder, health if is_looked_at else None):
                loss, correct, cell = engine(*to_tensors(masked, ranks.device))
            rule = commonest_bins(masked, config.binning, config.masking.zeros) == masked.targets
            sums += [
                float(loss),
                float(correct),
                float(rule.sum()),
                len(masked.targets),
                float(cell),
            ]
    engine.train(True)
    loss_sum, correct_sum, rule_sum, count, cell_sum = ranks.sum(list(sums))
    if not count:
        return {}
    metrics = health_metrics(ranks.sum(health.sums())) if config.attention_health else {}
    if config.cell_objective:
        metrics["validation_cell_loss"] = cell_sum / count
    return metrics | {
        "validation_loss": loss_sum / count,
        "validation_masked_accuracy": correct_sum / count,
        "validation_commonest_bin_accuracy": rule_sum / count,
    }
