"""The loop of fine-tuning: train, validate, stop early, keep the best, continue after a stop.

Of each batch, and of the validation cells, every rank takes its part. Losses and gradients are
those of the whole batch, and the first rank's scores decide for all.
"""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from scipy.special import log_softmax
from torch import Tensor, nn
from tqdm import tqdm

from datastore.randomness import derive_key
from finetune.classifier import CellClassifier, token_batches
from finetune.config import FinetuneConfig, LossConfig
from finetune.expert_pool import class_weights, macro_f1
from finetune.resume import Progress, load_progress, save_progress
from finetune.updates import Groups, Updates, updates_of
from finetune.whole_batch import Share, see_whole_batches
from pretrain.config import OptimConfig
from pretrain.distributed import Ranks, alone
from pretrain.schedule import learning_rate
from pretrain.tracking import Tracker

log = logging.getLogger(__name__)

CHEAP_STEPS = 100
"""Optimizer steps of an epoch that cost little: few cells are passed several times."""
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
    """Give torch's global generators, of CPU and this process's GPU, a seed for a while."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive_key(seed, purpose) >> 1)  # torch takes 63 bits
        yield


class OwnLogits(nn.Module):
    """The network's own logits, without the experts': what learns."""

    def __init__(self, model: CellClassifier) -> None:
        super().__init__()
        self.encoder, self.head = model.encoder, model.head

    def forward(self, tokens: Tensor, states: Tensor | None = None) -> Tensor:
        """Logits, (B, C), of tokens, (B, G); `states` spare the encoder, (B, G + 1, D)."""
        if states is None:
            states = self.encoder(tokens)
        logits: Tensor = self.head(states, tokens)[0]
        return logits


def fit_network(
    model: CellClassifier,
    train: Cells,
    validation: Cells,
    config: FinetuneConfig,
    tracker: Tracker,
    folder: Path,
    ranks: Ranks | None = None,
    groups: Groups | None = None,
) -> None:
    """Train until the validation macro-F1 stops rising; leave the best weights in the model.

    The network learns the types by itself, so that its cell embedding tells them apart whatever its
    share. Where macro-F1 is equal, the higher log-likelihood counts. An interrupted training
    continues from its last whole epoch in `folder`, with the same result; on another number of
    ranks to rounding.

    Args:
        model: The classifier, on its device.
        train: Cells to learn from, all of them on every rank.
        validation: Cells that say when to stop.
        config: What learns, and how.
        tracker: Gets loss and validation scores of each epoch.
        folder: Keeps the progress; all ranks read it, the first one writes.
        ranks: This process among several; none trains alone.
        groups: What learns, at which rates; none takes what `config.train` names.

    Raises:
        ValueError: If a batch has fewer cells than there are ranks, or ranks see other progress.
    """
    ranks = ranks or alone(next(model.parameters()).device)
    share = Share(ranks)
    groups = groups or _learning(model, config)
    with ranks.failing_together():
        _require_cells(len(train.codes), config, ranks)
    if ranks.world_size > 1:
        see_whole_batches(model.head, share)
    network = OwnLogits(model)
    updates = updates_of(network, groups, config, ranks)
    log.info("%d cells to train on, %d to validate", len(train.codes), len(validation.codes))
    cells, held_out = (Inputs(model, side, config, ranks) for side in (train, validation))
    if config.epoch_steps is None:
        config = replace(config, epoch_steps=CHEAP_STEPS if cells.are_kept else 1)
    num_steps = math.prod(_num_steps(len(train.codes), config))
    progress = _continued(folder, network, updates, num_steps, ranks)
    while progress.epoch < config.epochs and progress.since < config.patience:
        loss = _epoch(updates, cells, config, progress.epoch, share, ranks)
        logits = held_out.logits()
        # The last bit may depend on the processor, and all ranks must go on or stop together.
        f1, nats = ranks.of_first(validate(logits, validation))
        accuracy = float((logits.argmax(axis=1) == validation.codes).mean())
        epoch = progress.epoch + 1
        tracker.log_metrics(
            {"loss": loss, "validation_accuracy": accuracy, "validation_macro_f1": f1}, epoch
        )
        log.info(
            "epoch %d/%d  loss %.4f  validation accuracy %.4f  macro-F1 %.4f",
            *(epoch, config.epochs, loss, accuracy, f1),
        )
        progress = progress.after(epoch, (f1, -nats), network)
        moments = updates.moments()
        with ranks.failing_together():
            if ranks.is_first:
                save_progress(folder, network, moments, progress)
    if progress.since == config.patience:
        log.info("no better macro-F1 for %d epochs: stopping", progress.since)
    network.load_state_dict(progress.kept)


def _require_cells(num_cells: int, config: FinetuneConfig, ranks: Ranks) -> None:
    smallest = num_cells // -(-num_cells // config.batch_size)
    if smallest < ranks.world_size:
        raise ValueError(
            f"batch_size {config.batch_size} cuts the {num_cells} training cells into batches of "
            f"{smallest}, but each of {ranks.world_size} ranks needs a cell of every batch; raise "
            f"batch_size, or start {smallest} at most"
        )


def _continued(
    folder: Path, network: OwnLogits, updates: Updates, num_steps: int, ranks: Ranks
) -> Progress:
    """Load what was saved, on every rank; nothing is as good as an epoch 0."""
    progress, moments = load_progress(folder, network) or (Progress(), {})
    epochs = ranks.gather(progress.epoch)
    with ranks.failing_together():
        if len(set(epochs)) > 1:
            raise ValueError(
                f"the ranks read different progress in {folder} (epochs "
                f"{', '.join(f'{epoch:.0f}' for epoch in epochs)}); put the output on a disk that "
                "all hosts share, or remove its folder `progress`"
            )
    if progress.epoch:
        updates.restore(moments, progress.epoch * num_steps)
    return progress


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
    updates: Updates,
    cells: "Inputs",
    config: FinetuneConfig,
    epoch: int,
    share: Share,
    ranks: Ranks,
) -> float:
    """Pass over the training cells, as often as an epoch does, and return the mean loss."""
    updates.train()
    codes = torch.from_numpy(cells.cells.codes)
    weights = torch.from_numpy(class_weights(cells.cells.codes, cells.num_classes)).float()
    batches = _order(cells.cells.codes, config, epoch)
    steps = len(batches)
    loss_sum = 0.0
    # A seed for each epoch: a training that continues drops the same units.
    with seeded(derive_key(config.seed, "dropout", epoch), "epoch"):
        shown = None if ranks.is_first else True  # none: where there is a terminal
        shown_batches = tqdm(batches, f"epoch {epoch + 1}", leave=False, disable=shown)
        for step, batch in enumerate(shown_batches):
            rows = share.of(batch)
            logits = updates.forward(*cells.of(rows))
            loss = cell_loss(logits, codes[rows].to(logits.device), weights, config.loss)
            scale = _rate(epoch * steps + step, config.epochs * steps)
            # Over all ranks the sum of these parts is the mean of the batch.
            updates.step(loss * (len(rows) / len(batch)), scale)
            loss_sum += float(loss.detach()) * len(rows)
    return ranks.sum([loss_sum])[0] / sum(len(batch) for batch in batches)


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

    def __init__(
        self,
        model: CellClassifier,
        cells: Cells,
        config: FinetuneConfig,
        ranks: Ranks | None = None,
    ) -> None:
        """Encode, if that is worth it.

        Args:
            model: The classifier, on its device.
            cells: The cells, all of them on every rank.
            config: Says what learns, and how much memory the states may take.
            ranks: Encode their parts of the cells, and get the states of all; none is alone.
        """
        self.cells, self.num_classes = cells, len(model.labels)
        self._network, self._batch_size = OwnLogits(model), config.batch_size
        self._device = next(model.parameters()).device
        self._ranks = ranks or alone(self._device)
        encoder, counts = model.encoder, cells.counts
        num_values = counts.shape[0] * (encoder.num_genes + 1) * encoder.config.dim
        self._states: Tensor | None = None
        if config.train == "head" and 4 * num_values <= config.cache_gigabytes * 1e9:
            own_counts = counts[self._own]
            parts = token_batches(own_counts, self._batch_size, encoder)
            total = -(-own_counts.shape[0] // self._batch_size)
            hidden = None if self._ranks.is_first else True
            with torch.no_grad():
                states = [
                    encoder(part.to(self._device))
                    for part in tqdm(parts, "encoding", total, leave=False, disable=hidden)
                ]
            shape = (0, encoder.num_genes + 1, encoder.config.dim)
            own = torch.cat(states or [torch.zeros(shape, device=self._device)])
            self._states = self._ranks.join_parts(own, counts.shape[0])

    @property
    def are_kept(self) -> bool:
        """Whether the cells were encoded once, and steps cost little."""
        return self._states is not None

    @property
    def _own(self) -> slice:
        return self._ranks.part(len(self.cells.codes))

    def of(self, rows: NDArray[np.int64]) -> tuple[Tensor, Tensor | None]:
        """What the network takes for one or more of the cells: tokens, and states if kept."""
        encoder = self._network.encoder
        (tokens,) = token_batches(self.cells.counts[rows], len(rows), encoder)
        return tokens.to(self._device), None if self._states is None else self._states[rows]

    def logits(self) -> NDArray[np.float32]:
        """Logits of the network for every cell, in evaluation mode, (N, C); all ranks take part."""
        self._network.eval()
        rows = np.arange(len(self.cells.codes))[self._own]
        with torch.no_grad():
            parts = [
                self._network(*self.of(rows[start : start + self._batch_size])).float()
                for start in range(0, len(rows), self._batch_size)
            ]
            parts = parts or [torch.zeros(0, self.num_classes, device=self._device)]
            whole = self._ranks.join_parts(torch.cat(parts), len(self.cells.codes))
        return np.asarray(whole.cpu().numpy())


def _learning(model: CellClassifier, config: FinetuneConfig) -> Groups:
    """What learns, in groups by rate; everything else is frozen."""
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
    rates = ((model.head, config.lr), (encoder, config.encoder_lr))
    groups = [
        {"params": [w for w in part.parameters() if w.requires_grad], "lr_factor": rate}
        for part, rate in rates
    ]
    return [group for group in groups if group["params"]]


def _num_steps(num_cells: int, config: FinetuneConfig) -> tuple[int, int]:
    """Passes of an epoch over the cells, and optimizer steps of each pass."""
    steps = -(-num_cells // config.batch_size)
    return max(1, (config.epoch_steps or 1) // steps), steps


def _rate(step: int, total_steps: int) -> float:
    """Share of the highest rates: ten steps of warm-up, then a cosine to zero."""
    shape = OptimConfig(lr=1.0, min_lr=0.0, schedule="cosine", warmup_steps=10)
    return learning_rate(step, total_steps, total_steps, shape)


def _order(codes: NDArray[np.int64], config: FinetuneConfig, epoch: int) -> list[NDArray[np.int64]]:
    """Rows of each batch of an epoch, sizes equal to one cell.

    In each pass a cell comes once, or, balanced by sampling, each type as often as any other.
    """
    rng = np.random.default_rng(derive_key(config.seed, "finetune", epoch))
    passes, num_batches = _num_steps(len(codes), config)
    batches: list[NDArray[np.int64]] = []
    for _ in range(passes):
        if config.loss.balance == "sampling":
            chances = class_weights(codes, codes.max() + 1)[codes]
            order = rng.choice(len(codes), len(codes), p=chances / chances.sum())
        else:
            order = rng.permutation(len(codes))
        batches += np.array_split(order, num_batches)
    return batches
