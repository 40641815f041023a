"""Fine-tuning: a pretrained encoder and labelled cells in, a classifier and its report out."""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import nn

from datastore.genes import GenePanel
from datastore.randomness import derive_key
from datastore.store import write_json
from finetune.baselines import BaselineResult, run_baselines, verdict
from finetune.cells import labels_of, panel_counts, read_adata
from finetune.classifier import CellClassifier, predict, save_classifier, token_batches
from finetune.config import FinetuneConfig
from finetune.dataset import stratified_split
from finetune.metrics import ClassificationScores, score
from finetune.registry import resolve_model
from finetune.report import plot_confusion, plot_scores, score_table
from pretrain.config import OptimConfig
from pretrain.export import git_commit, read_export
from pretrain.schedule import learning_rate
from pretrain.tracking import Tracker, start_run

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Split:
    """Counts in panel order and cell types of one side."""

    counts: sparse.csr_matrix
    labels: NDArray[np.str_]

    def take(self, rows: NDArray[np.int64]) -> "Split":
        """Some of the cells."""
        return Split(self.counts[rows], self.labels[rows])


@dataclass(frozen=True)
class FinetuneResult:
    """What fine-tuning came to."""

    export: Path
    scores: ClassificationScores
    baselines: list[BaselineResult]
    verdict: str
    table: str
    run_id: str | None


def finetune(config: FinetuneConfig, device: torch.device) -> FinetuneResult:
    """Train a classifier, score it beside its baselines on the same held-out cells, export it."""
    output = Path(config.output)
    pretrained = resolve_model(config.encoder, uri=config.tracking.uri)
    export = read_export(pretrained.path, "encoder")
    learn, test = _split(config, export.panel)
    train_rows, validation_rows = stratified_split(
        learn.labels, config.data.validation_share, config.seed
    )
    classes = tuple(str(name) for name in np.unique(learn.labels))
    output.mkdir(parents=True, exist_ok=True)
    with _seeded(config.seed, "head"):
        model = CellClassifier(export.encoder(), classes, config.head).to(device)
    lineage = pretrained.uri or str(pretrained.path)
    with start_run(
        config.tracking.uri,
        config.tracking.experiment,
        config.tracking.run_name or output.name,
        is_first=True,
        tags={
            "kind": "finetune",
            "pretrained": lineage,
            "git_commit": git_commit() or "unknown",
        },
        metrics_path=output / "metrics.jsonl",
    ) as tracker:
        tracker.log_params(asdict(config))
        started = time.perf_counter()
        with _seeded(config.seed, "dropout"):
            _fit(model, learn.take(train_rows), learn.take(validation_rows), config, tracker)
        seconds = time.perf_counter() - started
        predicted = predict(model, test.counts, config.batch_size)
        scores = score(list(test.labels), predicted.best, _all_classes(classes, test.labels))
        log.info("held-out accuracy %.4f; fitting the baselines", scores.accuracy)
        baselines = run_baselines(
            learn.counts,
            learn.labels,
            test.counts,
            test.labels,
            _all_classes(classes, test.labels),
            config.seed,
        )
        result = FinetuneResult(
            export=output / "export",
            scores=scores,
            baselines=baselines,
            verdict=verdict(scores, baselines),
            table=score_table(
                [("scBERT", scores, seconds)] + [(b.name, b.scores, b.seconds) for b in baselines]
            ),
            run_id=tracker.run_id,
        )
        metrics = _metrics(result)
        save_classifier(
            result.export,
            model,
            export.panel,
            {
                "novelty": {"score": "max_probability", "threshold": config.novelty_threshold},
                "metrics": metrics,
                "per_class": scores.as_json(),
                "provenance": {
                    "pretrained": lineage,
                    "run_id": tracker.run_id,
                    "seed": config.seed,
                    "cells_trained_on": len(learn.labels),
                    "git_commit": git_commit(),
                },
            },
        )
        _report(result, output, tracker, metrics)
    return result


@contextmanager
def _seeded(seed: int, purpose: str) -> Iterator[None]:
    """Give torch's global generators a seed of their own for a while."""
    with torch.random.fork_rng():
        torch.manual_seed(derive_key(seed, purpose) >> 1)  # torch takes 63 bits
        yield


def _split(config: FinetuneConfig, panel: GenePanel) -> tuple[Split, Split]:
    """Cells to learn from (training and validation) and held-out cells."""
    data = config.data
    learn = _read(data.path, config, panel)
    if data.test_path is not None:
        return learn, _read(data.test_path, config, panel)
    rows, test_rows = stratified_split(learn.labels, data.test_share, config.seed)
    return learn.take(rows), learn.take(test_rows)


def _read(path: str, config: FinetuneConfig, panel: GenePanel) -> Split:
    data = config.data
    adata = read_adata(path, data.layer)
    counts = panel_counts(adata, panel, path, data.layer, data.min_share_found)
    return Split(counts, labels_of(adata, data.label_key, path))


