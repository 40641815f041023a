"""The loop of fine-tuning: train, validate, stop early, keep the best, continue after a stop."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import log_softmax
from torch import Tensor, nn

from datastore.randomness import derive_key
from finetune.classifier import CellClassifier, token_batches
from finetune.config import FinetuneConfig, LossConfig
from finetune.expert_pool import class_weights, macro_f1
from finetune.resume import Progress, load_progress, save_progress
from pretrain.config import OptimConfig
from pretrain.schedule import learning_rate
from pretrain.tracking import Tracker

log = logging.getLogger(__name__)

CORRECTIONS = (0.0, 0.25, 0.5, 1.0)
"""How much of the network's logits may be added to the experts'."""


@dataclass(frozen=True)
class Cells:
    """Cells with everything that training needs of them.

    Attributes:
        counts: Raw counts in panel order, CSR of shape (N, G).
        codes: Type codes, (N,).
        start: Logits that a share of the network's may be added to, (N, C); by experts that did not
            see the cell.
    """

    counts: sparse.csr_matrix
    codes: NDArray[np.int64]
    start: NDArray[np.float32]

    def take(self, rows: NDArray[np.int64]) -> "Cells":
        """Some of the cells."""
        return Cells(self.counts[rows], self.codes[rows], self.start[rows])


@contextmanager
def seeded(seed: int, purpose: str) -> Iterator[None]:
    """Give torch's global generators a seed of their own for a while."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_key(seed, purpose) >> 1)  # torch takes 63 bits
        yield


def fit_network(
    model: CellClassifier,
    train: Cells,
    validation: Cells,
    config: FinetuneConfig,
    tracker: Tracker,
    folder: Path,
) -> None:
    """Train until the validation macro-F1 stops rising; leave the best weights in the model.

    The network learns the types by itself, so that its cell embedding tells them apart whatever its
    share. Where macro-F1 is equal, the higher log-likelihood counts. An interrupted training
    continues from its last whole epoch in `folder`, with the same result. In the end
    `model.correction` is set to the share of the network's logits that, added to the experts',
    makes validation cells most likely.
    """
    optimizer = _optimizer(model, config)
    log.info("%d cells to train on, %d to validate", len(train.codes), len(validation.codes))
    cells, held_out = Inputs(model, train, config), Inputs(model, validation, config)
    progress = load_progress(folder, model, optimizer) or Progress()
    for epoch in range(progress.epoch, config.epochs):
        loss = _epoch(model, cells, optimizer, config, epoch)
        logits = held_out.logits()
        f1, nats = validate(logits, validation)
        accuracy = float((logits.argmax(axis=1) == validation.codes).mean())
        tracker.log_metrics(
            {"loss": loss, "validation_accuracy": accuracy, "validation_macro_f1": f1}, epoch + 1
        )
        log.info(
            "epoch %d/%d  loss %.4f  validation accuracy %.4f  macro-F1 %.4f",
            *(epoch + 1, config.epochs, loss, accuracy, f1),
        )
        progress = progress.after(epoch + 1, (f1, -nats), model)
        save_progress(folder, model, optimizer, progress)
        if progress.since == config.patience:
            log.info("no better macro-F1 for %d epochs: stopping", progress.since)
            break
    model.load_state_dict(progress.kept)
    if model.expression is not None:
        model.correction.fill_(chosen_correction(held_out.logits(), validation))


def chosen_correction(own: NDArray[np.float32], cells: Cells) -> float:
    """Choose how much of the network's logits is added to the experts'.

    The share of the highest log-likelihood is taken if its gain over none exceeds twice the
    standard error of that gain: a few validation cells prove little.

    Args:
        own: The network's logits of the validation cells, (N, C).
        cells: The validation cells.
    """
    nats = [_nats(cells.start + share * own, cells.codes) for share in CORRECTIONS]
    best = int(np.argmin([each.mean() for each in nats]))
    gain = nats[0] - nats[best]
    error = gain.std() / np.sqrt(len(gain))
    return CORRECTIONS[best] if gain.mean() > 2 * error else 0.0


def validate(logits: NDArray[np.float32], cells: Cells) -> tuple[float, float]:
    """Macro-F1 of cells and their mean negative log-likelihood, in nats."""
    nats = _nats(logits, cells.codes)
    return macro_f1(cells.codes, logits.argmax(axis=1)), float(nats.mean())


def _nats(logits: NDArray[np.float32], codes: NDArray[np.int64]) -> NDArray[np.float64]:
    """Negative log-likelihood of each cell's type, (N,)."""
    likely = log_softmax(logits.astype(np.float64), axis=1)
    return np.asarray(-likely[np.arange(len(codes)), codes])


