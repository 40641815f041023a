"""Learning rate as a pure function of the step."""

import math

from pretrain.config import OptimConfig


def learning_rate(step: int, steps_per_epoch: int, total_steps: int, config: OptimConfig) -> float:
    """Give the learning rate of one optimizer step.

    Args:
        step: Number of the step, from 0.
        steps_per_epoch: Steps of an epoch (restarts are counted in epochs).
        total_steps: Steps of the whole training (where the cosine ends).
        config: Shape of the schedule.
    """
    if config.schedule == "restarts":
        return _restarts(step // steps_per_epoch, config)
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    share = (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps)
    return _cosine(share, config.lr, config.min_lr)


def _restarts(epoch: int, config: OptimConfig) -> float:
    """Linear warm-up and cosine in cycles that double, set once per epoch (released scBERT)."""
    cycle, length, begin = 0, config.restart_epochs, 0
    while epoch >= begin + length:
        begin, length, cycle = begin + length, 2 * length, cycle + 1
    highest = max(config.min_lr, config.lr * config.restart_decay**cycle)
    into, warmup = epoch - begin, config.restart_warmup_epochs
    if into < warmup:
        return config.min_lr + (highest - config.min_lr) * (into + 1) / warmup
    return _cosine((into - warmup) / (length - warmup), highest, config.min_lr)


def _cosine(share: float, highest: float, lowest: float) -> float:
    return lowest + (highest - lowest) * (1 + math.cos(math.pi * min(1.0, share))) / 2