def _fit(
    model: CellClassifier, train: Split, validation: Split, config: FinetuneConfig, tracker: Tracker
) -> None:
    """Train until the validation macro-F1 stops rising; leave the best weights in the model."""
    codes = {name: number for number, name in enumerate(model.labels)}
    targets = torch.tensor([codes[str(label)] for label in train.labels])
    optimizer = _optimizer(model, config)
    log.info("%d cells to train on, %d to validate", len(targets), len(validation.labels))
    cells, held_out = (
        _Inputs(model, train.counts, config),
        _Inputs(model, validation.counts, config),
    )
    steps = -(-len(targets) // config.batch_size)
    best, since, kept = -1.0, 0, {}
    for epoch in range(config.epochs):
        loss_sum = 0.0
        for step, rows in enumerate(_shuffled(len(targets), steps, config.seed, epoch)):
            _set_rates(optimizer, epoch * steps + step, config.epochs * steps)
            logits = cells.logits(rows)
            loss = nn.functional.cross_entropy(logits, targets[rows].to(logits.device))
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            loss_sum += float(loss.detach()) * len(rows)
        scores = score(list(validation.labels), held_out.best(), model.labels)
        numbers = {
            "loss": loss_sum / len(targets),
            "validation_accuracy": scores.accuracy,
            "validation_macro_f1": scores.macro_f1,
        }
        tracker.log_metrics(numbers, epoch + 1)
        log.info(
            "epoch %d/%d  loss %.4f  validation accuracy %.4f  macro-F1 %.4f",
            epoch + 1,
            config.epochs,
            *numbers.values(),
        )
        since += 1
        if scores.macro_f1 > best:
            best, since = scores.macro_f1, 0
            kept = {name: value.clone() for name, value in model.state_dict().items()}
        if since == config.patience:
            log.info("no better macro-F1 for %d epochs: stopping", since)
            break
    model.load_state_dict(kept)


class _Inputs:
    """Cells on their way into a model: as tokens, or encoded once if the encoder stays as it is."""

    def __init__(
        self, model: CellClassifier, counts: sparse.csr_matrix, config: FinetuneConfig
    ) -> None:
        self._model, self._counts, self._batch_size = model, counts, config.batch_size
        encoder = model.encoder
        num_values = counts.shape[0] * (encoder.num_genes + 1) * encoder.config.dim
        self._states: torch.Tensor | None = None
        if config.train == "head" and 4 * num_values <= config.cache_gigabytes * 1e9:
            self._states = torch.empty(
                counts.shape[0], encoder.num_genes + 1, encoder.config.dim, device=self._device
            )
            batches = token_batches(counts, self._batch_size, encoder.binning)
            with torch.no_grad():
                for number, tokens in enumerate(batches):
                    start = number * self._batch_size
                    states = encoder(tokens.to(self._device))
                    self._states[start : start + len(tokens)] = states

    @property
    def _device(self) -> torch.device:
        return next(self._model.parameters()).device

    def logits(self, rows: NDArray[np.int64]) -> torch.Tensor:
        """Classify some of the cells in training mode, (len(rows), C)."""
        self._model.train()
        if self._states is not None:
            logits: torch.Tensor = self._model.head(self._states[rows])[0]
            return logits
        (tokens,) = token_batches(self._counts[rows], len(rows), self._model.encoder.binning)
        logits, _ = self._model(tokens.to(self._device))
        return logits

    def best(self) -> list[str]:
        """Likeliest class of every cell, in evaluation mode."""
        if self._states is None:
            return predict(self._model, self._counts, self._batch_size).best
        self._model.eval()
        with torch.no_grad():
            parts = self._states.split(self._batch_size)
            codes = torch.cat([self._model.head(part)[0].argmax(-1) for part in parts])
        return [self._model.labels[code] for code in codes.tolist()]


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
    groups = [
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


def _shuffled(
    num_cells: int, num_batches: int, seed: int, epoch: int
) -> Iterator[NDArray[np.int64]]:
    """Rows of each batch of an epoch: each cell once, sizes equal to one cell."""
    order = np.random.default_rng(derive_key(seed, "finetune", epoch)).permutation(num_cells)
    yield from np.array_split(order, num_batches)


def _all_classes(classes: tuple[str, ...], labels: NDArray[np.str_]) -> tuple[str, ...]:
    """The model's classes, then those that only the held-out cells have."""
    return classes + tuple(sorted({str(label) for label in labels} - set(classes)))


def _metrics(result: FinetuneResult) -> dict[str, float]:
    metrics = {"accuracy": result.scores.accuracy, "macro_f1": result.scores.macro_f1}
    for baseline in result.baselines:
        name = baseline.name.replace(" ", "_")
        metrics[f"{name}_accuracy"] = baseline.scores.accuracy
        metrics[f"{name}_macro_f1"] = baseline.scores.macro_f1
    return metrics


def _report(
    result: FinetuneResult, output: Path, tracker: Tracker, metrics: dict[str, float]
) -> None:
    """Write scores and figures, and log them with the export."""
    figures = output / "figures"
    figures.mkdir(exist_ok=True)
    plot_confusion(result.scores, figures / "confusion.png")
    named = {"scBERT": result.scores}
    named |= {baseline.name: baseline.scores for baseline in result.baselines}
    plot_scores(named, figures / "scores.png")
    write_json(
        output / "scores.json",
        {"verdict": result.verdict, "metrics": metrics, "ours": result.scores.as_json()},
    )
    tracker.log_metrics(metrics, 0)
    tracker.log_artifacts(figures, "figures")
    tracker.log_artifacts(result.export, "export")


def read_history(path: Path) -> list[dict[str, float]]:
    """Read `metrics.jsonl`; where a resumed run repeated a step, the later line counts."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    merged: dict[int, dict[str, Any]] = {}
    for line in lines:
        merged.setdefault(line["step"], {}).update(line)
    return [merged[step] for step in sorted(merged)]