def _epoch(
    model: CellClassifier,
    cells: "Inputs",
    optimizer: torch.optim.Optimizer,
    config: FinetuneConfig,
    epoch: int,
) -> float:
    """Pass over the training cells once and return the mean loss."""
    model.train()
    codes = torch.from_numpy(cells.cells.codes)
    weights = torch.from_numpy(class_weights(cells.cells.codes, len(model.labels))).float()
    steps = -(-len(codes) // config.batch_size)
    loss_sum = 0.0
    # A seed for each epoch: a training that continues drops the same units.
    with seeded(derive_key(config.seed, "dropout", epoch), "epoch"):
        for step, rows in enumerate(_order(cells.cells.codes, steps, config, epoch)):
            _set_rates(optimizer, epoch * steps + step, config.epochs * steps)
            logits = cells.training_logits(rows)
            loss = cell_loss(logits, codes[rows].to(logits.device), weights, config.loss)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += float(loss.detach()) * len(rows)
    return loss_sum / len(codes)


def cell_loss(logits: Tensor, codes: Tensor, weights: Tensor, config: LossConfig) -> Tensor:
    """Mean loss of a batch.

    Args:
        logits: (B, C).
        codes: Type codes, (B,).
        weights: Weight of each type, (C,); used if `balance` is `weights`.
        config: Smoothing, focus, balance.
    """
    each = nn.functional.cross_entropy(
        logits, codes, reduction="none", label_smoothing=config.label_smoothing
    )
    if config.focal:
        right = logits.softmax(-1).gather(1, codes[:, None])[:, 0]
        each = each * (1 - right) ** config.focal
    if config.balance == "weights":
        each = each * weights.to(each.device)[codes]
    return each.mean()


class Inputs:
    """Cells on their way into a model: as tokens, or encoded once if the encoder stays as it is."""

    def __init__(self, model: CellClassifier, cells: Cells, config: FinetuneConfig) -> None:
        self.cells = cells
        self._model, self._batch_size = model, config.batch_size
        encoder, counts = model.encoder, cells.counts
        num_values = counts.shape[0] * (encoder.num_genes + 1) * encoder.config.dim
        self._states: Tensor | None = None
        if config.train == "head" and 4 * num_values <= config.cache_gigabytes * 1e9:
            parts = token_batches(counts, self._batch_size, encoder)
            with torch.no_grad():
                self._states = torch.cat([encoder(part.to(self._device)) for part in parts])

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def training_logits(self, rows: NDArray[np.int64]) -> Tensor:
        """Logits of the network for some of the cells, (len(rows), C), in its present mode."""
        counts = self.cells.counts[rows]
        (tokens,) = token_batches(counts, len(rows), self._model.encoder)
        tokens = tokens.to(self._device)
        states = self._model.encoder(tokens) if self._states is None else self._states[rows]
        logits: Tensor = self._model.head(states, tokens)[0]
        return logits

    def logits(self) -> NDArray[np.float32]:
        """Logits of the network for every cell, in evaluation mode, (N, C)."""
        self._model.eval()
        rows = np.arange(len(self.cells.codes))
        with torch.no_grad():
            parts = [
                self.training_logits(rows[start : start + self._batch_size])
                for start in range(0, len(rows), self._batch_size)
            ]
        return np.asarray(torch.cat(parts).float().cpu().numpy())


def _optimizer(model: CellClassifier, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW over what learns; everything else is frozen."""
    encoder = model.encoder
    learning: list[nn.Module] = []
    if config.train == "last_block":
        learning = [encoder.blocks[-1], encoder.norm]
    if config.train == "all":
        learning = [encoder]
    frozen_tables = [] if encoder.config.gene_embedding == "learned" else [encoder.genes]
    encoder.requires_grad_(False)
    for module in learning:
        module.requires_grad_(True)
    for table in frozen_tables:
        if table is not None:
            table.requires_grad_(False)
    groups: list[dict[str, Any]] = [
        {"params": list(model.head.parameters()), "highest_lr": config.lr},
        {
            "params": [weight for weight in encoder.parameters() if weight.requires_grad],
            "highest_lr": config.encoder_lr,
        },
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]], weight_decay=config.weight_decay
    )


def _set_rates(optimizer: torch.optim.Optimizer, step: int, total_steps: int) -> None:
    """Ten steps of warm-up, then a cosine to zero, each group from its own highest rate."""
    shape = OptimConfig(lr=1.0, min_lr=0.0, schedule="cosine", warmup_steps=10)
    scale = learning_rate(step, total_steps, total_steps, shape)
    for group in optimizer.param_groups:
        group["lr"] = scale * group["highest_lr"]


def _order(
    codes: NDArray[np.int64], num_batches: int, config: FinetuneConfig, epoch: int
) -> list[NDArray[np.int64]]:
    """Rows of each batch of an epoch, sizes equal to one cell.

    Each cell comes once, or, balanced by sampling, each type as often as any other.
    """
    rng = np.random.default_rng(derive_key(config.seed, "finetune", epoch))
    if config.loss.balance == "sampling":
        chances = class_weights(codes, codes.max() + 1)[codes]
        order = rng.choice(len(codes), len(codes), p=chances / chances.sum())
    else:
        order = rng.permutation(len(codes))
    return np.array_split(order, num_batches)
