"""One optimizer step: mask, forward and backward of each micro-batch, one update."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from datastore.loader import PackedBatch, TokenBatch
from pretrain.config import PretrainConfig
from pretrain.distributed import Ranks
from pretrain.engine import TrainingEngine
from pretrain.masking import Measured, commonest_bins, mask_batch
from pretrain.micro_batches import micro_batches
from pretrain.nonfinite import update_is_safe
from pretrain.objective import model_of, to_tensors
from pretrain.window import Window


@dataclass(frozen=True)
class StepInfo:
    """Which step it is."""

    epoch: int
    step: int
    """Optimizer steps done before it."""
    learning_rate: float
    skipped: int = 0
    """Steps that were skipped before, because something was not finite."""


class StepResult(NamedTuple):
    """What came of a step on this rank."""

    sums: NDArray[np.float64]
    """Loss, correct, rule correct, targets, cells; a skipped step counts its cells only."""
    skipped: bool


def training_step(
    engine: TrainingEngine,
    batches: Sequence[TokenBatch | PackedBatch],
    info: StepInfo,
    config: PretrainConfig,
    ranks: Ranks,
    window: Window,
    measured: Measured | None = None,
) -> StepResult:
    """Make one optimizer step.

    Raises:
        ValueError: If a loss or gradient is not finite and may not be skipped, before the weights
            change.
    """
    # With weights a cell may come again in an epoch; other genes are hidden then.
    draw = info.epoch if config.data.weight_by is None else info.step
    batches = micro_batches(batches, config, ranks)
    num_genes = model_of(engine).encoder.num_genes
    masked = [mask_batch(batch, draw, config, num_genes, measured) for batch in batches]
    targets = sum(len(batch.targets) for batch in masked)
    # Every target of the global batch weighs the same, however ranks and micro-batches share them.
    (all_targets,) = ranks.sum([targets])
    sums = np.zeros(5)
    broken: list[int] = []
    safe = True
    for number, batch in enumerate(masked):
        with window.own_work():
            loss, correct, cell = engine(*to_tensors(batch, ranks.device))
        last = number == len(masked) - 1
        whole = loss + config.cell_objective * cell
        engine.backward(whole / max(1.0, all_targets), last)
        if not (math.isfinite(whole.detach()) and engine.gradient_is_finite()):
            broken += batches[number].positions.tolist()
        if last:  # before the update, which would spoil the weights
            safe = update_is_safe(broken, info.step, info.skipped, config, ranks)
        engine.step(info.learning_rate, update=safe)
        rule = commonest_bins(batch, config.binning, config.masking.zeros) == batch.targets
        sums[:3] += [float(loss.detach()), float(correct), float(rule.sum())]
    sums[3] = targets
    if not safe:
        sums[:] = 0
    sums[4] = sum(len(batch.positions) for batch in batches)
    return StepResult(sums, not safe)


def redraw(engine: TrainingEngine, step: int, config: PretrainConfig) -> None:
    """Set the projections that belong to a step; a function of the step, so resuming is exact."""
    if config.redraw_every:
        number = step // config.redraw_every
        model_of(engine).encoder.redraw_projections(config.seed, number)
