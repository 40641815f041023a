"""A classifier from labelled cells: train the network, then choose all that stands beside it.

The network learns by itself. Its share beside the experts, the temperature and the thresholds of
novelty are chosen afterwards, on cells that nothing was fitted on.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from finetune.classifier import CellClassifier
from finetune.config import FinetuneConfig
from finetune.dataset import stratified_split
from finetune.expert_pool import ExpertPool, temperature
from finetune.expression import counts_per_10k, variable_genes
from finetune.fitting import Cells, Inputs, chosen_correction, fit_network, seeded
from finetune.heads import expression_logits
from finetune.novelty import fit_detector
from finetune.resume import begin
from finetune.sides import Labelled, Start
from finetune.split_digest import split_digest
from pretrain.distributed import Ranks
from pretrain.tracking import Tracker


def train_network(
    config: FinetuneConfig,
    start: Start,
    learn: Labelled,
    ranks: Ranks,
    tracker: Tracker,
    folder: Path,
) -> CellClassifier:
    """Train a classifier's network on the learning side; all ranks take part and get the same.

    Args:
        config: What learns, and how.
        start: Encoder and panel.
        learn: Counts in panel order and types, all of them on every rank.
        ranks: This process among all.
        tracker: Gets loss and validation scores of each epoch.
        folder: Keeps the progress; several ranks see the same one.

    Raises:
        ValueError: If the ranks have different cells or settings, or too few cells.
    """
    identity = _identity(config, learn)
    with ranks.failing_together():
        if len(set(ranks.gather_texts(identity))) > 1:
            raise ValueError(
                "the ranks read different cells or have different settings; give all of them the "
                "same files"
            )
        if ranks.is_first:
            begin(folder, identity)
    rows, held_out = _halves(learn, config)
    cells = _cells(learn)
    with seeded(config.seed, "head"):
        labels = tuple(str(name) for name in np.unique(learn.labels))
        model = CellClassifier(start.encoder, labels, config.head).to(ranks.device)
    train, validation = cells.take(rows), cells.take(held_out)
    fit_network(model, train, validation, config, tracker, folder, ranks)
    return model.eval()


def complete(
    model: CellClassifier, learn: Labelled, pool: ExpertPool | None, config: FinetuneConfig
) -> None:
    """Give a trained network its experts, its share beside them, temperature and thresholds.

    Args:
        model: From `train_network`.
        learn: The cells that it learnt from.
        pool: Experts fitted on `learn`; none leaves the network alone.
        config: As in `train_network`.
    """
    _, held_out = _halves(learn, config)
    cells = _cells(learn, pool)
    validation = cells.take(held_out)
    own = Inputs(model, validation, config).logits()
    if pool is not None:
        model.expression = expression_logits(pool).to(model.correction.device)
        model.correction.fill_(chosen_correction(own, validation))
    _calibrate(model, cells, held_out, own, pool, config)


def _cells(learn: Labelled, pool: ExpertPool | None = None) -> Cells:
    classes, codes = np.unique(learn.labels, return_inverse=True)
    first = np.zeros((len(codes), len(classes)), np.float32) if pool is None else pool.logits
    return Cells(learn.counts, codes, first)


def _halves(learn: Labelled, config: FinetuneConfig) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Rows to train on and rows that validate."""
    rows, held_out = stratified_split(learn.labels, config.data.validation_share, config.seed)
    # A single cell of each type: there is nothing to choose by.
    return rows, held_out if len(held_out) else rows


def _calibrate(
    model: CellClassifier,
    cells: Cells,
    held_out: NDArray[np.int64],
    own: NDArray[np.float32],
    pool: ExpertPool | None,
    config: FinetuneConfig,
) -> None:
    """Set temperature and novelty thresholds by cells that nothing was fitted on.

    Where the network adds nothing, these are all training cells, by the experts' folds; else it has
    seen all but the validation cells, of which it says `own`.
    """
    logits = cells.start.copy()
    folds = np.full(len(logits), -1)
    folds[held_out] = 0
    if pool is not None and not float(model.correction):
        folds = pool.folds
    else:
        logits[held_out] += float(model.correction) * own
    if (folds >= 0).any():
        level = temperature(logits[folds >= 0], cells.codes[folds >= 0])
        model.temperature.fill_(level)
        logits /= level
    genes = (
        pool.variable if pool is not None else variable_genes(counts_per_10k(cells.counts), 2_000)
    )
    device = model.temperature.device
    model.novelty = fit_detector(
        cells.counts, cells.codes, genes, folds, logits, **asdict(config.novelty)
    ).to(device)


def _identity(config: FinetuneConfig, learn: Labelled) -> str:
    """Name what is trained on what: progress of anything else is not continued."""
    elsewhere = ("output", "tracking", "deepspeed")  # which change nothing of the result
    settings = {name: value for name, value in asdict(config).items() if name not in elsewhere}
    text = json.dumps(settings, sort_keys=True) + split_digest(learn.counts, learn.labels)
    return hashlib.sha256(text.encode()).hexdigest()
